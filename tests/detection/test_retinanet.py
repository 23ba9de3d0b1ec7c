"""RetinaNet: the losses by a slow loop, perfect outputs, and the number of parameters."""

import functools

import jax
import numpy as np
import pytest

from cvjax.build import build
from cvjax.detection.assigners import atss, max_iou
from cvjax.detection.boxes import iou as iou_matrix
from cvjax.detection.coders import encode_deltas
from cvjax.detection.retinanet import RetinaNet, RetinaNetHead
from cvjax.errors import InputError
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.resnet import ResNet

ENCODER = Pyramid(ResNet(stage_sizes=(1, 1)), FPN(8, "pool", 1))  # strides 4, 8, 16
SIZE, CLASSES = (40, 52), 3
overlaps, encode = jax.jit(iou_matrix), jax.jit(encode_deltas)


def truth_of(seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (3, 4, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(6, 30, (3, 4, 2))], -1)
    valid = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    return {
        "boxes": np.where(valid[..., None], boxes, 0).astype(np.float32),
        "box_label": rng.integers(CLASSES, size=(3, 4), dtype=np.int32),
        "box_valid": valid,
        "valid": np.ones(3, bool),
    }


def test_anchors_stand_in_the_order_level_row_column_ratio_octave():
    model = RetinaNet(ENCODER, RetinaNetHead(3, 4), scale=3.0, octaves=2, ratios=(0.5, 2.0))
    expected = [
        [(x + 0.5) * s - w / 2, (y + 0.5) * s - h / 2, (x + 0.5) * s + w / 2, (y + 0.5) * s + h / 2]
        for s, rows, columns in ((4, 10, 13), (8, 5, 7), (16, 3, 4))
        for y in range(rows)
        for x in range(columns)
        for ratio in (0.5, 2.0)
        for side in (3 * s, 3 * s * 2**0.5)
        for h, w in [(side * ratio**0.5, side / ratio**0.5)]
    ]
    np.testing.assert_allclose(model.anchors(SIZE), expected, rtol=1e-5, atol=1e-4)
    rounded = RetinaNet(ENCODER, RetinaNetHead(3), scale=3.0, offset=0, rounded=True)
    np.testing.assert_array_equal(rounded.anchors(SIZE) % 1, 0)
    np.testing.assert_array_equal(rounded.anchors(SIZE)[3], [-6, -6, 6, 6])
    # 12 * 2 ** (1 / 3) = 15.12 counts as 15, which at the ratio 2 is 10.6 wide and 21.2 high.
    np.testing.assert_array_equal(rounded.anchors(SIZE)[7], [-5, -11, 5, 11])


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_losses_are_those_of_the_slow_loop(normalizer):
    model = RetinaNet(ENCODER, RetinaNetHead(CLASSES), scale=3.0, normalizer=normalizer)
    anchors, truth, rng = model.anchors(SIZE), truth_of(), np.random.default_rng(1)
    assert anchors.shape == (9 * (10 * 13 + 5 * 7 + 3 * 4), 4)
    outputs = {
        "logits": rng.normal(size=(3, len(anchors), CLASSES)).astype(np.float32),
        "deltas": rng.normal(size=(3, len(anchors), 4)).astype(np.float32),
    }
    sums, counts = [], []
    for i in range(3):
        boxes = truth["boxes"][i][truth["box_valid"][i]]
        iou = np.asarray(overlaps(boxes, anchors)) if len(boxes) else np.zeros((1, 1))
        focal = l1 = positives = 0
        for a in range(len(anchors)):
            best = iou[:, a].max() if len(boxes) else 0.0
            positive = best >= 0.5 or any(row[a] == row.max() > 0 for row in iou if len(boxes))
            if not positive and best >= 0.4:
                continue
            target = np.zeros(CLASSES)
            if positive:
                row = iou[:, a].argmax()
                target[truth["box_label"][i, row]] = 1
                (x1, y1, x2, y2), (u1, v1, u2, v2) = np.float64(anchors[a]), np.float64(boxes[row])
                w, h = x2 - x1, y2 - y1
                step = [((u1 + u2) - (x1 + x2)) / 2 / w, ((v1 + v2) - (y1 + y2)) / 2 / h,
                        np.log((u2 - u1) / w), np.log((v2 - v1) / h)]  # fmt: skip
                l1 += np.abs(step - outputs["deltas"][i, a]).sum()
                positives += 1
            p = 1 / (1 + np.exp(-np.float64(outputs["logits"][i, a])))
            p_t = np.where(target, p, 1 - p)
            focal += (np.where(target, -0.25, -0.75) * (1 - p_t) ** 2 * np.log(p_t)).sum()
        sums.append((focal, l1))
        counts.append(positives)
    sums, counts = np.array(sums), np.array(counts)
    assert counts[0] > 4 and counts[1] > 2 and counts[2] == 0
    if normalizer == "batch":
        expected = sums.sum(0) / counts.sum()
    else:
        expected = (sums / np.maximum(counts, 1)[:, None]).mean(0)
    found = jax.jit(lambda o: model.losses(o, truth, SIZE))(outputs)
    assert set(found) == {"classification", "box"}
    np.testing.assert_allclose([found["classification"], found["box"]], expected, rtol=1e-4)


def test_another_rule_assigns_the_anchors():
    """By ATSS; also by the name that a config gives it."""
    rule = dict(type="detection.assigners.atss", candidates=4)
    model = RetinaNet(
        ENCODER, RetinaNetHead(CLASSES), scale=3.0, normalizer="batch", assign=build(rule)
    )
    anchors, truth, rng = model.anchors(SIZE), truth_of(), np.random.default_rng(1)
    deltas = rng.normal(size=(3, len(anchors), 4)).astype(np.float32)
    outputs = {"logits": np.zeros((3, len(anchors), CLASSES), np.float32), "deltas": deltas}
    alone = jax.jit(lambda *truth: atss(anchors, *truth, (9 * 130, 9 * 35, 9 * 12), candidates=4))
    total = count = 0
    for boxes, valid, said in zip(truth["boxes"], truth["box_valid"], deltas, strict=True):
        index, there, _ = jax.device_get(alone(boxes, valid))
        steps = np.asarray(encode(boxes[index], anchors))[there]
        total, count = total + abs(said[there] - steps).sum(), count + there.sum()
    assert count > 2
    losses = jax.jit(model.losses, static_argnums=2)(outputs, truth, SIZE)
    np.testing.assert_allclose(losses["box"], total / count, rtol=1e-5)


def test_the_encoded_truth_is_detected_and_costs_nothing():
    model = RetinaNet(ENCODER, RetinaNetHead(CLASSES), scale=3.0, score=0.5)
    anchors, truth = model.anchors(SIZE), truth_of(3)
    assign = functools.partial(max_iou, foreground=0.5, background=0.4, low_quality=True)
    assign = jax.jit(assign)
    logits = np.full((3, len(anchors), CLASSES), -50.0, np.float32)
    deltas = np.zeros((3, len(anchors), 4), np.float32)
    for i in range(3):
        row = truth["boxes"][i], truth["box_valid"][i]
        matched, positive, _ = jax.device_get(assign(anchors, *row))
        boxes = np.where(positive[:, None], truth["boxes"][i][matched], anchors)
        deltas[i] = encode(boxes, anchors)
        logits[i, positive, truth["box_label"][i][matched][positive]] = 50.0
    outputs = {"logits": logits, "deltas": deltas}
    losses, found = jax.jit(
        lambda outputs: (model.losses(outputs, truth, SIZE), model.detections(outputs, SIZE))
    )(outputs)
    losses, found = jax.device_get((losses, found))
    assert all(value < 1e-5 for value in losses.values())
    limits = np.array([SIZE[1], SIZE[0]] * 2)
    for i in range(3):
        valid = truth["box_valid"][i]
        expected = [
            (label, *np.minimum(box, limits))
            for label, box in zip(truth["box_label"][i][valid], truth["boxes"][i][valid])  # noqa: B905
        ]
        rows = np.asarray(found["detected"][i])
        ours = np.column_stack([found["labels"][i][rows], found["boxes"][i][rows]])
        assert len(ours) == len(expected)
        np.testing.assert_allclose(sorted(map(tuple, ours)), sorted(expected), atol=1e-3)


def test_the_number_of_parameters_is_that_of_torchvision():
    # retinanet_resnet50_fpn with 91 classes: 34,014,999; its frozen norms have no parameters.
    model = RetinaNet(
        Pyramid(ResNet(50), FPN(256, "pyramid", 2), ("stage2", "stage3", "stage4")),
        RetinaNetHead(91, groups=0),
    )
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    norms = 53_120
    assert count - norms == 34_014_999


def test_impossible_settings():
    with pytest.raises(
        InputError, match="normalizer is 'epoch'; it can be 'image', 'batch', 'global'"
    ):
        RetinaNet(ENCODER, RetinaNetHead(3), normalizer="epoch")
    outputs = {"logits": np.zeros((1, 354, 3)), "deltas": np.zeros((1, 354, 4))}
    for method in (RetinaNet.losses, RetinaNet.detections):
        with pytest.raises(InputError, match="354 logits for 1593 anchors; it needs anchors=9"):
            model = RetinaNet(ENCODER, RetinaNetHead(3, anchors=2))
            method(model, outputs, *([{}] if method is RetinaNet.losses else []), SIZE)
    with pytest.raises(InputError, match="no map 'stage3'"):
        Pyramid(ResNet(stage_sizes=(1, 1)), FPN(8), ("stage1", "stage3"))
