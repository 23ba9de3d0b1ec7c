"""Anchors, boxes, matching and selection against slow loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection import geometry


def boxes_of(rng, *shape, size=50.0):
    corner = rng.uniform(-5, size, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 30, (*shape, 2))], -1).astype(np.float32)


def slow_iou(a, b):
    a, b = np.float64(a), np.float64(b)
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    area = lambda x: max(x[2] - x[0], 0) * max(x[3] - x[1], 0)  # noqa: E731
    either = area(a) + area(b) - sides.prod()
    return sides.prod() / either if either else 0.0


def slow_giou(a, b):
    a, b = np.float64(a), np.float64(b)
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    either = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod()
    hull = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    return slow_iou(a, b) - (hull - either) / hull


def test_anchors_stand_in_the_order_level_row_column_ratio_octave():
    found = geometry.anchors([(2, 3), (1, 2)], [8, 16], 4.0, 2, (0.5, 2.0), 0.5)
    expected = [
        [(x + 0.5) * s - w / 2, (y + 0.5) * s - h / 2, (x + 0.5) * s + w / 2, (y + 0.5) * s + h / 2]
        for s, rows, columns in ((8, 2, 3), (16, 1, 2))
        for y in range(rows)
        for x in range(columns)
        for ratio in (0.5, 2.0)
        for side in (4 * s, 4 * s * 2**0.5)
        for h, w in [(side * ratio**0.5, side / ratio**0.5)]
    ]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    corner = geometry.anchors([(1, 1)], [8], 4.0, 1, (1.0,), offset=0.0)
    np.testing.assert_array_equal(corner, [[-16, -16, 16, 16]])


def test_iou_and_giou_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    a, b = boxes_of(rng, 20), boxes_of(rng, 30)
    b[0], b[1], b[2] = a[0], [3, 3, 3, 9], [-900, -900, -890, -899]
    expected = [[slow_iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(geometry.iou_matrix(a, b), expected, rtol=1e-5, atol=1e-7)
    keep = [i for i in range(20) if i != 1]
    expected = [slow_giou(a[i], b[i]) for i in keep]
    np.testing.assert_allclose(geometry.giou(a, b[:20])[np.array(keep)], expected, rtol=1e-4,
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    "a, b, value",
    [
        ([2, 2, 5, 5], [2, 2, 5, 5], 1.0),
        ([2, 2, 2, 2], [2, 2, 2, 2], 0.0),
        ([2, 2, 2, 2], [1, 1, 4, 4], 0.0),
        ([0, 0, 1, 1], [9, 9, 10, 10], -0.98),
        ([0, 0, 1, 1], [1, 0, 2, 1], 0.0),
    ],
)
def test_giou_and_its_gradient_at_the_edges(a, b, value):
    a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
    found, gradient = jax.value_and_grad(geometry.giou)(a, b)
    np.testing.assert_allclose(found, value, atol=1e-6)
    assert np.isfinite(gradient).all()


def test_the_gradient_of_giou_is_that_of_differences():
    rng = np.random.default_rng(1)
    a, b = boxes_of(rng, 10, size=20.0), boxes_of(rng, 10, size=20.0)
    found = jax.grad(lambda x: geometry.giou(x, b).sum())(jnp.asarray(a))
    for i in range(10):
        for j in range(4):
            step = np.eye(4)[j] * 1e-5
            slope = (slow_giou(a[i] + step, b[i]) - slow_giou(a[i] - step, b[i])) / 2e-5
            np.testing.assert_allclose(found[i, j], slope, rtol=1e-3, atol=1e-5)


def test_decoding_what_was_encoded_gives_it_back():
    rng = np.random.default_rng(2)
    boxes, anchors = boxes_of(rng, 50), boxes_of(rng, 50)
    found = geometry.decode(geometry.encode(boxes, anchors), anchors)
    np.testing.assert_allclose(found, boxes, atol=1e-4)  # float32 at some 100 pixels
    # By hand: an anchor of 10 x 20 at (5, 10), a box of 20 x 10 at (10, 15).
    steps = geometry.encode(jnp.array([0.0, 10, 20, 20]), jnp.array([0.0, 0, 10, 20]))
    np.testing.assert_allclose(steps, [0.5, 0.25, np.log(2), -np.log(2)], rtol=1e-6)
    wide = geometry.decode(jnp.array([0.0, 0, 100, 100]), jnp.array([-1.0, -1, 1, 1]))
    np.testing.assert_allclose(wide, [-62.5, -62.5, 62.5, 62.5], rtol=1e-5)


def test_matching_follows_the_rules_one_anchor_after_the_other():
    rng = np.random.default_rng(3)
    anchors = geometry.anchors([(6, 7)], [8], 2.0, 2, (1.0, 2.0))
    for n in range(6):
        boxes = boxes_of(rng, 6)
        boxes[0] = boxes[1]  # a tie: the first has it
        if n == 5:
            boxes[2] = -500, -500, -400, -400  # overlaps nothing: it makes no anchor positive
        valid = np.arange(6) < n + 1
        matched, is_positive, is_negative = geometry.match(boxes, valid, anchors, 0.5, 0.4)
        iou = np.asarray(geometry.iou_matrix(boxes, anchors))[: n + 1]
        for i in range(len(anchors)):
            best = iou[:, i].max()
            is_best = any(iou[j, i] == iou[j].max() > 0 for j in range(n + 1))
            assert is_positive[i] == (best >= 0.5 or is_best)
            assert is_negative[i] == (best < 0.4 and not is_best)
            assert not is_positive[i] or matched[i] == iou[:, i].argmax()
    _, is_positive, is_negative = geometry.match(boxes, np.zeros(6, bool), anchors, 0.5, 0.4)
    assert not is_positive.any() and is_negative.all()


def test_focal_loss_is_that_of_the_definition_and_finite():
    x = np.linspace(-8, 8, 33)
    for target in (0, 1):
        p = 1 / (1 + np.exp(-x))
        p_t, alpha = (p, 0.25) if target else (1 - p, 0.75)
        expected = -alpha * (1 - p_t) ** 2 * np.log(p_t)
        found = geometry.sigmoid_focal(jnp.asarray(x, jnp.float32), jnp.full(33, target))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        for logit in (-100.0, 100.0, -1e30, 1e30):
            value, slope = jax.value_and_grad(geometry.sigmoid_focal)(logit, target)
            assert np.isfinite(value) and np.isfinite(slope)
    np.testing.assert_allclose(geometry.sigmoid_focal(-100.0, 1), 25.0)


def slow_select(boxes, scores, candidates, score, iou, size):
    """Detections, one after the other."""
    flat = sorted(
        ((-s, i * scores.shape[1] + k) for i, row in enumerate(scores) for k, s in enumerate(row)),
    )[:candidates]
    found = []
    for minus, index in flat:
        box = np.clip(boxes[index // scores.shape[1]], 0, [size[1], size[0], size[1], size[0]])
        label = index % scores.shape[1]
        if -minus <= score or box[2] <= box[0] or box[3] <= box[1]:
            continue
        if all(other != label or slow_iou(box, b) <= iou for b, _, other in found):
            found.append((box, -minus, label))
    return found


@pytest.mark.parametrize("candidates, outputs", [(60, 12), (25, 30), (1000, 5)])
def test_selection_is_that_of_the_slow_one(candidates, outputs):
    size, rng = (40, 50), np.random.default_rng(4)
    select = jax.jit(lambda boxes, scores: geometry.select(
        boxes, scores, candidates=candidates, score=0.3, iou=0.4, outputs=outputs, size=size,
    ))  # fmt: skip
    for _ in range(5):
        boxes = boxes_of(rng, 40, size=30.0)
        boxes[3], boxes[5] = boxes[4], [60, 60, 70, 70]
        scores = np.round(rng.uniform(size=(40, 3)), 1).astype(np.float32)  # many ties
        scores[scores == np.float32(0.3)] = 0.29  # the slow one compares in other precision
        found = select(boxes, scores)
        expected = slow_select(boxes, scores, candidates, 0.3, 0.4, size)[:outputs]
        n = len(expected)
        np.testing.assert_array_equal(found["detected"], np.arange(outputs) < n)
        for name, column in zip(("boxes", "scores", "labels"), zip(*expected, strict=True),
                                strict=True):  # fmt: skip
            np.testing.assert_array_equal(found[name][:n], column)
            assert not found[name][n:].any()


def test_touching_overlap_is_kept_and_other_classes_do_not_rival():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]], np.float32)
    scores = np.array([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]], np.float32)
    found = geometry.select(
        boxes, scores, candidates=6, score=0.1, iou=0.5, outputs=3, size=(20, 20)
    )
    # The IoU of the first two is 0.5, which is not more than 0.5.
    np.testing.assert_array_equal(found["labels"], [0, 0, 1])
    assert found["detected"].all()
