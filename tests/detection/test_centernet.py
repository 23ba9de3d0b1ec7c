"""CenterNet: heat maps and losses by a slow loop, truth in and out."""

import jax
import numpy as np
import pytest

from cvjax.detection.centernet import CenterNet, CenterNetHead, heat_loss
from cvjax.detection.heatmaps import gaussian_radius
from cvjax.errors import InputError
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.resnet import ResNet

ENCODER = Pyramid(ResNet(stage_sizes=(1, 1)), FPN(8))  # the finest stride is 4
SIZE, CLASSES = (38, 50), 3
HEIGHT, WIDTH = 10, 13


def truth_of():
    boxes = np.zeros((3, 3, 4), np.float32)
    boxes[0] = [1, 2, 12, 15], [20, 4, 45, 37], [15, 20, 80, 90]
    boxes[1, 0] = 3, 3, 11, 30
    return {
        "boxes": boxes,
        "box_label": np.array([[0, 2, 2], [1, 0, 0], [0, 0, 0]]),
        "box_valid": np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool),
        "valid": np.ones(3, bool),
    }


def slow_objects(truth, i):
    """(label, centre, sides in cells) of the objects of an image, clipped to it."""
    for box, label, valid in zip(*(truth[k][i] for k in ("boxes", "box_label", "box_valid")),
                                 strict=True):  # fmt: skip
        if valid:
            x1, y1, x2, y2 = np.clip(np.float64(box), 0, [SIZE[1], SIZE[0]] * 2) / 4
            yield label, np.array([(x1 + x2) / 2, (y1 + y2) / 2]), np.array([x2 - x1, y2 - y1])


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_losses_are_those_of_the_slow_loop(normalizer):
    model = CenterNet(ENCODER, CenterNetHead(CLASSES), normalizer=normalizer)
    truth, rng = truth_of(), np.random.default_rng(0)
    shape = (3, HEIGHT, WIDTH)
    outputs = {
        "heat": rng.normal(size=(*shape, CLASSES)).astype(np.float32),
        "size": rng.normal(size=(*shape, 2)).astype(np.float32),
        "offset": rng.normal(size=(*shape, 2)).astype(np.float32),
    }
    sums, counts = np.zeros((3, 3)), np.zeros(3)
    for i in range(3):
        target = np.zeros((HEIGHT, WIDTH, CLASSES))
        for label, centre, sides in slow_objects(truth, i):
            x, y = np.floor(centre).astype(int)
            reach = int(gaussian_radius(sides[1], sides[0], 0.7))
            sigma = (2 * reach + 1) / 6
            for v in range(max(0, y - reach), min(HEIGHT, y + reach + 1)):
                for u in range(max(0, x - reach), min(WIDTH, x + reach + 1)):
                    heat = np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * sigma**2))
                    target[v, u, label] = max(target[v, u, label], heat)
            sums[i, 1] += np.abs(outputs["offset"][i, y, x] - (centre - [x, y])).sum()
            sums[i, 2] += np.abs(outputs["size"][i, y, x] - sides).sum()
            counts[i] += 1
        p = 1 / (1 + np.exp(-np.float64(outputs["heat"][i])))
        away = (1 - target) ** 4 * p**2 * np.log(1 - p)
        sums[i, 0] = -np.where(target == 1, (1 - p) ** 2 * np.log(p), away).sum()
    if normalizer == "batch":
        expected = sums.sum(0) / counts.sum()
    else:
        expected = (sums / np.maximum(counts, 1)[:, None]).mean(0)
    found = jax.jit(lambda o: model.losses(o, truth, SIZE))(outputs)
    names = ["heat", "offset", "size"]
    np.testing.assert_allclose([found[name] for name in names], expected, rtol=1e-4)


def test_the_encoded_truth_is_detected_and_costs_nothing():
    model = CenterNet(ENCODER, CenterNetHead(CLASSES), outputs=5, score=0.5)
    truth = truth_of()
    outputs = {
        "heat": np.full((3, HEIGHT, WIDTH, CLASSES), -40, np.float32),
        "size": np.zeros((3, HEIGHT, WIDTH, 2), np.float32),
        "offset": np.zeros((3, HEIGHT, WIDTH, 2), np.float32),
    }
    for i in range(3):
        for label, centre, sides in slow_objects(truth, i):
            x, y = np.floor(centre).astype(int)
            outputs["heat"][i, y, x, label] = 40
            outputs["offset"][i, y, x], outputs["size"][i, y, x] = centre - [x, y], sides
    losses, found = jax.jit(
        lambda outputs: (model.losses(outputs, truth, SIZE), model.detections(outputs, SIZE))
    )(outputs)
    np.testing.assert_allclose(list(losses.values()), 0, atol=1e-5)
    for i in range(3):
        rows = np.asarray(found["detected"][i])
        ours = [(label, *box) for label, box in zip(np.asarray(found["labels"][i])[rows],
                np.asarray(found["boxes"][i])[rows], strict=True)]  # fmt: skip
        expected = [(label, *(4 * (c - s / 2)), *(4 * (c + s / 2)))
                    for label, c, s in slow_objects(truth, i)]  # fmt: skip
        assert len(ours) == len(expected)
        np.testing.assert_allclose(np.array(sorted(ours)), np.array(sorted(expected)), atol=1e-4)


def test_only_peaks_are_detected():
    model = CenterNet(ENCODER, CenterNetHead(CLASSES), outputs=9)
    heat = np.full((1, HEIGHT, WIDTH, CLASSES), -40, np.float32)
    heat[0, 4, 5:8, 1] = 1, 2, 1.5
    heat[0, 5, 6, 2] = 0.5  # a neighbour, but of another class
    outputs = {"heat": heat, "size": np.full((1, HEIGHT, WIDTH, 2), 2.0),
               "offset": np.zeros((1, HEIGHT, WIDTH, 2))}  # fmt: skip
    found = jax.jit(lambda outputs: model.detections(outputs, SIZE))(outputs)
    assert found["detected"].sum() == 2
    np.testing.assert_array_equal(found["labels"][0, :2], [1, 2])
    np.testing.assert_array_equal(found["boxes"][0, :2], [[20, 12, 28, 20], [20, 16, 28, 24]])


def test_the_heat_loss_and_its_gradient_are_finite_for_huge_logits():
    for logit in (-100.0, 100.0, -1e30, 1e30):
        for target in (0.0, 0.5, 1.0):
            value, slope = jax.value_and_grad(heat_loss)(logit, target)
            assert np.isfinite(value) and np.isfinite(slope)
    with pytest.raises(InputError, match="normalizer is 'epoch'"):
        CenterNet(ENCODER, CenterNetHead(3), normalizer="epoch")


@pytest.mark.parametrize("overlap", [2.0, -1.0])
def test_an_overlap_is_a_share(overlap):
    with pytest.raises(InputError, match=f"overlap is {overlap}; it must be in"):
        CenterNet(ENCODER, CenterNetHead(CLASSES), overlap=overlap)
