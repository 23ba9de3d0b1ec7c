"""The reader of VOC's boxes: what it reads, what it refuses, and the archive it may come in."""

import logging
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cvjax.data.loader import Loader
from cvjax.data.sources.voc import VOC_OBJECTS, VocDetection
from cvjax.data.sources.voc_xml import read_objects
from cvjax.errors import InputError

OBJECT = (
    "<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>"
    "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
    "</bndbox></part><bndbox><xmax>{x2}</xmax><xmin>{x1}</xmin><ymax>{y2}</ymax><ymin>{y1}</ymin>"
    "</bndbox></object>"
)


def one(name="dog", x1=3, y1=2, x2=8, y2=9, difficult=0):
    return OBJECT.format(name=name, x1=x1, y1=y1, x2=x2, y2=y2, difficult=difficult)


def xml(*objects, width=12, height=10):
    return (
        f"<annotation><filename>x.jpg</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>{''.join(objects)}</annotation>"
    )


TRUTH = {
    "2008_000001": xml(one(), one("tvmonitor", 1, 1, 12, 10, difficult=1)),
    "2008_000002": xml(),
    "2008_000003": xml(one("person", 4, 4, 4, 4), one("cat", 1.5, 2.5, 7.5, 8)),
}


def make_voc(root, truth=TRUTH):
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in truth.items():
        Image.fromarray(np.full((10, 12, 3), 90, np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(text)
    (root / "ImageSets/Main/train.txt").write_text("\n".join(truth) + "\n")
    (root / "ImageSets/Main/dog_train.txt").write_text("\n".join(f"{n} -1" for n in truth))
    return root


def test_boxes_count_pixels_from_one_and_what_is_difficult_is_ignored(tmp_path):
    make_voc(tmp_path / "VOCdevkit" / "VOC2008")
    source = VocDetection(tmp_path, max_instances=3)
    assert len(source) == 3 and source.class_names == VOC_OBJECTS and len(VOC_OBJECTS) == 20
    record = source[0]
    assert record["image"].shape == (10, 12, 3) and record["box_valid"].tolist() == [1, 1, 0]
    np.testing.assert_array_equal(record["boxes"], [[2, 1, 8, 9], [0, 0, 12, 10], [0, 0, 0, 0]])
    assert [VOC_OBJECTS[k] for k in record["box_label"][:2]] == ["dog", "tvmonitor"]
    assert record["ignore"].tolist() == [0, 1, 0] and not record["crowd"].any()
    assert record["area"].tolist() == [48, 120, 0]
    assert not source[1]["box_valid"].any()
    # One pixel is a box of one pixel.
    np.testing.assert_allclose(source[2]["boxes"][:2], [[3, 3, 4, 4], [0.5, 1.5, 7.5, 8]])
    assert source.example_id(2) == "2008_000003"
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[2]["boxes"], source[2]["boxes"])
    assert len(VocDetection(tmp_path, "dog_train")) == 3
    from_zero = VocDetection(tmp_path, max_instances=3, first_pixel=0, on_bad="skip")
    np.testing.assert_array_equal(from_zero[0]["boxes"][:2], [[3, 2, 8, 9], [1, 1, 12, 10]])
    with pytest.raises(InputError, match="first_pixel is 2; it must be 0 or 1"):
        VocDetection(tmp_path, first_pixel=2)
    batch = next(Loader(VocDetection(tmp_path, image_size=24), 3).iterate())
    assert batch["image"].shape == (3, 24, 24, 3) and batch["boxes"].shape == (3, 50, 4)


def test_the_archive_is_unpacked_once(tmp_path, monkeypatch):
    make_voc(tmp_path / "content" / "VOC2007")
    with tarfile.open(tmp_path / "VOC.tar", "w") as file:
        file.add(tmp_path / "content", "VOCdevkit")
    calls, extract = [], tarfile.TarFile.extractall
    monkeypatch.setattr(
        tarfile.TarFile, "extractall", lambda *a, **k: calls.append(1) or extract(*a, **k)
    )
    for _ in range(2):
        source = VocDetection(tmp_path / "VOC.tar")
    assert calls == [1] and source[0]["box_valid"].sum() == 2


BAD = {
    "turned": (xml(one(x1=9)), "object 0: its box .xmin 9, .* has no area"),
    "no box": (
        xml(one(), "<object><name>cat</name></object>"),
        "object 1: its bndbox/xmin is None",
    ),
    "NaN": (xml(one(x1="nan")), "object 0: its bndbox/xmin is 'nan'"),
    "text": (xml(one(x1="three")), "its bndbox/xmin is 'three'"),
    "infinite": (xml(one(x2="1e999")), "its bndbox/xmax is '1e999'"),
    "class": (xml(one("dgo")), r"its name is 'dgo' \(did you mean dog"),
    "no class": (xml(one("")), "its name is ''"),
    "outside": (xml(one(x1=20, x2=24)), "outside of the image of 12 x 10"),
    "far": (xml(one(x2=4000)), "far beyond"),
    "difficult": (xml(one(difficult=2)), "its difficult is '2'"),
    "no XML": ("<annotation>", "cannot be read as XML"),
    "empty": ("", "cannot be read as XML"),
    "no size": ("<annotation></annotation>", "its size/height is None"),
    "no pixels": (xml(width=0), "its size is 0 x 10"),
    "half a pixel": (xml(height=0.5), "its size is 12 x 0.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_named_or_left_out_and_listed(tmp_path, name, caplog):
    text, message = BAD[name]
    make_voc(tmp_path, {"a": xml(one()), "b": text})
    with pytest.raises(InputError, match=rf"Annotations/b.xml: image b.jpg.*{message}") as caught:
        VocDetection(tmp_path)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "cvjax"):
        found = VocDetection(tmp_path, on_bad="skip")
    assert len(found.skipped) == 1 and "b.xml" in found.skipped[0]
    assert "1 are bad and left out" in caplog.records[0].getMessage()
    assert found[0]["box_valid"].sum() == 1


def test_files_that_are_missing_or_of_another_size(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets/Main/third.txt").write_text("2008_000003")
    (tmp_path / "ImageSets/Main/broken.txt").write_bytes(b"\xff\xfe\x80")
    Image.fromarray(np.zeros((12, 10, 3), np.uint8)).save(tmp_path / "JPEGImages/2008_000001.jpg")
    with pytest.raises(InputError, match="2008_000001.jpg is 10 x 12 pixels, but .* 12 x 10"):
        VocDetection(tmp_path)[0]
    (tmp_path / "JPEGImages/2008_000001.jpg").unlink()
    with pytest.raises(InputError, match="image 2008_000001.jpg: it is not in"):
        VocDetection(tmp_path)
    assert len(VocDetection(tmp_path, on_bad="skip")) == 2
    (tmp_path / "Annotations/2008_000002.xml").unlink()
    skipped = VocDetection(tmp_path, on_bad="skip").skipped
    assert len(skipped) == 2 and "image 2008_000002.jpg has no annotation" in skipped[1]
    (tmp_path / "Annotations/2008_000003.xml").unlink()
    with pytest.raises(InputError, match="no image of 'train' that is not bad"):
        VocDetection(tmp_path, on_bad="skip")
    (tmp_path / "Annotations/2008_000003.xml").mkdir()
    with pytest.raises(InputError, match="2008_000003.xml: image 2008_000003.jpg: .*irectory"):
        VocDetection(tmp_path, "third")
    with pytest.raises(InputError, match="image .*.jpg has no annotation"):
        VocDetection(tmp_path, "broken")
    with pytest.raises(InputError, match="did you mean train"):
        VocDetection(tmp_path, "trian")
    with pytest.raises(InputError, match="has no ImageSets/Main"):
        VocDetection(tmp_path / "JPEGImages")


def test_too_many_objects_are_said_and_coordinates_may_be_continuous(tmp_path, caplog):
    make_voc(tmp_path)
    with caplog.at_level(logging.WARNING, "cvjax"):
        source = VocDetection(tmp_path, max_instances=1)
    assert source[0]["boxes"].shape == (1, 4)
    assert "2 images have more than max_instances=1" in caplog.records[0].getMessage()
    truth = read_objects(xml(one()).encode(), ["dog"], first_pixel=0)
    np.testing.assert_array_equal(truth.boxes, [[3, 2, 8, 9]])


def test_mutated_files_are_objects_or_refused():
    read = 0
    pieces = [
        b"nan", b"-1", b"<object>", b"</object>", b"1e9", b"&amp;", b"&x;", b"\x00",
        b"<?xml version='1.0' encoding='utf-7'?>", b"<?xml version='1.0' encoding='x'?>",
    ]  # fmt: skip
    new = st.binary(max_size=4) | st.sampled_from(pieces)
    rough = st.tuples(st.integers(0, 900), st.integers(0, 40), new)
    whole = TRUTH["2008_000001"].encode()
    digits = [place for place, letter in enumerate(whole) if 48 <= letter < 58]
    mild = st.tuples(st.sampled_from(digits), st.just(1), st.from_regex(rb"\A[0-9]{1,2}\Z"))

    @settings(max_examples=300, deadline=None, database=None)
    @given(
        st.lists(mild, min_size=1, max_size=3) | st.lists(rough, min_size=1, max_size=3),
        st.sampled_from([b"", b"", b"<?xml version='1.0' encoding='idna'?>", b"\xff\xfe"]),
    )
    def check(cuts, start):
        nonlocal read
        text = whole
        for place, length, new in cuts:
            text = text[:place] + new + text[place + length :]
        try:
            truth = read_objects(start + text, VOC_OBJECTS)
        except ValueError:
            return
        read += 1
        count = len(truth.labels)
        assert truth.boxes.shape == (count, 4) and len(truth.difficult) == count
        height, width = truth.size
        assert height > 0 and width > 0 and np.isfinite(truth.boxes).all()
        assert (truth.boxes[:, 2:] > truth.boxes[:, :2]).all()
        assert (truth.boxes[:, :2] < [width, height]).all() and (truth.boxes[:, 2:] > 0).all()
        assert all(0 <= label < 20 for label in truth.labels)

    check()
    assert read > 15
