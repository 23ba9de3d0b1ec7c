"""Mosaic and copy-paste: what is painted in several examples lands where their truth says."""

import logging
import pickle

import numpy as np
import pytest

from cvjax.data.loader import Loader
from cvjax.data.sources.composed import CopyPaste, Mosaic
from cvjax.data.sources.detection_scenes import DetectionScenes
from cvjax.data.transforms import composing, geometry
from cvjax.errors import InputError

OBJECTS = ("boxes", "box_label", "box_valid", "masks", "keypoints", "crowd", "ignore", "area")


def painted(level, *windows, size=(40, 50), rows=3, **flags):
    """A black image with rectangles (x1, y1, x2, y2) of one grey; each is an object, and padding.

    Its label is the level, its keypoints are the middle and the upper left corner.
    """
    height, width = size
    count = len(windows)
    masks, image = np.zeros((rows, height, width), bool), np.zeros((height, width, 3), np.uint8)
    boxes, points = np.zeros((rows, 4), np.float32), np.zeros((rows, 2, 3), np.float32)
    for k, (x1, y1, x2, y2) in enumerate(windows):
        masks[k, y1:y2, x1:x2] = True
        boxes[k] = x1, y1, x2, y2
        points[k] = [(x1 + x2) / 2, (y1 + y2) / 2, 2], [x1 + 0.5, y1 + 0.5, 2]
    image[masks.any(axis=0)] = level
    real = np.arange(rows) < count
    return {
        "image": image, "masks": masks, "boxes": boxes, "keypoints": points, "box_valid": real,
        "box_label": np.where(real, level, 0).astype(np.int32),
        "area": np.float32(masks.sum(axis=(1, 2))), "scale": np.float32(1),
        "crowd": flags.get("crowd", np.zeros(rows, bool)),
        "ignore": flags.get("ignore", np.zeros(rows, bool)),
        "mask": masks.any(axis=0).astype(np.uint8),
    }  # fmt: skip


def check(example):
    """Boxes, masks, points and pixels of one example say the same of each object."""
    height, width = example["image"].shape[:2]
    for k in np.flatnonzero(example["box_valid"]):
        mask, (x1, y1, x2, y2) = example["masks"][k], example["boxes"][k]
        assert mask.shape == (height, width)
        level = example["box_label"][k]
        y, x = np.nonzero(mask)
        if not len(y):
            continue
        # Up to a pixel, which is scaled by nearest neighbours in the mask and by area in the box.
        assert x1 - 1 <= x.min() and x.max() + 1 <= x2 + 1 and y1 - 1 <= y.min()
        assert abs(x.min() - x1) <= 1.5 and abs(x.max() + 1 - x2) <= 1.5
        assert abs(y.min() - y1) <= 1.5 and abs(y.max() + 1 - y2) <= 1.5
        inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1]
        inner = np.pad(inner & mask[1:-1, :-2] & mask[1:-1, 2:], 1)
        if inner.any():
            assert np.median(example["image"][inner][:, 0]) == pytest.approx(level, abs=3)


def test_a_mosaic_shows_each_example_in_its_part():
    given = [
        painted(60, (5, 5, 25, 30)), painted(120, (10, 10, 45, 35), (0, 0, 8, 8)),
        painted(180, size=(30, 30)), painted(240, (2, 3, 48, 38)),
    ]  # fmt: skip
    seen, splits = set(), set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        made = composing.mosaic(given, rng, size=(64, 96), scale=(0.8, 1.6), fill=7)
        assert made["image"].shape == (64, 96, 3) and made["mask"].shape == (64, 96)
        count = len(made["boxes"])
        assert all(len(made[name]) == count for name in OBJECTS) and made["box_valid"].all()
        check(made)
        again = np.random.default_rng(seed)
        row, column = round(64 * again.uniform(0.25, 0.75)), round(96 * again.uniform(0.25, 0.75))
        splits.add((row, column))
        for label, x1, y1, x2, y2 in zip(made["box_label"], *made["boxes"].T, strict=True):
            seen.add(int(label))
            assert (x1 >= column) if label in (120, 240) else (x2 <= column)
            assert (y1 >= row) if label == 240 else (y2 <= row)
        levels = made["image"][..., 0]
        assert levels[:row, :column].max() <= 63 and levels[:row, column:].max() <= 123
        assert levels[row:, :column].max() <= 7, "it has no object"
        # The class map: 1 where an object is, 255 where no example is.
        assert set(np.unique(made["mask"])) <= {0, 1, 255}
        assert ((made["mask"] == 1) == made["masks"].any(axis=0)).all()
    assert seen == {60, 120, 240} and len(splits) > 50
    assert all("mask" in one and not one["image"][0, 49].any() for one in given[::3])
    with pytest.raises(InputError, match="needs 4 examples, not 2"):
        composing.mosaic(given[:2], rng, size=64)
    with pytest.raises(InputError, match="scale"):
        composing.mosaic(given, rng, size=64, scale=(2, 1))
    with pytest.raises(InputError, match="a mosaic of 1 x 9 pixels has no four parts"):
        composing.mosaic(given, rng, size=(1, 9))
    grey = {**given[0], "image": given[0]["image"][..., :1]}
    with pytest.raises(InputError, match=r"as many channels, not \[3, 3, 3, 1\]"):
        composing.mosaic([*given[:3], grey], rng, size=64)


def test_what_is_copied_hides_what_is_below():
    below = painted(60, (10, 10, 30, 30), (0, 30, 20, 40), (40, 0, 50, 10))
    above = painted(200, (20, 5, 40, 35), (38, 0, 50, 12))
    made = composing.copy_paste(below, above, np.random.default_rng(0), share=1.0)
    check(made)
    # The third is hidden and gone; the first keeps its left half, the second is as it was.
    assert made["box_label"].tolist() == [60, 60, 200, 200] and made["box_valid"].all()
    expected = [[10, 10, 20, 30], [0, 30, 20, 40], [20, 5, 40, 35], [38, 0, 50, 12]]
    np.testing.assert_array_equal(made["boxes"], expected)
    assert made["area"].tolist() == [200, 200, 600, 144]
    assert [mask.sum() for mask in made["masks"]] == [200, 200, 600, 144]
    assert (made["masks"][:2].sum(axis=0) + made["masks"][2:].any(axis=0)).max() == 1
    np.testing.assert_array_equal(made["mask"], made["masks"].any(axis=0))
    # Of the first, the middle (20, 20) is hidden and the corner is seen.
    assert (
        made["keypoints"][0, :, 2].tolist() == [1, 2] and (made["keypoints"][1:, :, 2] == 2).all()
    )
    image = np.where(above["masks"].any(axis=0)[..., None], above["image"], below["image"])
    np.testing.assert_array_equal(made["image"], image)
    assert below["boxes"][0, 2] == 30 and below["masks"][0].sum() == 400, "nothing is written into"


def test_the_box_of_a_rest_beyond_the_old_box_is_around_it():
    """A mask that was scaled by its nearest pixels may reach a little out of its box."""
    below, above = painted(60, (0, 0, 6, 5)), painted(200, (0, 0, 5, 5))
    below["boxes"][0, 2] = 4.9
    made = composing.copy_paste(below, above, np.random.default_rng(0), share=1.0)
    np.testing.assert_array_equal(made["boxes"][0], [5, 0, 6, 5])


def test_each_object_is_copied_by_its_chance_and_no_crowd_at_all():
    below = painted(60, (0, 0, 5, 5))
    flags = {"crowd": np.array([True, False, False]), "ignore": np.array([False, True, False])}
    above = painted(200, (10, 10, 15, 15), (20, 20, 25, 25), (30, 30, 35, 35), **flags)
    counts = np.zeros(3, int)
    for seed in range(400):
        made = composing.copy_paste(below, above, np.random.default_rng(seed), share=0.3)
        counts += [(made["boxes"][1:, 0] == x).sum() for x in (10, 20, 30)]
    assert counts[0] == counts[1] == 0 and 90 < counts[2] < 150
    same = composing.copy_paste(below, above, np.random.default_rng(0), share=0.0)
    np.testing.assert_array_equal(same["image"], below["image"])
    assert len(same["boxes"]) == 1


def test_what_cannot_be_composed():
    one, rng = painted(60, (0, 0, 5, 5)), np.random.default_rng(0)
    without = {k: v for k, v in one.items() if k != "masks"}
    with pytest.raises(InputError, match="needs boxes and masks"):
        composing.copy_paste(without, one, rng)
    with pytest.raises(InputError, match="of one size"):
        composing.copy_paste(one, painted(60, size=(40, 40)), rng)
    without_classes = {k: v for k, v in one.items() if k != "mask"}
    with pytest.raises(InputError, match="needs a mask of classes"):
        composing.copy_paste(one, without_classes, rng)
    assert "mask" not in composing.copy_paste(without_classes, one, rng)
    with pytest.raises(InputError, match="share is 2"):
        composing.copy_paste(one, one, rng, share=2)
    with pytest.raises(InputError, match="those of another"):
        composing.mosaic([one, one, one, without], rng, size=30)
    with pytest.raises(InputError, match="Mosaic: the records have no boxes, only image"):
        Mosaic([{"image": one["image"]}])[0]


@pytest.mark.parametrize("kind", [Mosaic, CopyPaste])
def test_a_source_of_composed_records(kind):
    scenes = DetectionScenes(count=5, size=64, masks=True, keypoints=True)
    source = kind(scenes, size=(48, 72), variants=3, max_instances=20)
    assert len(source) == 15 and source.class_names == scenes.class_names
    records = [source[i] for i in range(15)]
    again = pickle.loads(pickle.dumps(source))
    for i in (14, 3):
        for name, value in again[i].items():
            np.testing.assert_array_equal(value, records[i][name], err_msg=name)
    assert len({record["image"].tobytes() for record in records}) == 15
    assert (
        kind(scenes, size=(48, 72), seed=1)[0]["image"].tobytes() != records[0]["image"].tobytes()
    )
    counts = [record["box_valid"].sum() for record in records]
    assert len(set(counts)) > 3
    for record in records:
        assert record["image"].shape == (48, 72, 3) and record["boxes"].shape == (20, 4)
        boxes = record["boxes"][record["box_valid"]]
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes <= [72, 48, 72, 48]).all()
        if kind is CopyPaste:
            assert record["masks"].sum(axis=0).max() <= 1, "a pixel belongs to one"
    batch = next(Loader(source, 4).iterate())
    assert batch["masks"].shape == (4, 20, 48, 72)
    assert source.example_id(7) == "2"
    with pytest.raises(IndexError):
        source[15]


def test_it_is_said_when_there_are_not_rows_for_all(caplog):
    scenes = DetectionScenes(count=4, size=64)
    source = Mosaic(scenes, size=64, variants=2)
    with caplog.at_level(logging.WARNING, "cvjax"):
        records = [source[i] for i in range(8)]
    assert all(record["boxes"].shape == (6, 4) for record in records)
    assert "Mosaic of DetectionScenes: 1 images have more than" in caplog.records[0].getMessage()
    numbers = [int(record.getMessage().split(":")[1].split()[0]) for record in caplog.records]
    assert numbers == [1, 2, 4, 8][: len(numbers)] and len(numbers) > 1


def test_with_p_0_each_record_is_only_scaled_and_cut():
    scenes = DetectionScenes(count=3, size=64)
    record = Mosaic(scenes, size=50, p=0.0, scale=(1, 1))[1]
    expected = geometry.resize_and_pad(scenes[1], None, size=50)
    np.testing.assert_array_equal(record["image"], expected["image"])
    np.testing.assert_array_equal(record["boxes"], expected["boxes"])
    for fields, message in (
        ({"size": 0}, "size is 0"), ({"p": 2}, "p is 2"), ({"variants": 0}, "variants is 0"),
        ({"seed": -1}, "seed is -1"), ({"max_instances": 0}, "max_instances is 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Mosaic(scenes, **fields)
