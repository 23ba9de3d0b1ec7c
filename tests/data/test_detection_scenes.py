"""Scenes for detection: fixed by their index, exact where digits hide each other, padded."""

import pickle

import numpy as np
import pytest

from cvjax.data.loader import Loader
from cvjax.data.sources import detection_scenes
from cvjax.data.sources.detection_scenes import DetectionScenes
from cvjax.data.transforms import fields
from cvjax.errors import InputError


def whole(split="train", **fields):
    return DetectionScenes(split, masks=True, keypoints=True, **fields)


def test_a_scene_is_a_function_of_its_index_alone():
    source, other = whole(), pickle.loads(pickle.dumps(whole(count=50)))
    first = [source[i] for i in range(4)]
    for i in reversed(range(4)):
        for name, value in other[i].items():
            np.testing.assert_array_equal(first[i][name], value, err_msg=name)
    images = [first[0], first[1], whole("test")[0], whole(seed=1)[0]]
    assert len({one["image"].tobytes() for one in images}) == 4
    np.testing.assert_array_equal(DetectionScenes()[0]["image"], first[0]["image"])
    assert "masks" not in DetectionScenes()[0] and "keypoints" not in DetectionScenes()[0]
    for index in (-1, 50):
        with pytest.raises(IndexError):
            other[index]


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_are_made_of_the_digits_of_their_split_alone(split, monkeypatch):
    real, made = detection_scenes.Digits, []
    monkeypatch.setattr(detection_scenes, "Digits", lambda name: made.append(name) or real(name))
    whole(split)[0]
    assert set(made) == {split}


def test_boxes_masks_and_points_say_the_same():
    source = whole(max_instances=8)
    counts, hidden, labels, touching = [], 0, set(), 0
    for index in range(80):
        one = source[index]
        assert one["image"].shape == (128, 128, 3) and one["image"].dtype == np.uint8
        count = one["box_valid"].sum()
        counts.append(count)
        assert one["box_valid"][:count].all()
        for name in ("boxes", "box_label", "masks", "keypoints"):
            assert len(one[name]) == 8 and not one[name][count:].any()
        assert one["masks"].sum(axis=0).max() == 1, "a pixel belongs to one"
        for k in range(count):
            rows = np.flatnonzero(one["masks"][k].any(1))
            columns = np.flatnonzero(one["masks"][k].any(0))
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_array_equal(one["boxes"][k], box)
            x, y, visibility = one["keypoints"][k].T
            top, bottom, left, right = range(4)
            assert y[top] == y.min() and y[bottom] == y.max()
            assert x[left] == x.min() and x[right] == x.max()
            at = one["masks"][k][y.astype(int), x.astype(int)]
            np.testing.assert_array_equal(visibility, np.where(at, 2, 1))
            # The stroke's ends are those of the box, but for what is hidden.
            assert y[top] <= box[1] + 0.5 and y[bottom] >= box[3] - 0.5
            assert x[left] <= box[0] + 0.5 and x[right] >= box[2] - 0.5
            hidden += (visibility == 1).sum()
            labels.add(int(one["box_label"][k]))
        x1, y1, x2, y2 = one["boxes"][:count].T
        apart = (x2[:, None] <= x1) | (y2[:, None] <= y1)
        touching += (~(apart | apart.T)).sum() - count
    assert set(counts) == set(range(1, 7)) and labels == set(range(10))
    assert hidden > 10 and touching > 40, "digits overlap"


def test_in_a_mirror_the_left_end_is_still_the_left_one():
    for index in range(5):
        one = fields.flip(whole()[index])
        points = one["keypoints"][one["box_valid"]]
        top, bottom, left, right = points.transpose(1, 2, 0)
        assert (top[1] < bottom[1]).all() and (left[0] < right[0]).all()


def test_a_digit_in_front_takes_the_pixels_and_half_of_each_stays():
    back, front = np.zeros((2, 6, 6), bool)
    back[1:5, 1:3], front[3:6, 0:5] = True, True
    seen = detection_scenes._seen([back, front])
    np.testing.assert_array_equal(seen[1], front)
    np.testing.assert_array_equal(np.argwhere(seen[0]), [[1, 1], [1, 2], [2, 1], [2, 2]])
    assert detection_scenes._ends(back) == [(2, 1), (2, 4), (1, 3), (2, 3)]
    assert detection_scenes._seen([]) == []


def test_the_loader_stacks_them():
    batch = next(Loader(whole(), 3).iterate())
    found = {name: (value.dtype.name, value.shape) for name, value in batch.items()}
    assert found == {
        "image": ("float32", (3, 128, 128, 3)), "boxes": ("float32", (3, 6, 4)),
        "box_label": ("int32", (3, 6)), "box_valid": ("bool", (3, 6)), "valid": ("bool", (3,)),
        "masks": ("bool", (3, 6, 128, 128)), "keypoints": ("float32", (3, 6, 4, 3)),
        "keypoint_swap": ("int32", (3, 4)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": "tset"}, "it can be .train. or .test."),
        ({"size": 63}, "size is 63; it must be at least 64"),
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_instances": 5}, "max_instances is 5; it must be at least 6"),
    ],
)
def test_scenes_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        DetectionScenes(**change)
