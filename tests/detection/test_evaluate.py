"""Average precision against the tool of COCO where it is installed, and by known numbers."""

import numpy as np
import pytest

from cvjax.detection.evaluate import (
    CocoEvaluator,
    VocEvaluator,
    keypoint_similarity,
    ragged,
    voc_average_precision,
)
from cvjax.errors import InputError

SIGMAS = (0.05, 0.07, 0.09)


def random_set(seed, images=6, n=7, m=12, size=160, classes=3):
    """Truth and noisy detections of it, of all sizes, with crowds, ties and empty images."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (images, n, 2)).round()
    boxes = np.concatenate([corner, corner + rng.uniform(3, 150, (images, n, 2)).round()], -1)
    valid = rng.random((images, n)) < 0.8
    valid[0] = False
    crowd = rng.random((images, n)) < 0.2
    points = rng.uniform(0, size, (images, n, 3, 3)).round()
    points[..., 2] = rng.integers(0, 3, (images, n, 3))
    pick = rng.integers(0, n, (images, m))
    rows = np.arange(images)[:, None]
    label = rng.integers(0, classes, (images, n))
    batch = {
        "boxes": boxes.astype(np.float32), "box_label": label.astype(np.int32),
        "box_valid": valid, "crowd": crowd, "keypoints": points.astype(np.float32),
        "masks": filled(boxes, size), "valid": np.ones(images, bool),
        "area": ((boxes[..., 2:] - boxes[..., :2]).prod(-1) * 0.8).astype(np.float32),
    }  # fmt: skip
    noise = rng.choice([0, 0, 1, 4, 15], (images, m, 1))
    found = boxes[rows, pick] + (rng.normal(size=(images, m, 4)) * noise).round()
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 1)
    spots = points[rows, pick] + (rng.normal(size=(images, m, 3, 3)) * noise[..., None]).round()
    detected = rng.random((images, m)) < 0.9
    detected[1] = False
    wrong = rng.random((images, m)) < 0.2
    outputs = {
        "boxes": found.astype(np.float32), "keypoints": spots.astype(np.float32),
        "scores": rng.integers(1, 12, (images, m)).astype(np.float32) / 12,
        "labels": np.where(wrong, 0, label[rows, pick]).astype(np.int32),
        "detected": detected, "masks": filled(found, size),
    }  # fmt: skip
    return outputs, batch


def filled(boxes, size):
    y, x = np.mgrid[:size, :size] + 0.5
    x1, y1, x2, y2 = (boxes[..., i, None, None] for i in range(4))
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def by_pycocotools(outputs, batch, kind, classes=3):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    mask = pytest.importorskip("pycocotools.mask")

    def rle(array):
        return mask.encode(np.asfortranarray(array.astype(np.uint8)))

    def described(arrays, i, k, label):
        x1, y1, x2, y2 = arrays["boxes"][i, k].astype(float)
        one = {"image_id": int(i), "category_id": int(arrays[label][i, k])}
        if kind == "keypoints":
            one["keypoints"] = arrays["keypoints"][i, k].astype(float).ravel().tolist()
        if kind == "segm":
            return {**one, "segmentation": rle(arrays["masks"][i, k])}
        if kind == "bbox" or label == "box_label":
            one["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        return one

    truth = coco.COCO()
    annotations = []
    for i, k in np.argwhere(batch["box_valid"]):
        one = described(batch, i, k, "box_label")
        extra = {
            "id": len(annotations) + 1, "iscrowd": int(batch["crowd"][i, k]),
            "area": float(batch["area"][i, k]),
        }  # fmt: skip
        if kind == "keypoints":
            extra["num_keypoints"] = int((batch["keypoints"][i, k, :, 2] > 0).sum())
        annotations.append({**one, **extra})
    truth.dataset = {
        "images": [{"id": i, "height": 160, "width": 160} for i in range(len(batch["valid"]))],
        "categories": [{"id": i} for i in range(classes)], "annotations": annotations, "info": {},
    }  # fmt: skip
    truth.createIndex()
    found = [
        {**described(outputs, i, k, "labels"), "score": float(outputs["scores"][i, k])}
        for i, k in np.argwhere(outputs["detected"])
    ]
    judge = cocoeval.COCOeval(truth, truth.loadRes(found), kind)
    if kind == "keypoints":
        judge.params.kpt_oks_sigmas = np.array(SIGMAS)
    judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge.stats


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "kind, part", [("bbox", "boxes"), ("segm", "masks"), ("keypoints", "keypoints")]
)
def test_the_numbers_are_those_of_pycocotools(kind, part, seed):
    outputs, batch = random_set(seed)
    evaluator = CocoEvaluator(3, parts=(part,), sigmas=SIGMAS)
    half = len(batch["valid"]) // 2
    for rows in (slice(0, half), slice(half, None)):
        evaluator.add(*({k: v[rows] for k, v in d.items()} for d in (outputs, batch)))
    # Equal but for the order of sums in double precision.
    found = list(evaluator.result().values())
    np.testing.assert_allclose(found, by_pycocotools(outputs, batch, kind), atol=1e-9)


def one_image(truth, found, scores, **more):
    n, m = len(truth), len(found)
    batch = {
        "boxes": np.array(truth, np.float32).reshape(1, n, 4), "valid": np.ones(1, bool),
        "box_label": np.zeros((1, n), np.int32), "box_valid": np.ones((1, n), bool),
        **{name: np.array([value]) for name, value in more.items()},
    }  # fmt: skip
    outputs = {
        "boxes": np.array(found, np.float32).reshape(1, m, 4),
        "scores": np.array(scores, np.float32).reshape(1, m),
        "labels": np.zeros((1, m), np.int32), "detected": np.ones((1, m), bool),
    }  # fmt: skip
    return outputs, batch


A, B, FAR = [0, 0, 40, 40], [50, 0, 90, 40], [100, 100, 140, 140]


@pytest.mark.parametrize(
    "truth, found, scores, more, expected",
    [
        ([A], [A], [0.5], {}, 1.0),
        ([A], [], [], {}, 0.0),
        ([], [A], [0.5], {}, -1.0),
        ([], [], [], {}, -1.0),
        ([A], [FAR, A], [0.9, 0.8], {}, 0.5),
        ([A], [A, FAR], [0.9, 0.8], {}, 1.0),
        ([A, B], [A], [0.9], {}, 51 / 101),  # recalls 0, 0.01, ..., 0.5
        ([A, B], [A, B, B], [0.9, 0.7, 0.8], {}, 1.0),
        ([A], [[0, 0, 40, 30]], [0.9], {}, 0.6),  # IoU 0.75: thresholds 0.5 to 0.75
        ([A, B], [A, B], [0.8, 0.9], {"ignore": [False, True]}, 1.0),
        ([A, B], [A, B, B], [0.7, 0.9, 0.8], {"ignore": [False, True]}, 0.5),  # once only
        ([A, B], [A, B, B], [0.7, 0.9, 0.8], {"crowd": [False, True]}, 1.0),  # many times
        ([A, B], [A, [50, 0, 60, 10]], [0.7, 0.9], {"crowd": [False, True]}, 1.0),
        ([A, B], [A, [50, 0, 60, 10]], [0.7, 0.9], {"ignore": [False, True]}, 0.5),
    ],
)
def test_known_numbers(truth, found, scores, more, expected):
    evaluator = CocoEvaluator(2)
    evaluator.add(*one_image(truth, found, scores, **more))
    assert evaluator.result()["box_AP"] == pytest.approx(expected, abs=1e-12)
    assert evaluator.per_class() == [pytest.approx(expected, abs=1e-12), -1.0]
    assert len(evaluator.result()) == 12


def test_padding_and_invalid_examples_count_nowhere():
    outputs, batch = random_set(3)
    batch["valid"] = np.arange(6) % 3 > 0
    before = CocoEvaluator(3, ("boxes", "masks", "keypoints"), SIGMAS)
    before.add(outputs, batch)
    rng = np.random.default_rng(0)
    for arrays, real in ((outputs, "detected"), (batch, "box_valid")):
        for name, value in arrays.items():
            if name not in (real, "valid"):
                noise = rng.uniform(0, 99, value.shape).astype(value.dtype)
                keep = arrays[real] & batch["valid"][:, None]
                keep = keep.reshape(*keep.shape, *(value.ndim - 2) * [1])
                arrays[name] = np.where(keep, value, noise)
    after = CocoEvaluator(3, ("boxes", "masks", "keypoints"), SIGMAS)
    after.add(outputs, batch)
    assert after.result() == before.result()
    assert len(after.result()) == 34


def test_points_need_their_sigmas_and_labels_their_class():
    outputs, batch = random_set(0)
    with pytest.raises(InputError, match="3 keypoints but 17 sigmas"):
        CocoEvaluator(3, ("keypoints",)).add(outputs, batch)
    with pytest.raises(InputError, match="has the class 2, but num_classes is 2"):
        CocoEvaluator(2).add(outputs, batch)
    with pytest.raises(InputError, match="'box' is none of"):
        CocoEvaluator(2, ("box",))
    # One of two points off by d, with 2 sigma = 0.2 and area 100: d^2 / (2 * 100 * 0.04).
    point = np.array([[[10.0, 10, 2], [20, 20, 2], [0, 0, 0]]])
    moved = point + np.array([[0, 0, 0], [2, 0, 0], [50, 50, 0]])
    box, area = np.array([[0.0, 0, 10, 10]]), np.array([100.0])
    found = keypoint_similarity(moved, point, box, area, (0.1, 0.1, 0.1))
    np.testing.assert_allclose(found, [[(1 + np.exp(-0.5)) / 2]], rtol=1e-12)


def test_voc_has_two_rules():
    recall, precision = np.array([0.25, 0.25, 0.5, 0.5, 0.75]), np.array([1, 0.5, 2 / 3, 0.5, 0.6])
    # Made falling: 1 to 0.25, 2/3 to 0.5, 0.6 to 0.75, then 0.
    area = 0.25 * (1 + 2 / 3 + 0.6)
    assert voc_average_precision(recall, precision) == pytest.approx(area)
    eleven = (3 * 1 + 3 * 2 / 3 + 2 * 0.6) / 11
    assert voc_average_precision(recall, precision, eleven_point=True) == pytest.approx(eleven)
    assert voc_average_precision(np.zeros(0), np.zeros(0)) == 0
    assert voc_average_precision(np.zeros(0), np.zeros(0), eleven_point=True) == 0


def test_voc_counts_a_second_detection_as_wrong_and_leaves_out_the_difficult():
    cases = [
        ([A], [A, A], [0.9, 0.8], {}, 1.0),
        ([A, B], [A, A, B], [0.9, 0.8, 0.7], {}, 0.5 + 0.5 * 2 / 3),
        ([A, B], [B, A], [0.9, 0.8], {"ignore": [False, True]}, 1.0),
        ([A], [[0, 0, 40, 20]], [0.9], {}, 0.0),  # IoU 0.5 is not above 0.5
    ]
    for truth, found, scores, more, expected in cases:
        evaluator = VocEvaluator(1)
        evaluator.add(*one_image(truth, found, scores, **more))
        assert evaluator.result()["mAP"] == pytest.approx(expected)
    assert VocEvaluator(1).result() == {}


def test_ragged():
    values = np.arange(12).reshape(2, 3, 2)
    first, second = ragged(values, np.array([[True, False, True], [False] * 3]))
    np.testing.assert_array_equal(first, [[0, 1], [4, 5]])
    assert second.shape == (0, 2)
