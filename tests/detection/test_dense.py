"""What one-stage detectors share, against slow loops and closed forms."""

import jax
import numpy as np
import pytest

from cvjax.detection.dense import Tower, select
from cvjax.detection.detr import DETR
from cvjax.detection.fcos import FCOSHead
from cvjax.detection.keypoint_head import KeypointHead
from cvjax.detection.rcnn import PyramidPool
from cvjax.detection.retinanet import RetinaNetHead
from cvjax.errors import InputError


def boxes_of(rng, *shape, size=50.0):
    corner = rng.uniform(-5, size, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 30, (*shape, 2))], -1).astype(np.float32)


def slow_iou(a, b):
    a, b = np.float64(a), np.float64(b)
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    area = lambda x: max(x[2] - x[0], 0) * max(x[3] - x[1], 0)  # noqa: E731
    either = area(a) + area(b) - sides.prod()
    return sides.prod() / either if either else 0.0


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
    found_by = jax.jit(lambda boxes, scores: select(
        boxes, scores, candidates=candidates, score=0.3, iou=0.4, outputs=outputs, size=size,
    ))  # fmt: skip
    for _ in range(5):
        boxes = boxes_of(rng, 40, size=30.0)
        boxes[3], boxes[5] = boxes[4], [60, 60, 70, 70]
        scores = np.round(rng.uniform(size=(40, 3)), 1).astype(np.float32)  # many ties
        scores[scores == np.float32(0.3)] = 0.29  # the slow one compares in other precision
        found = found_by(boxes, scores)
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
    found = select(boxes, scores, candidates=6, score=0.1, iou=0.5, outputs=3, size=(20, 20))
    # The IoU of the first two is 0.5, which is not more than 0.5.
    np.testing.assert_array_equal(found["labels"], [0, 0, 1])
    assert found["detected"].all()


ONE = np.float32([[0, 0, 9, 9]]), np.float32([[0.5]])  # a box and its score


def test_a_score_at_the_threshold_is_no_detection():
    run = jax.jit(lambda *of: [
        select(*of, candidates=1, score=score, iou=0.5, outputs=1, size=(9, 9))["detected"]
        for score in (0.5, 0.49)
    ])  # fmt: skip
    at, below = run(*ONE)
    assert not at.any() and below.all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Tower(8, groups=3), "features is 8; it must be a multiple of groups=3"),
        (lambda: RetinaNetHead(3, anchors=-1), "anchors is -1; it must be at least 1"),
        (lambda: FCOSHead(0), "num_classes is 0; it must be at least 1"),
        (lambda: DETR(None, 3, heads=0), "heads is 0; it must be at least 1"),
        (lambda: PyramidPool(levels=0), "levels is 0; it must be at least 1"),
        (lambda: KeypointHead(size=0), "size is 0; it must be at least 1"),
        (lambda: select(*ONE, candidates=0, score=0.1, iou=0.5, outputs=1, size=(9, 9)),
         "candidates is 0; it must be a whole number"),
        (lambda: select(*ONE, candidates=1, score=-1, iou=0.5, outputs=1, size=(9, 9)),
         "score is -1; it must be in"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()
