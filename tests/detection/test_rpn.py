"""Region proposals and the losses of their network, one after the other in NumPy."""

import jax
import numpy as np
import pytest

from cvjax.detection.boxes import iou as iou_matrix
from cvjax.detection.rpn import RPN, RPNHead

SIZE, STRIDES = (40, 52), (4, 8, 16)
MODEL = RPN(
    RPNHead(2, 8), scale=3.0, ratios=(0.5, 2.0), samples=40, candidates=30, proposals=25, iou=0.5,
    min_size=2.0,
)  # fmt: skip
COUNTS = (2 * 10 * 13, 2 * 5 * 7, 2 * 3 * 4)


def iou(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inside = np.prod(np.maximum(high - low, 0))
    return inside / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inside)


def decoded(anchor, delta):
    (x1, y1, x2, y2), (dx, dy, dw, dh) = np.float64(anchor), np.float64(delta)
    w, h = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
    w, h = w * np.exp(min(dw, np.log(62.5))), h * np.exp(min(dh, np.log(62.5)))
    box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return np.clip(box, 0, [SIZE[1], SIZE[0]] * 2)


@pytest.fixture(scope="module")
def outputs():
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=(2, sum(COUNTS))).astype(np.float32),
        "deltas": rng.normal(size=(2, sum(COUNTS), 4), scale=0.7).astype(np.float32),
    }


def test_the_anchors_are_those_of_torchvision_where_it_is_asked():
    model = RPN(RPNHead(), offset=0, rounded=True)
    first, second = model.anchors((64, 96), (4, 8))
    # AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2) of torchvision 0.29.
    np.testing.assert_array_equal(first[:3], [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]])  # fmt: skip # noqa: E501
    np.testing.assert_array_equal(first[3] - first[0], [4, 0, 4, 0])
    np.testing.assert_array_equal(first[3 * 24] - first[0], [0, 4, 0, 4])
    np.testing.assert_array_equal(second[1], [-32, -32, 32, 32])
    assert first.shape == (3 * 16 * 24, 4) and second.shape == (3 * 8 * 12, 4)


def test_proposals_are_those_of_the_slow_loop(outputs):
    outputs = {name: x.copy() for name, x in outputs.items()}
    outputs["deltas"][0, : COUNTS[0] : 3, 2:] = -6  # Some are tiny and
    outputs["deltas"][1, 5::7, :2] = 40  # some beside the image: dropped.
    boxes, valid = jax.jit(lambda o: MODEL.propose(o, SIZE, STRIDES))(outputs)
    assert boxes.shape == (2, 25, 4) and boxes.dtype == np.float32
    anchors = np.split(np.concatenate(MODEL.anchors(SIZE, STRIDES)), np.cumsum(COUNTS)[:-1])
    dropped = 0
    for image in range(2):
        kept = []
        logits = np.split(outputs["logits"][image], np.cumsum(COUNTS)[:-1])
        deltas = np.split(outputs["deltas"][image], np.cumsum(COUNTS)[:-1])
        for level in range(3):
            best = np.argsort(-logits[level])[:30]
            alive = []
            for row in best:
                box = decoded(anchors[level][row], deltas[level][row])
                if min(box[2:] - box[:2]) < 2:
                    dropped += 1
                elif not any(iou(box, other) > 0.5 for _, other in alive):
                    alive.append((logits[level][row], box))
            kept += alive
        kept = [box for _, box in sorted(kept, key=lambda one: -one[0])][:25]
        assert valid[image].sum() == len(kept)
        np.testing.assert_allclose(boxes[image][: len(kept)], kept, atol=1e-3)
        np.testing.assert_array_equal(boxes[image][len(kept) :], 0)
    assert dropped > 10


def test_no_gradient_through_proposals_and_huge_logits_are_fine(outputs):
    huge = {name: np.where(x > 0, 100, -100).astype(np.float32) for name, x in outputs.items()}

    def total(outputs):
        boxes, _ = MODEL.propose(outputs, SIZE, STRIDES)
        return boxes.sum(), boxes

    gradient, boxes = jax.jit(jax.grad(total, has_aux=True))(huge)
    assert np.isfinite(boxes).all()
    assert (boxes >= 0).all() and (boxes <= np.array([52, 40, 52, 40])).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_samples_and_losses_are_those_of_the_slow_loop(outputs):
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 25, (2, 3, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 20, (2, 3, 2))], -1).astype(np.float32)
    truth = {"boxes": boxes, "box_valid": np.array([[1, 1, 0], [0, 0, 0]], bool)}

    @jax.jit
    def run(outputs):
        samples = MODEL.sample(jax.random.key(3), truth, SIZE, STRIDES)
        return samples, jax.vmap(MODEL.losses)(outputs, samples, truth)

    samples, losses = jax.tree.map(np.asarray, run(outputs))
    anchors = np.concatenate(MODEL.anchors(SIZE, STRIDES))
    assert samples.rows.shape == (2, 40)
    objects = 0
    for image in range(2):
        real = boxes[image][truth["box_valid"][image]]
        overlap = (
            np.asarray(iou_matrix(real, anchors)) if len(real) else np.zeros((1, len(anchors)))
        )
        objectness = steps = 0
        rows = samples.rows[image]
        assert samples.valid[image].all() and len(set(rows)) == 40
        for slot, row in enumerate(rows):
            best = overlap[:, row].max()
            positive = best >= 0.7 or any(o[row] == o.max() > 0 for o in overlap)
            assert positive == samples.foreground[image, slot] and (positive or best < 0.3)
            p = 1 / (1 + np.exp(-np.float64(outputs["logits"][image, row])))
            objectness -= np.log(p if positive else 1 - p)
            if positive:
                objects += 1
                matched = overlap[:, row].argmax()
                assert matched == samples.index[image, slot]
                (x1, y1, x2, y2), (u1, v1, u2, v2) = np.float64(anchors[row]), real[matched]
                w, h = x2 - x1, y2 - y1
                target = [((u1 + u2) - (x1 + x2)) / 2 / w, ((v1 + v2) - (y1 + y2)) / 2 / h,
                          np.log((u2 - u1) / w), np.log((v2 - v1) / h)]  # fmt: skip
                away = np.abs(target - outputs["deltas"][image, row])
                steps += np.where(away < 1 / 9, away**2 * 9 / 2, away - 1 / 18).sum()
        for name, expected in (("rpn_objectness", objectness), ("rpn_box", steps)):
            np.testing.assert_allclose(losses[name][0][image], expected, rtol=1e-4)
            assert losses[name][1][image] == 40
    assert objects >= 2
