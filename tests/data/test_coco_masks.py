"""Polygons and run lengths against pycocotools, pixel for pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvjax.data.sources.coco_masks import draw_outline, read_outline

judge = pytest.importorskip("pycocotools.mask")


def drawn(segmentation, height, width):
    return draw_outline(read_outline(segmentation, height, width), height, width)


def by_pycocotools(polygons, height, width):
    return judge.decode(judge.merge(judge.frPyObjects(polygons, height, width))).astype(bool)


def polygon(rng, height, width, kind):
    points = rng.uniform(-0.3, 1.3, (rng.integers(3, 12), 2)) * [width, height]
    if kind == "whole":
        points = points.round()
    elif kind == "middle of pixels":
        points = points.round() + 0.5
    elif kind == "tenths":  # and so on the border between two steps of a fifth
        points = (points * 10).round() / 10
    elif kind == "twice":
        points = points.repeat(2, axis=0)
    elif kind == "on a line":
        points[:, 1] = points[0, 1]
    elif kind == "there and back":
        points = np.concatenate([points, points[::-1]])
    elif kind == "inside":
        points = points.clip(0, [width, height])
    return points.ravel().tolist()


KINDS = (
    "any", "whole", "middle of pixels", "tenths", "twice", "on a line", "there and back", "inside",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_polygons_are_those_of_pycocotools(kind):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(150):
        height, width = (int(side) for side in rng.integers(1, 70, 2))
        side = max(height, width)
        polygons = [polygon(rng, height, width, kind) for _ in range(rng.integers(1, 4))]
        if min(map(min, polygons)) < -side or max(map(max, polygons)) > 2 * side:
            continue
        expected = by_pycocotools(polygons, height, width)
        np.testing.assert_array_equal(drawn(polygons, height, width), expected)
        covered += expected.mean()
    assert covered > 5 or kind in ("on a line", "there and back")


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.floats(-20, 40, width=32), min_size=6, max_size=14).filter(lambda p: not len(p) % 2)
)
def test_any_polygon_is_that_of_pycocotools(points):
    expected = by_pycocotools([points], 20, 17)
    np.testing.assert_array_equal(drawn([points], 20, 17), expected)


def test_a_rectangle_covers_its_pixels():
    mask = drawn([[2, 1, 5, 1, 5, 4, 2, 4]], 6, 7)
    expected = np.zeros((6, 7), bool)
    expected[1:4, 2:5] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_run_lengths_as_list_and_as_string(share):
    rng = np.random.default_rng(1)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = rng.random((height, width)) < share
        text = judge.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        np.testing.assert_array_equal(
            drawn({"size": [height, width], "counts": text}, height, width), mask
        )
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        runs = {"size": [height, width], "counts": counts}
        np.testing.assert_array_equal(drawn(runs, height, width), mask)
        again = judge.decode(judge.frPyObjects(runs, height, width))
        np.testing.assert_array_equal(again.astype(bool), mask)


BAD = {
    "nothing": ([], "must be polygons"),
    "a number": (3, "must be polygons"),
    "two points": ([[1, 2, 3, 4]], "has 4 numbers: a polygon is x and y of at least 3"),
    "half a point": ([[1, 2, 3, 4, 5, 6, 7]], "has 7 numbers"),
    "second of two": ([[1, 2, 3, 4, 5, 6], [1, 2]], r"segmentation\[1\] has 2"),
    "NaN": ([[1, 2, 3, 4, 5, float("nan")]], "finite numbers"),
    "infinite": ([[1, 2, 3, 4, 5, float("inf")]], "finite numbers"),
    "huge": ([[1, 2, 3, 4, 5, 10**400]], "finite numbers"),
    "far": ([[1, 2, 3, 4, 5, 1e9]], "far outside of the image of 7 x 6 pixels"),
    "words": ([["a"] * 6], "finite numbers"),
    "flat": ([1, 2, 3, 4, 5, 6], r"segmentation\[0\] is 1"),
    "no size": ({"counts": [42]}, "has the size None"),
    "other size": ({"size": [7, 6], "counts": [42]}, r"the image has \[6, 7\]"),
    "no counts": ({"size": [6, 7]}, "counts None"),
    "too short": ({"size": [6, 7], "counts": [20, 21]}, "run lengths of 41 pixels.*has 42"),
    "too long": ({"size": [6, 7], "counts": [20, 23]}, "run lengths of 43 pixels"),
    "negative": ({"size": [6, 7], "counts": [50, -8]}, "not negative"),
    "fractions": ({"size": [6, 7], "counts": [41.5, 0.5]}, "not negative"),
    "no letters": ({"size": [6, 7], "counts": "ö"}, "no string of run lengths"),
    "cut off": ({"size": [6, 7], "counts": "P"}, "is cut off"),
    "endless": ({"size": [6, 7], "counts": "o" * 99}, "no string of run lengths"),
    "short string": ({"size": [6, 7], "counts": "1"}, "run lengths of 1 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_segmentation(name):
    segmentation, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_outline(segmentation, 6, 7)
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_a_string_with_letters_changed_is_a_mask_or_refused():
    """One is another, or one is more by what another is less: this can be a mask of the size."""
    compared = 0

    @settings(max_examples=300, deadline=None, database=None)
    @given(
        st.lists(st.booleans(), min_size=12, max_size=12), st.integers(0, 11),
        st.sampled_from([-1, 1]) | st.characters(min_codepoint=46, max_codepoint=113),
    )  # fmt: skip
    def compare(pixels, place, change):
        nonlocal compared
        mask = np.asfortranarray(np.array(pixels, np.uint8).reshape(3, 4))
        text = judge.encode(mask)["counts"].decode()
        letters, one, other = list(text), place % len(text), (place + 1) % len(text)
        if isinstance(change, int):
            letters[one] = chr(ord(letters[one]) + change)
            letters[other] = chr(ord(letters[other]) - change)
        else:
            letters[one] = change
        changed = "".join(letters)
        try:
            found = drawn({"size": [3, 4], "counts": changed}, 3, 4)
        except ValueError:
            assert changed != text
            return
        compared += changed != text
        expected = judge.decode({"size": [3, 4], "counts": changed.encode()})
        np.testing.assert_array_equal(found, expected.astype(bool))

    compare()
    assert compared > 5
