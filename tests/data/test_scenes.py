"""Composed scenes: fixed by their index, made of their own split's digits, exactly labelled."""

import pickle

import numpy as np
import pytest

from cvjax.data.loader import Loader
from cvjax.data.sources import scenes
from cvjax.data.sources.scenes import Scenes
from cvjax.errors import InputError

ALL = ("image", "mask", "instance", "boxes", "present")


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_a_scene_is_a_function_of_its_index_alone():
    source = Scenes(fields=ALL)
    first = [source[i] for i in range(5)]
    other = pickle.loads(pickle.dumps(Scenes(fields=ALL, count=50)))
    for i in reversed(range(5)):
        assert_equal(first[i], other[i])
    images = [first[0], first[1], Scenes("test")[0], Scenes(seed=1)[0]]
    assert len({one["image"].tobytes() for one in images}) == 4
    assert len(source) == 20_000
    for index in (-1, 50):
        with pytest.raises(IndexError):
            other[index]


@pytest.mark.parametrize("split, other", [("train", "test"), ("test", "train")])
def test_scenes_are_made_of_the_digits_of_their_split_alone(split, other, monkeypatch):
    made = []

    def digits(name):
        made.append(name)
        return real(name)

    real = scenes.Digits
    monkeypatch.setattr(scenes, "Digits", digits)
    for i in range(3):
        Scenes(split)[i]
    assert set(made) == {split}


@pytest.mark.parametrize("size", [96, 97, 64])
def test_mask_instances_boxes_and_presence_say_the_same(size):
    source = Scenes(size=size, fields=ALL)
    seen, placed = set(), 0
    for index in range(40):
        record = source[index]
        mask, instance = record["mask"], record["instance"]
        assert record["image"].shape == (size, size, 3) and record["image"].dtype == np.uint8
        assert mask.shape == instance.shape == (size, size)
        assert mask.dtype == instance.dtype == record["present"].dtype == np.uint8
        np.testing.assert_array_equal(mask == 0, instance == 0)
        valid = record["box_valid"]
        count = valid.sum()
        placed += count
        assert 1 <= count <= 4 and valid[:count].all() and instance.max() == count
        for k in range(count):
            there = instance == k + 1
            assert (mask[there] == 1 + record["box_label"][k]).all()
            rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_array_equal(record["boxes"][k], box)
        assert not record["boxes"][count:].any() and not record["box_label"][count:].any()
        digits = set(np.unique(mask)) - {0}
        np.testing.assert_array_equal(np.flatnonzero(record["present"]) + 1, sorted(digits))
        seen |= digits
    assert seen == set(range(1, 11))
    assert placed > 40, "scenes have more than one"


def test_the_mask_lies_on_the_strokes(monkeypatch):
    """Painted in one bright colour on the ground, without clutter, the strokes are the mask."""
    monkeypatch.setattr(scenes, "_CLUTTER", 0)
    monkeypatch.setattr(scenes, "_DIGITS", (1, 1))  # Two that touch may cover a pixel together.
    monkeypatch.setattr(
        scenes.drawing, "_texture", lambda rng, size: np.zeros((size, size, 3), np.float32)
    )
    monkeypatch.setattr(scenes.drawing, "bright", lambda rng: np.ones(3, np.float32))
    source = Scenes()
    for index in range(10):
        record = source[index]
        bright = record["image"].mean(-1)
        # Noise of 0.03 in each of three channels, against a border at one half.
        assert bright[record["mask"] > 0].min() > 127 - 25
        assert bright[record["mask"] == 0].max() < 127 + 25


def test_no_digit_hides_another():
    source = Scenes(fields=("instance",))
    for index in range(60):
        areas = np.bincount(source[index]["instance"].ravel())[1:]
        assert areas.min() >= 15, "even a thin 1 has more"


def test_the_loader_keeps_integers():
    batch = next(Loader(Scenes(fields=ALL), 3).iterate())
    kinds = {name: value.dtype for name, value in batch.items()}
    assert kinds == {
        "image": np.float32, "mask": np.uint8, "instance": np.uint8, "present": np.uint8,
        "boxes": np.float32, "box_label": np.int32, "box_valid": bool, "valid": bool,
    }  # fmt: skip
    assert batch["image"].max() <= 1 and batch["mask"].max() > 1
    assert set(Scenes()[0]) == {"image", "mask", "instance"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": "tset"}, "it can be .train. or .test."),
        ({"fields": ("mask", "imgae")}, "did you mean image"),
        ({"size": 63}, "size is 63; it must be at least 64"),
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_scenes_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        Scenes(**change)


def test_the_classes_of_boxes_have_no_ground():
    assert Scenes(fields=("image", "boxes")).class_names == tuple("0123456789")
    assert Scenes(fields=("image", "mask", "boxes")).class_names[0] == "ground"
