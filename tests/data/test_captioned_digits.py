"""Digits with captions: the picture is what the caption says."""

import numpy as np
import pytest

from cvjax.data.captions import decode, encode
from cvjax.data.sources.captioned_digits import LENGTH, WORDS, CaptionedDigits, caption, drawn
from cvjax.data.sources.digits import Digits
from cvjax.errors import InputError


def test_captions_and_back():
    assert caption(7, "small", True, "left") == "a small bold seven, tilted left"
    assert caption(8) == "an eight" and caption(8, is_bold=True) == "a bold eight"
    tokens = encode("A small  seven, tilted left", WORDS, LENGTH)
    assert tokens.dtype == np.int32 and tokens.shape == (LENGTH,)
    assert [WORDS[t - 1] for t in tokens[:6]] == ["a", "small", "seven", ",", "tilted", "left"]
    assert list(tokens[6:]) == [0, 0]
    assert decode(tokens, WORDS) == "a small seven, tilted left"
    assert not encode("", WORDS, LENGTH).any()
    with pytest.raises(InputError, match="'sevn' is unknown.*seven"):
        encode("a sevn", WORDS, LENGTH)
    with pytest.raises(InputError, match="has 6 words; 5 is the most"):
        encode("a small seven, tilted left", WORDS, 5)


def stroke(upright=True):
    image = np.zeros((28, 28, 1), np.uint8)
    image[(slice(6, 22), slice(13, 15)) if upright else (slice(13, 15), slice(6, 22))] = 255
    return image


def test_ways_of_drawing():
    """A stroke in the middle: where its ends go, how long and how wide it becomes."""
    same = drawn(stroke(), 1.0, 0.0, False)
    np.testing.assert_array_equal(same, stroke()[..., 0])
    # Turned by a quarter it is the other stroke, turned to the left its top goes left.
    quarter = drawn(stroke(), 1.0, 90.0, False).astype(int)
    np.testing.assert_allclose(quarter, stroke(False)[..., 0], atol=1)
    left = drawn(stroke(), 1.0, 25.0, False).astype(float)
    columns = np.arange(28) + 0.5
    top, bottom = (
        left[rows].sum(0) @ columns / left[rows].sum() for rows in (slice(0, 11), slice(17, 28))
    )
    assert top < 13 and bottom > 15
    np.testing.assert_allclose((top + bottom) / 2, 14, atol=0.1)
    for scale in (0.7, 1.1):
        square = np.zeros((28, 28, 1), np.uint8)
        square[8:20, 8:20] = 255
        mass = drawn(square, scale, 0.0, False).sum(dtype=float) / square.sum(dtype=float)
        np.testing.assert_allclose(mass, scale**2, rtol=0.08)  # its edges are resampled
    assert (drawn(stroke(), 1.0, 0.0, True) > 0).sum() == 4 * 18


def test_records_are_what_they_say():
    source = CaptionedDigits("train", count=300)
    records = [source[i] for i in range(300)]
    assert len(source) == 300 and records[0]["image"].shape == (28, 28, 1)
    for i in (0, 17, 299):
        again = CaptionedDigits("train", count=300)[i]
        assert all(np.array_equal(again[name], records[i][name]) for name in again)
    said = [decode(record["tokens"], WORDS) for record in records]
    names = "zero one two three four five six seven eight nine".split()
    assert all(names[r["label"]] in text for r, text in zip(records, said, strict=True))
    assert [int(r["label"]) for r in records] == [
        int(Digits("train")[i]["label"]) for i in range(300)
    ]
    share = {
        word: np.mean([word in text.replace(",", "").split() for text in said]) for word in WORDS
    }
    # 4 standard errors of a share of 300.
    for word, expected in dict(
        small=1 / 3, large=1 / 3, bold=1 / 2, left=1 / 3, right=1 / 3
    ).items():
        np.testing.assert_allclose(share[word], expected, atol=0.12)
    ink = np.array([record["image"].mean() for record in records])
    of = lambda word: ink[[word in text for text in said]].mean()  # noqa: E731
    assert of("small") < 0.7 * of("large") and of("bold") > 1.2 * ink.mean()


def test_small_images_are_means_of_the_large():
    large, small = CaptionedDigits("test"), CaptionedDigits("test", image_size=14)
    for i in (0, 5):
        expected = large[i]["image"].reshape(14, 2, 14, 2, 1).mean(axis=(1, 3))
        np.testing.assert_allclose(small[i]["image"], expected, atol=1.01)  # rounded twice
        np.testing.assert_array_equal(small[i]["tokens"], large[i]["tokens"])


@pytest.mark.parametrize(
    "wrong", [dict(split="trian"), dict(count=0), dict(image_size=15), dict(words=WORDS[1:])]
)
def test_impossible_fields(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        CaptionedDigits(**wrong)
    with pytest.raises(IndexError):
        CaptionedDigits(count=3)[3]
