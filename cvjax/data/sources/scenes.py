"""Composed scenes: real digits on textured ground among clutter, with exact masks.

A scene is a function of (split, seed, index) alone. From the bottom up it has a smooth random
texture; clutter, which are scraps of digits, lines and discs; and two to four digits of MNIST, each
turned, scaled, coloured and put somewhere at random. A pixel belongs to the digit that covers more
than half of it; digits may touch, but none hides such a pixel of another.
"""

import dataclasses

import numpy as np

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example, drawing
from cvjax.data.sources.digits import Digits
from cvjax.errors import InputError, nearest

_SPLITS = ("train", "test")
_FIELDS = ("image", "mask", "instance", "boxes", "present")
_DIGITS = (2, 4)  # the fewest and the most that are placed in a scene
_SCALE = (1.5, 2.4)  # of a digit: MNIST's 20 x 20 pixels become 30 to 48
_CLUTTER = 8  # the most pieces


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes of several digits, made when they are asked for; the same index is the same scene.

    Scenes of the split "train" are made of the 4,000 training digits of
    `cvjax.data.sources.digits.Digits` alone, those of "test" of its 1,000 held-out ones.

    The fields of a record, of which `fields` names those that are wanted:
      image: uint8 [size, size, 3].
      mask: uint8 [size, size]: 0 is the ground, the clutter too, and 1 + d is the digit d.
      instance: uint8 [size, size]: 0 is the ground, k is the k-th digit of the scene.
      boxes: three arrays of 4 rows, those of digits first, k-th digit in row k - 1:
        `boxes`, float32 [4, 4], x1, y1, x2, y2 in pixels, around the pixels that are seen;
        `box_label`, int32 [4], 0..9; `box_valid`, bool [4], False in the rows that are padding.
      present: uint8 [10], 1 where that digit is seen in the scene.

    Attributes:
        split: "train" or "test".
        count: how many scenes there are.
        size: height and width in pixels, at least 64.
        seed: of the scenes.
        fields: what a record has.

    Raises:
        InputError: no such split or field, or a number that makes no sense.
    """

    split: str = "train"
    count: int = 20_000
    size: int = 96
    seed: int = 0
    fields: tuple[str, ...] = ("image", "mask", "instance")

    def __post_init__(self) -> None:
        check_choices(self, split=_SPLITS)
        for field in self.fields:
            if field not in _FIELDS:
                raise InputError(f"fields: a scene has no {field!r}{nearest(field, _FIELDS)}")
        check_at_least(self, count=1, size=64, seed=0)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the mask; without a mask among the fields, those of the boxes."""
        return ("ground", *"0123456789") if "mask" in self.fields else tuple("0123456789")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} is not in 0..{self.count - 1}")
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), index))
        digits = Digits(self.split)
        canvas = drawing.ground(rng, self.size, digits, _CLUTTER)
        instance = np.zeros((self.size, self.size), np.uint8)
        labels: list[int] = []
        for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
            digit = digits[int(rng.integers(len(digits)))]
            cover = drawing.find_place(
                rng, digit["image"][..., 0], self.size, _SCALE,
                lambda cover: not instance[cover > 0.5].any(),
            )  # fmt: skip
            if cover is None:
                continue
            labels.append(int(digit["label"]))
            drawing.paint(canvas, cover, drawing.bright(rng))
            instance[cover > 0.5] = len(labels)
        mask = np.array([0, *(1 + label for label in labels)], np.uint8)[instance]
        record = {
            "image": drawing.photograph(rng, canvas),
            "mask": mask,
            "instance": instance,
            "present": (np.bincount(mask.ravel(), minlength=11)[1:] > 0).astype(np.uint8),
        }
        example = {field: record[field] for field in self.fields if field != "boxes"}
        return {**example, **_boxes(instance, labels)} if "boxes" in self.fields else example


def _boxes(instance: np.ndarray, labels: list[int]) -> Example:
    """The boxes around the instances, padded to the most that a scene can have."""
    boxes = np.zeros((_DIGITS[1], 4), np.float32)
    box_label, box_valid = np.zeros(_DIGITS[1], np.int32), np.zeros(_DIGITS[1], bool)
    for row, label in enumerate(labels):
        y, x = np.nonzero(instance == row + 1)
        boxes[row] = x.min(), y.min(), x.max() + 1, y.max() + 1
        box_label[row], box_valid[row] = label, True
    return {"boxes": boxes, "box_label": box_label, "box_valid": box_valid}
