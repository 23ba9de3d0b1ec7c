"""Real digits, drawn in another way, with a caption that says how: "a small seven, tilted left"."""

import dataclasses

import numpy as np
from PIL import Image, ImageFilter

from cvjax.checks import check_at_least, check_choices
from cvjax.data.captions import encode
from cvjax.data.sources import Example
from cvjax.data.sources.digits import Digits
from cvjax.errors import InputError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", "an", "small", "large", "bold", *NAMES, ",", "tilted", "left", "right")
LENGTH = 8  # words in the longest caption, and one to spare

_SPLITS = ("train", "test")
_SIZES = {"small": 0.7, "": 0.9, "large": 1.1}  # of a digit; MNIST's are 20 pixels of 28
_TILTS = {"left": 25.0, "": 0.0, "right": -25.0}  # degrees, anticlockwise: the top goes left
_JITTER = 0.05, 4.0  # of size and tilt, uniform, so that no two are quite alike


@dataclasses.dataclass(frozen=True)
class CaptionedDigits:
    """Digits of `Digits`, each small, large or neither, bold or not, tilted left, right or not.

    Record i is a function of (split, seed, i) alone. Its digit is one of the 4,000 of MNIST's
    "train" or the 1,000 of its "test"; all are used equally often. Every way of drawing is as
    likely as any other. The fields of a record:
      image: uint8 [image_size, image_size, 1], white on black.
      tokens: int32 [8], the caption (`cvjax.data.captions`): "a bold five, tilted right".
      label: int32 in 0..9, the digit.

    Attributes:
        split: "train" or "test".
        count: how many records there are.
        image_size: in pixels, 28 or a divisor of it: squares of pixels are averaged.
        words: the vocabulary, in the order of its tokens.
        seed: of the ways of drawing.

    Raises:
        InputError: no such split, a number that cannot be, a vocabulary without a word that the
            captions need.
    """

    split: str = "train"
    count: int = 20_000
    image_size: int = 28
    words: tuple[str, ...] = WORDS
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self, split=_SPLITS)
        check_at_least(self, count=1)
        if self.image_size < 1 or 28 % self.image_size:
            raise InputError(f"image_size={self.image_size} must divide 28")
        for word in WORDS:
            if word not in self.words:
                raise InputError(f"words: the captions need {word!r}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"record {index} is not in 0..{self.count - 1}")
        digits = Digits(self.split)
        digit = digits[index % len(digits)]
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), index))
        size, tilt = (str(rng.choice(list(choices))) for choices in (_SIZES, _TILTS))
        is_bold = bool(rng.integers(2))
        scale, degrees = rng.uniform(-1, 1, 2) * _JITTER + (_SIZES[size], _TILTS[tilt])
        image = drawn(digit["image"], scale, degrees, is_bold)
        if self.image_size < 28:
            shape = (self.image_size, self.image_size)
            image = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BOX))
        text = caption(int(digit["label"]), size, is_bold, tilt)
        return {
            "image": image[..., None],
            "tokens": encode(text, self.words, LENGTH),
            "label": digit["label"],
        }


def caption(digit: int, size: str = "", is_bold: bool = False, tilt: str = "") -> str:
    """The caption of a digit: `size` "small", "large" or "", `tilt` "left", "right" or ""."""
    words = [word for word in (size, "bold" if is_bold else "", NAMES[digit]) if word]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words]) + (f", tilted {tilt}" if tilt else "")


def drawn(image: np.ndarray, scale: float, degrees: float, is_bold: bool) -> np.ndarray:
    """uint8 [28, 28, 1] -> [28, 28]: scaled and turned (anticlockwise) about its centre.

    A bold digit is one pixel wider on all sides, before it is scaled.
    """
    picture = Image.fromarray(image[..., 0])
    if is_bold:
        picture = picture.filter(ImageFilter.MaxFilter(3))
    # Where each pixel of the new picture comes from; y goes down.
    turn = np.deg2rad(degrees)
    cos, sin = np.cos(turn) / scale, np.sin(turn) / scale
    centre = 14.0
    matrix = (
        cos, -sin, centre - cos * centre + sin * centre,
        sin, cos, centre - sin * centre - cos * centre,
    )  # fmt: skip
    return np.asarray(
        picture.transform((28, 28), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    )
