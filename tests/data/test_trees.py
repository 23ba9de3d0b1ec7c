"""Windows of photographs with boxes: of the package where it is installed, of painted ones else."""

import importlib.util
import pickle

import numpy as np
import pytest
from PIL import Image

from cvjax.data.sources import trees
from cvjax.data.sources.trees import Trees
from cvjax.errors import InputError


def write(folder, name, boxes, size=(520, 450)):
    """A black photograph of size (width, height) in which each tree is a bright rectangle."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    objects = ""
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = 200
        objects += (
            f"<object><name>Tree</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    Image.fromarray(image).save(folder / f"{name}.png")
    (folder / f"{name}.xml").write_text(
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}"
        "</annotation>"
    )


@pytest.fixture
def folder(tmp_path):
    trees._photograph.cache_clear()
    # One tree inside of the first window, one of which 30 of 100 columns are in it, one of 60.
    boxes = [(20, 30, 60, 80), (170, 100, 270, 120), (140, 10, 240, 20)]
    for name in (name for names in trees._PHOTOGRAPHS.values() for name in names):
        write(tmp_path, name, boxes)
    yield tmp_path
    trees._photograph.cache_clear()


def test_windows_side_by_side_in_the_test(folder):
    source = Trees("test", window=200, path=folder, max_instances=4)
    assert len(source) == 2 * 2 * 2 and source.class_names == ("tree",)
    first = source[0]
    assert first["image"].shape == (200, 200, 3)
    expected = [[20, 30, 60, 80], [170, 100, 200, 120], [140, 10, 200, 20], [0, 0, 0, 0]]
    np.testing.assert_array_equal(first["boxes"], expected)
    assert first["ignore"].tolist() == [False, True, False, False]
    assert first["area"][:3].tolist() == [2000, 600, 600]
    second = source[1]
    np.testing.assert_array_equal(second["boxes"][:2], [[0, 100, 70, 120], [0, 10, 40, 20]])
    assert second["ignore"][:2].tolist() == [False, True]
    assert source.example_id(3).endswith("crop.png at x 200, y 200")
    with pytest.raises(IndexError):
        source[8]


def test_windows_anywhere_in_training_are_functions_of_their_index(folder):
    source = Trees(path=folder, window=150, count=40)
    again = pickle.loads(pickle.dumps(source))
    seen, ids = 0, set()
    for index in range(40):
        record = source[index]
        for name, value in again[39 - index].items():
            np.testing.assert_array_equal(value, source[39 - index][name])
        bright = record["image"][..., 0] > 0
        painted = np.zeros_like(bright)
        for x1, y1, x2, y2 in record["boxes"][record["box_valid"]].astype(int):
            painted[y1:y2, x1:x2] = True
        np.testing.assert_array_equal(bright, painted)
        assert not record["ignore"].any() and record["box_label"].max() == 0
        seen += record["box_valid"].sum()
        ids.add(source.example_id(index))
    assert seen > 10 and len(ids) == 40
    assert {Trees(path=folder, seed=1).example_id(0)} - {Trees(path=folder).example_id(0)}


def test_what_cannot_be_used_is_one_line(folder, monkeypatch):
    for fields, message in (
        ({"split": "tset"}, "it can be .train. or .test."), ({"window": 401}, "window=401"),
        ({"window": 0}, "window is 0"), ({"count": 0}, "count is 0"), ({"seed": -1}, "seed is -1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Trees(path=folder, **fields)
    (folder / "OSBS_029.xml").write_text("<annotation>")
    with pytest.raises(InputError, match="OSBS_029.xml: it cannot be read as XML"):
        Trees("test", path=folder)
    (folder / "SOAP_061.png").unlink()
    with pytest.raises(InputError, match="SOAP_061.png cannot be read: No such file"):
        Trees("train", path=folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps deepforest"):
        Trees()


def test_the_photographs_of_the_package():
    if importlib.util.find_spec("deepforest") is None:
        pytest.skip("deepforest is not installed (pip install --no-deps deepforest)")
    counts = {}
    for split in ("train", "test"):
        source = Trees(split)
        counts[split] = [len(trees._photograph(file)["boxes"]) for file in source._files]
        assert source[0]["image"].shape == (192, 192, 3)
    assert counts == {"train": [574, 37], "test": [279, 61]}
