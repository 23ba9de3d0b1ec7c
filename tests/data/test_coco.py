"""The reader of COCO: what it reads, against pycocotools, and what it refuses."""

import copy
import json
import logging
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from cvjax import config
from cvjax.build import build
from cvjax.data.loader import Loader
from cvjax.data.sources import example_id
from cvjax.data.sources.coco import Coco, mirrored_points
from cvjax.data.transforms import defaults, fields
from cvjax.detection.evaluate import CocoEvaluator
from cvjax.errors import InputError
from tests.data.detection_sets import CATEGORIES, write_coco

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    return root, write_coco(root)


def source(root, **options):
    return Coco(root / "images", root / "annotations.json", **options)


def test_records_are_what_pycocotools_reads(photographs):
    root, data = photographs
    judge = pytest.importorskip("pycocotools.coco").COCO(root / "annotations.json")
    found = source(root, masks=True, keypoints=True, max_instances=4)
    assert len(found) == len(data["images"]) and found.class_names == CATEGORIES
    assert found.keypoint_names == ("nose", "left_eye", "right_eye") and found.skipped == ()
    seen = {"crowd": 0, "ignore": 0, "empty": 0}
    for index, image in enumerate(data["images"]):
        record = found[index]
        pixels = np.asarray(Image.open(root / "images" / image["file_name"]).convert("RGB"))
        np.testing.assert_array_equal(record["image"], pixels)
        truth = judge.loadAnns(judge.getAnnIds(image["id"]))
        assert record["box_valid"].tolist() == [k < len(truth) for k in range(4)]
        for k, one in enumerate(truth):
            x, y, w, h = one["bbox"]
            np.testing.assert_allclose(record["boxes"][k], [x, y, x + w, y + h], rtol=1e-6)
            name = judge.loadCats(one["category_id"])[0]["name"]
            assert found.class_names[record["box_label"][k]] == name
            assert record["crowd"][k] == one["iscrowd"] and record["ignore"][k] == one.get(
                "ignore", 0
            )
            assert record["area"][k] == np.float32(one["area"])
            np.testing.assert_array_equal(record["masks"][k], judge.annToMask(one))
            points = np.reshape(one.get("keypoints", 9 * [0]), (3, 3))
            np.testing.assert_allclose(record["keypoints"][k], points, rtol=1e-6)
        for name in ("boxes", "box_label", "crowd", "ignore", "area", "masks", "keypoints"):
            assert not record[name][len(truth) :].any()
        seen["crowd"] += record["crowd"].sum()
        seen["ignore"] += record["ignore"].sum()
        seen["empty"] += not truth
    assert seen == {"crowd": 1, "ignore": 1, "empty": 1}
    assert example_id(found, 0) == str(root / "images" / data["images"][0]["file_name"])
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again[3]["masks"], found[3]["masks"])
    assert "masks" not in source(root)[0] and "keypoints" not in source(root)[0]


def test_all_are_scaled_to_fit_one_size(photographs):
    root, _ = photographs
    plain = source(root, masks=True, keypoints=True)
    for size in (96, (64, 112)):
        scaled = source(root, masks=True, keypoints=True, image_size=size, max_instances=5)
        height, width = (size, size) if isinstance(size, int) else size
        for index in range(len(plain)):
            one, other = plain[index], scaled[index]
            old_height, old_width = one["image"].shape[:2]
            factor = min(height / old_height, width / old_width)
            assert other["image"].shape == (height, width, 3)
            down, right = round(old_height * factor), round(old_width * factor)
            assert not other["image"][down:].any() and not other["image"][:, right:].any()
            stretch = np.array([right / old_width, down / old_height])
            count = one["box_valid"].sum()
            assert other["box_valid"].sum() == count and len(other["boxes"]) == 5
            expected = one["boxes"][:count] * np.tile(stretch, 2)
            np.testing.assert_allclose(other["boxes"][:count], expected, rtol=1e-5, atol=1e-4)
            points = one["keypoints"][:count, :, :2] * stretch
            np.testing.assert_allclose(
                other["keypoints"][:count, :, :2], points, rtol=1e-5, atol=1e-4
            )
            areas = one["area"][:count] * stretch.prod()
            np.testing.assert_allclose(other["area"][:count], areas, rtol=1e-4)
            np.testing.assert_allclose(other["scale"] ** 2, stretch.prod(), rtol=1e-5)
            for k in range(count):
                share = other["masks"][k].sum() / max(one["masks"][k].sum() * stretch.prod(), 1)
                assert abs(share - 1) < 0.2 or one["masks"][k].sum() < 400
    batch = next(Loader(scaled, 4, seed=0).iterate())
    assert batch["image"].shape == (4, 64, 112, 3) and batch["masks"].shape == (4, 5, 64, 112)
    assert batch["scale"].shape == (4,) and batch["scale"].dtype == np.float32


def test_evaluated_in_a_smaller_size_the_numbers_are_those_of_pycocotools(photographs):
    """Detections in resized images, against the file itself with detections in its own pixels."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    root, data = photographs
    truth = coco.COCO(root / "annotations.json")
    # What pycocotools cannot do: leave out what is no crowd; and its ids must not begin with 0.
    truth.dataset["annotations"] = [
        {**one, "id": one["id"] + 1}
        for one in truth.dataset["annotations"]
        if not one.get("ignore")
    ]
    truth.createIndex()
    scaled = source(root, image_size=100, max_instances=3)
    evaluator, rng, found = CocoEvaluator(5), np.random.default_rng(0), []
    batch = next(Loader(scaled, len(scaled), shuffle=False).iterate())
    boxes = np.repeat(batch["boxes"], 4, axis=1)
    boxes += rng.normal(size=boxes.shape) * rng.choice([0.2, 2, 9], (*boxes.shape[:2], 1))
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    labels, scores = np.repeat(batch["box_label"], 4, axis=1), rng.random(boxes.shape[:2])
    detected = np.repeat(batch["box_valid"] & ~batch["ignore"], 4, axis=1)
    evaluator.add({"boxes": boxes, "labels": labels, "scores": scores, "detected": detected}, batch)
    for i, k in np.argwhere(detected):
        image = data["images"][i]
        down = round(image["height"] * 100 / 160) / image["height"]
        right = round(image["width"] * 100 / 160) / image["width"]
        x1, y1, x2, y2 = boxes[i, k] / [right, down, right, down]
        found.append({
            "image_id": image["id"], "category_id": 3 * int(labels[i, k]) + 2,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(scores[i, k]),
        })  # fmt: skip
    judge = cocoeval.COCOeval(truth, truth.loadRes(found), "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    np.testing.assert_allclose([*evaluator.result().values()], judge.stats, atol=1e-6)
    assert 0.1 < judge.stats[0] < 0.9 and judge.stats[3] > 0 and judge.stats[4] > 0


def test_a_mirror_swaps_left_and_right(photographs):
    root, _ = photographs
    record = source(root, keypoints=True)[0]
    assert record["keypoint_swap"].tolist() == [0, 2, 1]
    width = record["image"].shape[1]
    mirrored = fields.flip(record)
    before, after = record["keypoints"][0], mirrored["keypoints"][0]
    np.testing.assert_allclose(after[2, :2], [width - before[1, 0], before[1, 1]], rtol=1e-6)
    assert after[:, 2].tolist() == [2, 0, 1]
    names = ("nose", "left_eye", "right_eye", "left_ear", "tip_left_up", "tip_right_up")
    assert mirrored_points(names) == (0, 2, 1, 3, 5, 4)
    names = ("Left Eye", "Right Eye", "left-ear", "right-ear", "leftover", "rightover")
    assert mirrored_points(names) == (1, 0, 3, 2, 4, 5)


def test_too_many_objects_are_counted_and_said(photographs, caplog):
    root, _ = photographs
    with caplog.at_level(logging.WARNING, "cvjax"):
        found = source(root, max_instances=1)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert (
        "annotations.json: 3 images have more than max_instances=1 objects, up to 2: 3" in message
    )
    assert all(found[i]["boxes"].shape == (1, 4) for i in range(len(found)))
    caplog.clear()
    source(root, max_instances=2)
    assert not caplog.records


TINY = {
    "images": [
        {"id": 0, "file_name": "a.png", "height": 8, "width": 9},
        {"id": "b", "file_name": "b.png", "height": 8, "width": 9},
    ],
    "categories": [{"id": 4, "name": "four", "keypoints": ["p", "q"]}, {"id": 2, "name": "two"}],
    "annotations": [
        {
            "id": 5, "image_id": 0, "category_id": 4, "bbox": [1, 2, 3.5, 4], "iscrowd": 0,
            "area": 14, "segmentation": [[1, 2, 4.5, 2, 4.5, 6]], "keypoints": [2, 3, 2, 4, 5, 1],
        },
        {
            "id": 0, "image_id": "b", "category_id": 2, "bbox": [0, 0, 1, 1], "ignore": 1,
            "segmentation": {"size": [8, 9], "counts": [0, 1, 71]},
        },
    ],
}  # fmt: skip


def write_tiny(root, change=None):
    data = copy.deepcopy(TINY)
    if change:
        change(data)
    (root / "images").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((8, 9, 3), 90, np.uint8)).save(root / "images" / name)
    (root / "annotations.json").write_text(json.dumps(data))
    return root


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    source = Coco(tmp_path / "images", write_tiny(tmp_path) / "annotations.json", keypoints=True)

    def change(data):
        for entry in [*data["images"], *data["annotations"], *data["categories"]]:
            for key in ("id", "image_id", "category_id", "width", "height", "iscrowd", "ignore"):
                if isinstance(entry.get(key), int):
                    entry[key] = float(entry[key])
        data["annotations"][1]["keypoints"] = []

    (tmp_path / "floats").mkdir()
    write_tiny(tmp_path / "floats", change)
    same = Coco(tmp_path / "images", tmp_path / "floats/annotations.json", keypoints=True)
    assert len(same) == len(source) == 2
    for i in range(2):
        for name, value in source[i].items():
            np.testing.assert_array_equal(same[i][name], value, err_msg=name)


def put(*path, value):
    def change(data):
        *parents, last = path
        for step in parents:
            data = data[step]
        if value is KeyError:
            del data[last]
        else:
            data[last] = value

    return change


FIRST = "annotations.json: image a.png, annotation 5: "
BAD = {
    "no width": (put("annotations", 0, "bbox", 2, value=0), FIRST + ".*has no area"),
    "turned": (put("annotations", 0, "bbox", 3, value=-2), FIRST + ".*has no area"),
    "a hair": (put("annotations", 0, "bbox", 2, value=1e-30), FIRST + ".*has no area"),
    "NaN": (put("annotations", 0, "bbox", 0, value=float("nan")), FIRST + "its bbox is .*nan"),
    "infinite": (put("annotations", 0, "bbox", 2, value=float("inf")), FIRST + "its bbox is .*inf"),
    "three": (put("annotations", 0, "bbox", value=[1, 2, 3]), FIRST + "its bbox is .*x, y, width"),
    "text": (put("annotations", 0, "bbox", value="1 2 3 4"), FIRST + "its bbox is"),
    "no box": (put("annotations", 0, "bbox", value=KeyError), FIRST + "its bbox is None"),
    "beside": (put("annotations", 0, "bbox", 0, value=9), FIRST + ".*outside of .* 9 x 8"),
    "far": (put("annotations", 0, "bbox", 2, value=1e300), FIRST + ".*far beyond"),
    "label": (put("annotations", 0, "category_id", value=3), FIRST + "there is no category .* 3"),
    "label of text": (put("annotations", 0, "category_id", value=[4]), FIRST + ".*category_id"),
    "area": (put("annotations", 0, "area", value=-1), FIRST + "its area is -1"),
    "area NaN": (put("annotations", 0, "area", value=float("nan")), FIRST + "its area is nan"),
    "crowd": (put("annotations", 0, "iscrowd", value=2), FIRST + "its iscrowd is 2"),
    "two points": (
        put("annotations", 0, "segmentation", value=[[1, 2, 3, 4]]), FIRST + ".*has 4 numbers"),
    "no segmentation": (
        put("annotations", 0, "segmentation", value=KeyError), FIRST + "it has no segmentation"),
    "run lengths": (
        put("annotations", 1, "segmentation", "counts", value=[0, 1, 70]),
        "annotations.json: image b.png, annotation 0: .*run lengths of 71 pixels"),
    "one point more": (
        put("annotations", 0, "keypoints", value=[1, 2, 3]), FIRST + "its keypoints are"),
    "visibility": (put("annotations", 0, "keypoints", 2, value=3), FIRST + ".*visibility"),
    "point far": (put("annotations", 0, "keypoints", 0, value=1e9), FIRST + ".*far outside"),
    "no such image": (
        put("annotations", 0, "image_id", value=9), "json: annotation 5: there is no image .* 9"),
    "no entry": (put("annotations", 1, value=None), "annotation number 1: there is no image"),
    "missing image": (put("images", 0, "file_name", value="c.png"), "image c.png: it is not in"),
    "no name": (put("images", 0, "file_name", value=None), "image number 0: its file_name"),
    "no size": (put("images", 0, "height", value=0), "image a.png: it is 9 x 0 pixels"),
    "size of text": (put("images", 0, "width", value="9"), "image a.png: it is '9' x 8"),
    "large": (put("images", 0, "width", value=2**40), "image a.png: .*more than max_pixels"),
    "twice": (put("images", 1, "id", value=0), "image b.png: there are two images with the id 0"),
    "true": (put("images", 1, "id", value=True), r"has the id True.*whole number"),
    "image true": (put("annotations", 0, "image_id", value=True), "no image .* True"),
    "no id": (put("images", 1, "id", value=KeyError), r"b.png: .* has the id None.*whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_named_or_left_out_and_listed(tmp_path, name, caplog):
    change, message = BAD[name]
    root = write_tiny(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        source(root, masks=True, keypoints=True)
    assert "\n" not in str(caught.value) and str(root / "annotations.json") in str(caught.value)
    with caplog.at_level(logging.WARNING, "cvjax"):
        found = source(root, masks=True, keypoints=True, on_bad="skip")
    assert len(found.skipped) >= 1 and len(found) in (1, 2)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and found.skipped[0] in said[0]
    assert f"{len(found.skipped)} are bad and left out" in said[0]
    kept = sum(found[i]["box_valid"].sum() for i in range(len(found)))
    assert kept == 1


def test_what_is_not_asked_for_is_not_needed(tmp_path):
    for key in ("segmentation", "keypoints", "area", "iscrowd", "id"):
        root = write_tiny(tmp_path, put("annotations", 0, key, value=KeyError))
        record = source(root)[0]
        assert record["box_valid"].sum() == 1 and record["area"][0] == 14
    root = write_tiny(tmp_path, put("annotations", 0, "keypoints", value=KeyError))
    points = source(root, keypoints=True)[0]["keypoints"]
    assert points.shape == (100, 2, 3) and not points.any()
    assert source(root, channels=1)[0]["image"].shape == (8, 9, 1)


FILES = {
    "no JSON": ("{", "cannot be read as JSON"),
    "cut off": (json.dumps(TINY)[:200], "cannot be read as JSON"),
    "deep": ("[" * 100_000, "cannot be read as JSON"),
    "long number": ("1" * 5000, "cannot be read as JSON"),
    "a list": ("[]", "has no list 'images'"),
    "no categories": (json.dumps({**TINY, "categories": None}), "has no list 'categories'"),
    "empty": (json.dumps({**TINY, "images": [], "annotations": []}), "has no images"),
    "category": (json.dumps({**TINY, "categories": [{"id": "x"}]}), r"categories\[0\] is"),
    "none": (json.dumps({**TINY, "categories": []}), "has no categories"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_annotations(tmp_path, name):
    text, message = FILES[name]
    root = write_tiny(tmp_path)
    (root / "annotations.json").write_text(text)
    for on_bad in ("error", "skip"):
        with pytest.raises(InputError, match=message):
            source(root, on_bad=on_bad)


def test_settings_that_cannot_be(tmp_path):
    root = write_tiny(tmp_path)
    for options, message in (
        ({"on_bad": "skp"}, "it can be .error. or .skip."),
        ({"image_size": 0}, "size is 0"),
        ({"max_instances": 0}, "max_instances is 0"),
        ({"channels": 2}, "channels is 2"),
        ({"max_pixels": 20}, "more than max_pixels=20"),
    ):
        with pytest.raises(InputError, match=message):
            source(root, **options)
    with pytest.raises(InputError, match="none.json does not exist"):
        Coco(root / "images", root / "none.json")
    with pytest.raises(InputError, match="the folder .*nowhere does not exist"):
        Coco(root / "nowhere", root / "annotations.json")
    write_tiny(tmp_path, put("categories", 0, "keypoints", value=KeyError))
    with pytest.raises(InputError, match="0 kinds of keypoints"):
        source(root, keypoints=True)


def test_an_image_that_is_another_one_than_was_annotated(tmp_path):
    root = write_tiny(tmp_path)
    found = source(root)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(root / "images" / "a.png")
    with pytest.raises(
        InputError, match="a.png is 8 x 9 pixels, but its annotations are for 9 x 8"
    ):
        found[0]
    (root / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot decode .*a.png"):
        found[0]
    batch = next(Loader(found, 2, shuffle=False).iterate())
    assert batch["valid"].tolist() == [False, True]


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.integers(), st.floats(), st.text(max_size=4),
    st.just([]), st.just({}), st.lists(st.floats(-2, 12), max_size=8),
)  # fmt: skip


def places(node, path=()):
    """The paths of all that is in it."""
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children if isinstance(node, dict | list) else ():
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


PLACES = sorted(places(TINY), key=str)


def check_records(found):
    """Each record is one, in shape and in meaning."""
    for index in range(len(found)):
        try:
            record = found[index]
        except InputError:  # It is another image, or none, or of another size.
            continue
        height, width = record["image"].shape[:2]
        valid = record["box_valid"]
        boxes = record["boxes"][valid]
        assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, :2] < [width, height]).all() and (boxes[:, 2:] > 0).all()
        labels = record["box_label"][valid]
        assert ((labels >= 0) & (labels < len(found.class_names))).all()
        assert np.isfinite(record["area"]).all() and (record["area"] >= 0).all()
        for name in ("crowd", "ignore", "box_valid"):
            assert record[name].dtype == bool and record[name].shape == valid.shape
        if "masks" in record:
            assert record["masks"].shape == (len(valid), height, width)
            assert record["masks"].dtype == bool
            assert np.isfinite(record["keypoints"]).all()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("fuzz"))


quick = settings(max_examples=300, deadline=None, database=None)


def test_mutated_annotations_are_records_or_refused(fuzzed):
    read = 0

    @quick
    @given(st.lists(
        st.tuples(st.sampled_from(PLACES), leaves | st.just(KeyError)), min_size=1, max_size=3
    ))  # fmt: skip
    def check(changes):
        nonlocal read
        data = copy.deepcopy(TINY)
        for path, value in changes:
            try:
                put(*path, value=copy.deepcopy(value))(data)
            except (KeyError, IndexError, TypeError, AttributeError):
                continue  # An earlier change took the place away.
        (fuzzed / "annotations.json").write_text(json.dumps(data))
        for on_bad in ("error", "skip"):
            try:
                found = source(fuzzed, masks=True, keypoints=True, on_bad=on_bad)
            except InputError:
                continue
            read += 1
            check_records(found)

    check()
    assert read > 30


def test_mutated_text_is_records_or_refused(fuzzed):
    """Most of what is cut from JSON leaves none: digits for digits do."""
    read, text = 0, json.dumps(TINY).encode()
    digits = [place for place, letter in enumerate(text) if 48 <= letter < 58]
    new = st.from_regex(rb"\A[0-9]{0,2}\Z")
    mild = st.tuples(st.sampled_from(digits), st.just(1), new)
    rough = st.tuples(st.integers(0, 900), st.integers(0, 30), st.binary(max_size=4))

    @quick
    @given(st.lists(mild, min_size=1, max_size=3) | st.lists(rough, min_size=1, max_size=3))
    def check(cuts):
        nonlocal read
        changed = text
        for start, length, new in cuts:
            changed = changed[:start] + new + changed[start + length :]
        (fuzzed / "annotations.json").write_bytes(changed)
        try:
            found = source(fuzzed, masks=True, keypoints=True, on_bad="skip")
        except InputError:
            return
        read += 1
        check_records(found)

    check()
    assert read > 30


def test_augmented_batches_have_one_shape_whatever_is_left_in_the_images(photographs):
    root, _ = photographs
    found = source(root, masks=True, keypoints=True, max_instances=4)
    usual = partial(defaults.detection, size=(64, 80), scale=(0.3, 3.0))
    counts, shapes = set(), set()
    for number, batch in enumerate(Loader(found, 5, transforms=[usual]).iterate()):
        shapes.add(tuple((name, value.shape, value.dtype) for name, value in batch.items()))
        counts |= set(batch["box_valid"].sum(axis=1).tolist())
        for k in range(5):
            count = batch["box_valid"][k].sum()
            assert batch["box_valid"][k, :count].all()
            boxes = batch["boxes"][k, :count]
            assert (boxes >= 0).all() and (boxes <= [80, 64, 80, 64]).all()
            assert not batch["boxes"][k, count:].any() and not batch["masks"][k, count:].any()
            area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            assert (batch["area"][k, :count] <= 1.01 * area).all()
        if number == 15:
            break
    assert len(shapes) == 1 and counts == {0, 1, 2}


def test_mosaic_and_copy_paste_of_a_set_by_flags_alone(photographs):
    root, _ = photographs
    recipe = config.read(f"{ROOT / 'configs/retinanet.py'}:tiny")
    for kind, more in (("Mosaic", []), ("CopyPaste", [("source.masks", "True")])):
        flags = [
            ("type", f"data.sources.composed.{kind}"), ("size", "96"), ("max_instances", "9"),
            ("source.type", "data.sources.coco.Coco"), ("source.images", str(root / "images")),
            ("source.annotations", str(root / "annotations.json")), *more,
        ]  # fmt: skip
        given = config.override(recipe, [(f"data.train.{name}", text) for name, text in flags])
        made = build(config.buildable(given))["data"]["train"]
        batch = next(Loader(made, 4).iterate())
        assert batch["image"].shape == (4, 96, 96, 3) and batch["boxes"].shape == (4, 9, 4)
        assert made.class_names == CATEGORIES and batch["box_valid"].any()


def test_a_detector_trains_on_a_set_in_this_format_by_flags_alone(photographs, tmp_path, capfd):
    root, _ = photographs
    flags = [f"--config={ROOT / 'configs/retinanet.py'}:tiny", f"--workdir={tmp_path / 'run'}"]
    for name in ("train", "test"):
        flags += [
            f"--config.data.{name}.type=data.sources.coco.Coco",
            f"--config.data.{name}.images={root / 'images'}",
            f"--config.data.{name}.annotations={root / 'annotations.json'}",
            f"--config.data.{name}.image_size=96", f"--config.data.{name}.max_instances=4",
        ]  # fmt: skip
    flags.append("--config.batch_size=8")
    assert main.main(flags) == 0
    assert list((tmp_path / "run" / "pictures").glob("*.png"))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [value for row in rows for name, value in row.items() if name.endswith("/loss")]
    assert losses and np.isfinite(losses).all()
    assert main.main([*flags, f"--config.data.train.images={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere does not exist" in capfd.readouterr().err


def test_what_is_bad_is_skipped_by_one_flag_for_all_sources():
    recipe = config.read(f"{ROOT / 'configs/retinanet.py'}:tiny")
    types = [
        ("data.train.type", "data.sources.composed.Mosaic"),
        ("data.train.source.type", "data.sources.coco.Coco"),
        ("data.test.type", "data.sources.voc.VocDetection"),
    ]
    for flags in ([("data.on_bad", "skip"), *types], [*types, ("data.on_bad", "skip")]):
        data = config.override(recipe, flags).data
        assert data.train.source.on_bad == data.test.on_bad == "skip"
        assert "on_bad" not in data.train and "on_bad" not in data
    data = config.override(recipe, [*flags, ("data.test.on_bad", "error")]).data
    assert (data.train.source.on_bad, data.test.on_bad) == ("skip", "error")
    with pytest.raises(InputError, match="--config.data.on_bad: no such field"):
        config.override(recipe, [("data.on_bad", "skip")])
