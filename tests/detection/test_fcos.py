"""FCOS: assignment and losses by a slow loop, and the truth encoded gives the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection import assigners
from cvjax.detection.fcos import FCOS, FCOSHead, boxes_of
from cvjax.errors import InputError
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.resnet import ResNet

ENCODER = Pyramid(ResNet(stage_sizes=(1, 1)), FPN(8, "pool", 1))  # strides 4, 8, 16
SIZE, CLASSES = (40, 52), 3


def truth_of(seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (3, 4, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(6, 30, (3, 4, 2))], -1)
    boxes[0, 1] = boxes[0, 0]  # twins: the first has all places
    valid = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    return {
        "boxes": np.where(valid[..., None], boxes, 0).astype(np.float32),
        "box_label": rng.integers(CLASSES, size=(3, 4), dtype=np.int32),
        "box_valid": valid,
        "valid": np.ones(3, bool),
    }


def slow_assign(boxes, reach, radius):
    """(level, point, row of the box or None), place after place."""
    for level, (stride, rows, columns) in enumerate(((4, 10, 13), (8, 5, 7), (16, 3, 4))):
        low = reach * stride / 2 if level else 0
        high = reach * stride if level < 2 else np.inf
        for y in range(rows):
            for x in range(columns):
                px, py = (x + 0.5) * stride, (y + 0.5) * stride
                best = None
                for row, (x1, y1, x2, y2) in enumerate(np.float64(boxes)):
                    sides = px - x1, py - y1, x2 - px, y2 - py
                    near = max(abs(px - (x1 + x2) / 2), abs(py - (y1 + y2) / 2)) < radius * stride
                    area = (x2 - x1) * (y2 - y1)
                    fits = min(sides) > 0 and near and low <= max(sides) <= high
                    if fits and (best is None or area < best[1]):
                        best = row, area
                yield stride, (px, py), None if best is None else best[0]


@functools.partial(jax.jit, static_argnames="radius")
def assign(boxes, valid, points, strides, ranges, radius):
    return assigners.fcos(points, boxes, valid, ranges, strides[:, 0], radius=radius)


@pytest.mark.parametrize("reach, radius", [(2.0, 1.5), (4.0, 0.6), (4.0, 100.0)])
def test_places_and_boxes_meet_as_in_the_slow_loop(reach, radius):
    model = FCOS(ENCODER, FCOSHead(CLASSES), reach=reach, radius=radius)
    points, strides, ranges = map(np.asarray, model.places(SIZE))
    truth, seen = truth_of(), 0
    for boxes, valid in zip(truth["boxes"], truth["box_valid"], strict=True):
        found = assign(boxes, valid, points, strides, ranges, radius)
        matched, positive = np.asarray(found.index), np.asarray(found.foreground)
        for i, (stride, point, row) in enumerate(slow_assign(boxes[valid], reach, radius)):
            assert strides[i] == stride and tuple(points[i].tolist()) == point
            assert positive[i] == (row is not None)
            assert row is None or matched[i] == row
            seen += row is not None
        assert len(points) == i + 1
    assert seen > 1


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_losses_are_those_of_the_slow_loop(normalizer):
    model = FCOS(ENCODER, FCOSHead(CLASSES), reach=3.0, normalizer=normalizer)
    truth, rng = truth_of(), np.random.default_rng(1)
    places = 10 * 13 + 5 * 7 + 3 * 4
    outputs = {
        "logits": rng.normal(size=(3, places, CLASSES)).astype(np.float32),
        "distances": rng.normal(size=(3, places, 4)).astype(np.float32),
        "centerness": rng.normal(size=(3, places, 1)).astype(np.float32),
    }
    sums, counts = np.zeros((3, 3)), np.zeros(3)
    for i in range(3):
        boxes = truth["boxes"][i][truth["box_valid"][i]]
        for p, (stride, (x, y), row) in enumerate(slow_assign(boxes, 3.0, 1.5)):
            target = np.zeros(CLASSES)
            if row is not None:
                target[truth["box_label"][i, row]] = 1
                counts[i] += 1
                x1, y1, x2, y2 = np.float64(boxes[row])
                l, t, r, b = np.exp(np.float64(outputs["distances"][i, p])) * stride  # noqa: E741
                u1, v1, u2, v2 = x - l, y - t, x + r, y + b
                both = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
                either = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - both
                hull = (max(x2, u2) - min(x1, u1)) * (max(y2, v2) - min(y1, v1))
                sums[i, 1] += 1 - (both / either - (hull - either) / hull)
                across = min(x - x1, x2 - x) / max(x - x1, x2 - x)
                along = min(y - y1, y2 - y) / max(y - y1, y2 - y)
                center, logit = np.sqrt(across * along), np.float64(outputs["centerness"][i, p, 0])
                sums[i, 2] += np.log1p(np.exp(logit)) - center * logit
            q = 1 / (1 + np.exp(-np.float64(outputs["logits"][i, p])))
            p_t = np.where(target, q, 1 - q)
            focal = np.where(target, -0.25, -0.75) * (1 - p_t) ** 2 * np.log(p_t)
            sums[i, 0] += focal.sum()
    assert counts[0] > 4 and counts[1] > 2 and counts[2] == 0
    if normalizer == "batch":
        expected = sums.sum(0) / counts.sum()
    else:
        expected = (sums / np.maximum(counts, 1)[:, None]).mean(0)
    found = jax.jit(lambda o: model.losses(o, truth, SIZE))(outputs)
    names = ["classification", "box", "centerness"]
    assert set(found) == set(names)
    np.testing.assert_allclose([found[name] for name in names], expected, rtol=1e-4)


def test_the_encoded_truth_is_detected():
    model = FCOS(ENCODER, FCOSHead(CLASSES), reach=3.0, score=0.5)
    points, strides, ranges = model.places(SIZE)
    truth = {
        "boxes": np.array([[[1, 2, 12, 15], [20, 4, 45, 38], [3, 20, 70, 39]]], np.float32),
        "box_label": np.array([[0, 1, 2]]),
        "box_valid": np.ones((1, 3), bool),
        "valid": np.ones(1, bool),
    }
    matched, positive, _ = map(
        np.asarray, assign(truth["boxes"][0], np.ones(3, bool), points, strides, ranges, 1.5)
    )
    assert set(matched[positive].tolist()) == {0, 1, 2}
    boxes = truth["boxes"][0][matched]
    sides = np.concatenate([points - boxes[:, :2], boxes[:, 2:] - points], axis=-1) / strides
    distances = np.log(np.where(positive[:, None], sides, 1.0))
    logits = np.full((1, len(points), CLASSES), -50.0, np.float32)
    logits[0, positive, matched[positive]] = 50.0
    outputs = {"logits": logits, "distances": distances[None],
               "centerness": np.full((1, len(points), 1), 50.0)}  # fmt: skip
    losses, found = jax.jit(
        lambda outputs: (model.losses(outputs, truth, SIZE), model.detections(outputs, SIZE))
    )(outputs)
    assert losses["classification"] < 1e-5 and abs(losses["box"]) < 1e-4
    rows = np.asarray(found["detected"][0])
    order = np.argsort(found["labels"][0][rows])
    assert rows.sum() == 3
    limits = np.array([SIZE[1], SIZE[0]] * 2)
    expected = np.minimum(truth["boxes"][0], limits)
    np.testing.assert_allclose(found["boxes"][0][rows][order], expected, atol=1e-3)
    np.testing.assert_allclose(found["scores"][0][rows], 1.0, rtol=1e-6)


def test_the_score_is_the_geometric_mean_of_class_and_centerness():
    model = FCOS(ENCODER, FCOSHead(CLASSES), outputs=2)
    places = 10 * 13 + 5 * 7 + 3 * 4
    logits = np.full((1, places, CLASSES), -50.0, np.float32)
    logits[0, 5, 1], center = 0.3, np.full((1, places, 1), -0.7)
    outputs = {"logits": logits, "distances": np.zeros((1, places, 4)), "centerness": center}
    found = jax.jit(lambda outputs: model.detections(outputs, SIZE))(outputs)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = np.sqrt(sigmoid(0.3) * sigmoid(-0.7))
    np.testing.assert_allclose(found["scores"][0], [expected, 0], rtol=1e-5)
    np.testing.assert_allclose(found["boxes"][0, 0], [18, 0, 26, 6])  # the place (22, 2), clipped


def test_distances_are_held_below_a_limit():
    found = boxes_of(jnp.array([[100.0, -100, 0, 0]]), jnp.array([[0.0, 0]]), jnp.array([[8.0]]))
    np.testing.assert_allclose(found, [[-500, 0, 8, 8]], rtol=1e-5, atol=1e-30)
    # Themselves in place of their logarithms, and none where they are negative.
    told = jnp.array([[1.5, -2, 0, 3]])
    found = boxes_of(told, jnp.array([[10.0, 20]]), jnp.array([[8.0]]), "relu")
    np.testing.assert_allclose(found, [[-2, 20, 10, 44]])


def test_the_number_of_parameters_is_that_of_torchvision():
    # fcos_resnet50_fpn with 91 classes: 32,269,600; its frozen norms have no parameters, and it
    # has not the paper's five scales.
    model = FCOS(
        Pyramid(ResNet(50), FPN(256, "pyramid", 2), ("stage2", "stage3", "stage4")), FCOSHead(91)
    )
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    norms, scales = 53_120, 5
    assert count - norms - scales == 32_269_600


def test_impossible_settings():
    with pytest.raises(InputError, match="normalizer is 'epoch'"):
        FCOS(ENCODER, FCOSHead(3), normalizer="epoch")
    for radius in (0.0, -1.0):
        with pytest.raises(InputError, match=f"radius is {radius}; it must be above 0"):
            FCOS(ENCODER, FCOSHead(3), radius=radius)
    with pytest.raises(InputError, match="distances is 'log'; it can be 'exp' or 'relu'"):
        FCOS(ENCODER, FCOSHead(3), distances="log")
