"""Mean IoU against counting by hand, one class and one pixel at a time."""

import copy

import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.segmentation.evaluate import MeanIoU


def batch_of(truth, prediction, valid=None):
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    valid = np.ones(len(truth), bool) if valid is None else np.asarray(valid)
    return {"prediction": prediction}, {"mask": truth, "valid": valid}


def slow(truth, prediction, classes):
    """By sets of pixels."""
    places = [at for at in np.ndindex(truth.shape) if truth[at] != 255]
    ious = []
    for c in range(classes):
        true = {at for at in places if truth[at] == c}
        found = {at for at in places if prediction[at] == c}
        if true | found:
            ious.append(len(true & found) / len(true | found))
    right = sum(truth[at] == prediction[at] for at in places)
    return {"mean_iou": np.mean(ious), "pixel_accuracy": right / len(places)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_it_is_exact_however_the_set_is_cut_into_batches(dtype):
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 3, 255], size=(20, 5, 7)).astype(dtype)
    prediction = rng.choice([0, 1, 2, 5], size=truth.shape)
    expected = slow(truth, prediction, 7)
    for size in (1, 3, 20):
        evaluator = MeanIoU(7)
        for first in range(0, 20, size):
            part = slice(first, first + size)
            evaluator.add(*batch_of(truth[part], prediction[part]))
        result = evaluator.result()
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-14)


def test_classes_that_are_nowhere_are_left_out_and_false_ones_are_not():
    evaluator = MeanIoU(5)
    evaluator.add(*batch_of([[[0, 0, 1, 255]]], [[[0, 3, 1, 4]]]))
    # 0: one of two; 1: all; 2: nowhere; 3: predicted, never true; 4: only where nothing counts.
    np.testing.assert_array_equal(evaluator.iou, [0.5, 1.0, np.nan, 0.0, np.nan])
    assert evaluator.result() == {"mean_iou": 0.5, "pixel_accuracy": 2 / 3}


def test_what_is_not_valid_may_be_anything():
    evaluator = MeanIoU(2)
    outputs, batch = batch_of([[[0, 1]], [[99, 7]]], [[[0, 1]], [[-5, 1000]]], [True, False])
    evaluator.add(outputs, batch)
    assert evaluator.result() == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


def test_nothing_to_count_is_no_result():
    evaluator = MeanIoU(3)
    assert evaluator.result() == {}
    evaluator.add(*batch_of([[[255]]], [[[2]]]))
    evaluator.add(*batch_of([[[0]]], [[[2]]], [False]))
    assert evaluator.result() == {}


def test_counts_are_integers_of_64_bits_and_a_copy_starts_from_its_own():
    evaluator = MeanIoU(2)
    evaluator.matrix[0, 0] = 2**53
    evaluator.add(*batch_of([[[0]]], [[[0]]]))
    assert evaluator.matrix.dtype == np.int64 and evaluator.matrix[0, 0] == 2**53 + 1
    fresh = MeanIoU(2)
    used = copy.deepcopy(fresh)
    used.add(*batch_of([[[0]]], [[[1]]]))
    assert not fresh.matrix.any() and used.matrix[0, 1] == 1


def test_what_cannot_be_counted():
    for label in (3, 254, -1):
        with pytest.raises(InputError, match=f"mask is {label}, but num_classes is 3"):
            MeanIoU(3).add(*batch_of([[[label]]], [[[0]]]))
        with pytest.raises(InputError, match=f"prediction is {label}, but"):
            MeanIoU(3).add(*batch_of([[[0]]], [[[label]]]))
    with pytest.raises(InputError, match=r"\[1, 1, 2\]"):
        MeanIoU(3).add(*batch_of([[[0, 1]]], [[[0]]]))
    with pytest.raises(InputError, match="num_classes is 0"):
        MeanIoU(0)
