"""Boxes and coders against formulas written once more, box by box, in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection import anchors, boxes, coders
from cvjax.errors import InputError


def some_boxes(seed, count):
    rng = np.random.default_rng(seed)
    low = rng.uniform(-20, 60, (count, 2))
    return np.concatenate([low, low + rng.uniform(1, 50, (count, 2))], 1).astype(np.float32)


def slow(kind, a, b):
    a, b = [float(v) for v in a], [float(v) for v in b]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    value = width * height / union
    hull = (max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1]))
    if kind == "giou":
        return value - (hull[0] * hull[1] - union) / (hull[0] * hull[1])
    if kind == "iou":
        return value
    apart = math.hypot((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    away = apart**2 / (hull[0] ** 2 + hull[1] ** 2)
    if kind == "diou":
        return value - away
    v = math.atan((a[2] - a[0]) / (a[3] - a[1])) - math.atan((b[2] - b[0]) / (b[3] - b[1]))
    v = 4 / math.pi**2 * v**2
    return value - away - v * v / (1 - value + v)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_overlaps(kind):
    a, b = some_boxes(0, 7), some_boxes(1, 5)
    expected = [[slow(kind, p, q) for q in b] for p in a]
    function = getattr(boxes, kind)
    pairwise, rows = jax.jit(function), jax.jit(jax.vmap(function))
    np.testing.assert_allclose(pairwise(a, b), expected, atol=2e-6)  # float32
    batched = rows(np.stack([a, a + 3]), np.stack([b, b + 3]))
    np.testing.assert_allclose(batched, pairwise(np.stack([a, a]), np.stack([b, b])), atol=1e-5)
    assert pairwise(a[:0], b).shape == (0, 5)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_degenerate_boxes_give_nothing_and_finite_gradients(kind):
    odd = np.array(
        [[3, 3, 3, 3], [3, 3, 3, 9], [5, 5, 2, 2], [0, 0, 10, 10], [0, 0, 1e-30, 1e-30],
         [-3e38, -3e38, 3e38, 3e38], [1e30, 0, 1e30, 5]], np.float32
    )  # fmt: skip
    pairwise = getattr(boxes, kind)
    total = jax.value_and_grad(lambda a, b: _sum(pairwise(a, b)), (0, 1), has_aux=True)
    (_, value), gradients = jax.device_get(jax.jit(total)(odd, odd))
    assert np.isfinite(value).all()
    if kind == "iou":
        assert (value[[0, 1, 2, 4, 6]] == 0).all()
        assert value[3, 3] == 1 and value[5, 5] == 1
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def _sum(values):
    return values.sum(), values


def test_alpha_of_ciou_has_no_gradient():
    a, b = np.float32([2, 3, 12, 9]), np.float32([4, 1, 11, 13])

    @jax.jit
    def both(a):
        angle = lambda box: jnp.arctan2(box[2] - box[0], box[3] - box[1])  # noqa: E731
        v = lambda a: 4 / math.pi**2 * (angle(a) - angle(b)) ** 2  # noqa: E731
        alpha = v(a) / (1 - boxes.paired_iou(a, b) + v(a))
        by_hand = lambda x: boxes.paired_diou(x, b) - alpha * v(x)  # noqa: E731
        return jax.grad(boxes.paired_ciou)(a, b), jax.grad(by_hand)(a)

    np.testing.assert_allclose(*both(a), rtol=1e-4, atol=1e-6)


def test_crowd_area_and_clip():
    a = np.array([[0, 0, 10, 10], [5, 5, 5, 5]], np.float32)
    crowd = np.array([[0, 0, 100, 5]], np.float32)
    outside = np.array([[-5, 2, 30, 40], [50, 50, 60, 60]])
    overlap, area, out = jax.jit(
        lambda a, crowd, outside: (
            boxes.crowd_iou(a, crowd), boxes.area(a), boxes.clip(outside, height=20, width=25)
        )
    )(a, crowd, outside)  # fmt: skip
    np.testing.assert_array_equal(overlap, [[0.5], [0.0]])
    np.testing.assert_array_equal(area, [100, 0])
    np.testing.assert_array_equal(out, [[0, 2, 25, 20], [25, 20, 25, 20]])


def test_conversions():
    box = np.array([[2, 3, 10, 7]], np.float32)

    @jax.jit
    def run(box):
        xywh, cxcywh = boxes.xyxy_to_xywh(box), boxes.xyxy_to_cxcywh(box)
        relative = boxes.to_relative(box, height=10, width=20)
        there = xywh, cxcywh, boxes.xyxy_to_yxyx(box), relative
        back = (
            boxes.xywh_to_xyxy(xywh), boxes.cxcywh_to_xyxy(cxcywh),
            boxes.to_absolute(relative, 10, 20),
        )  # fmt: skip
        return there, back

    (xywh, cxcywh, yxyx, relative), back = run(box)
    np.testing.assert_array_equal(xywh, [[2, 3, 8, 4]])
    np.testing.assert_array_equal(cxcywh, [[6, 5, 8, 4]])
    np.testing.assert_array_equal(yxyx, [[3, 2, 7, 10]])
    np.testing.assert_array_equal(back[0], box)
    np.testing.assert_array_equal(back[1], box)
    np.testing.assert_allclose(relative, [[0.1, 0.3, 0.5, 0.7]], rtol=1e-6)
    np.testing.assert_allclose(back[2], box, rtol=1e-6)


def test_coders_are_inverses():
    box, anchor = some_boxes(0, 9), some_boxes(1, 9)
    weights, points = (10.0, 10.0, 5.0, 5.0), anchor[:, :2]

    @jax.jit
    def run(box, anchor, points):
        code = coders.encode_deltas(box, anchor, weights)
        distances = coders.encode_distances(box, points, 8.0)
        boxes = coders.decode_deltas(code, anchor, weights)
        return code, boxes, distances, coders.decode_distances(distances, points, 8.0)

    code, of_code, distances, of_distances = jax.device_get(run(box, anchor, points))
    width, height = anchor[0, 2] - anchor[0, 0], anchor[0, 3] - anchor[0, 1]
    x = (box[0, 0] + box[0, 2] - anchor[0, 0] - anchor[0, 2]) / 2
    np.testing.assert_allclose(code[0, 0], 10 * x / width, rtol=1e-5)
    tall = 5 * math.log((box[0, 3] - box[0, 1]) / height)
    np.testing.assert_allclose(code[0, 3], tall, rtol=1e-5)
    np.testing.assert_allclose(of_code, box, atol=1e-4)
    np.testing.assert_allclose(distances[:, 0] * 8, points[:, 0] - box[:, 0], atol=1e-5)
    np.testing.assert_allclose(of_distances, box, atol=1e-4)


def test_deltas_are_clamped_above_only():
    anchor, delta = np.float32([[0, 0, 16, 16]]), np.float32([[0, 0, 100, -100]])
    wide = np.asarray(jax.jit(coders.decode_deltas)(delta, anchor))[0]
    np.testing.assert_allclose(wide[2] - wide[0], 1000, rtol=1e-6)
    assert wide[3] - wide[1] == 0
    flat = np.zeros((1, 4), np.float32)
    slope = jax.grad(lambda b: coders.encode_deltas(b, anchor).sum())
    code, gradient = jax.jit(lambda flat: (coders.encode_deltas(flat, flat), slope(flat)))(flat)
    assert np.isfinite(code).all() and np.isfinite(gradient).all()


def test_anchors_as_torchvision_makes_them():
    # AnchorGenerator(((32,),), ((0.5, 1.0, 2.0),)): the documented rounding of its cell anchors.
    cell = anchors.cell_anchors((32,), (0.5, 1.0, 2.0), rounded=True)
    np.testing.assert_array_equal(
        cell, [[-23, -11, 23, 11], [-16] * 2 + [16] * 2, [-11, -23, 11, 23]]
    )
    grid = anchors.grid_anchors(2, 3, 8, (32, 40), offset=0, rounded=True)
    assert grid.shape == (2 * 3 * 6, 4)
    cell = anchors.cell_anchors((32, 40), (0.5, 1.0, 2.0), rounded=True)
    np.testing.assert_array_equal(grid[6 * 5 : 6 * 6], cell + np.array([16, 8, 16, 8]))
    middle = anchors.grid_points(2, 3, 8, offset=0.5)
    np.testing.assert_array_equal(middle, [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]])
    with pytest.raises(InputError, match="offset"):
        anchors.grid_points(2, 3, 8, offset=1)
