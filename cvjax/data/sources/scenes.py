"""Composed scenes: real digits on textured ground among clutter, with exact masks.

A scene is a function of (split, seed, index) alone. From the bottom up it has a smooth random
texture; clutter, which are scraps of digits, lines and discs; and two to four digits of MNIST, each
turned, scaled, coloured and put somewhere at random. A pixel belongs to the digit that covers more
than half of it; digits may touch, but none hides such a pixel of another.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example
from cvjax.data.sources.digits import Digits
from cvjax.errors import InputError, nearest

_SPLITS = ("train", "test")
_FIELDS = ("image", "mask", "instance", "boxes", "present")
_DIGITS = (2, 4)  # the fewest and the most that are placed in a scene
_SCALE = (1.5, 2.4)  # of a digit: MNIST's 20 x 20 pixels become 30 to 48
_DEGREES = 15.0  # the largest turn: a 6 shall not become a 9
_CLUTTER = 8  # the most pieces
_ATTEMPTS = 8  # at finding a place for a digit before it is left out


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
        canvas = _texture(rng, self.size)
        for _ in range(rng.integers(_CLUTTER + 1)):
            _paint(canvas, _scrap(rng, self.size, digits), _bright(rng))

        instance = np.zeros((self.size, self.size), np.uint8)
        labels: list[int] = []
        for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
            digit = digits[int(rng.integers(len(digits)))]
            cover = _find_place(rng, digit["image"][..., 0], instance)
            if cover is None:
                continue
            labels.append(int(digit["label"]))
            _paint(canvas, cover, _bright(rng))
            instance[cover > 0.5] = len(labels)
        canvas += np.float32(0.03) * rng.standard_normal(canvas.shape, np.float32)

        mask = np.array([0, *(1 + label for label in labels)], np.uint8)[instance]
        record = {
            "image": np.rint(255 * np.clip(canvas, 0.0, 1.0)).astype(np.uint8),
            "mask": mask,
            "instance": instance,
            "present": (np.bincount(mask.ravel(), minlength=11)[1:] > 0).astype(np.uint8),
        }
        example = {field: record[field] for field in self.fields if field != "boxes"}
        return {**example, **_boxes(instance, labels)} if "boxes" in self.fields else example


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise of three grain sizes about a dark colour, float32 [size, size, 3]."""
    texture = np.full((size, size, 3), 1 - _bright(rng))
    for cells, strength in ((3, 0.15), (8, 0.08), (24, 0.06)):
        noise = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
        planes = [
            Image.fromarray(noise[..., i]).resize((size, size), Image.Resampling.BICUBIC)
            for i in range(3)
        ]
        texture += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return texture


def _bright(rng: np.random.Generator) -> np.ndarray:
    """A colour of digits and clutter, float32 [3]."""
    return rng.uniform(0.6, 1.0, 3).astype(np.float32)


def _paint(canvas: np.ndarray, cover: np.ndarray, color: np.ndarray) -> None:
    """Blends a colour into the canvas by the share of each pixel that is covered, [h, w]."""
    rows, columns = (np.flatnonzero(cover.any(axis=axis)) for axis in (1, 0))
    if rows.size:
        # Only the part that is covered somewhere: a digit is a small part of a scene.
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        canvas[part] += cover[part][..., None] * (color - canvas[part])


def _scrap(rng: np.random.Generator, size: int, digits: Digits) -> np.ndarray:
    """A piece of clutter: how much of each pixel it covers, float32 [size, size]."""
    kind = rng.integers(4)
    if kind < 2:  # A square cut out of a digit: strokes as real as those that count.
        top, left = rng.integers(0, 20, 2)
        part = digits[int(rng.integers(len(digits)))]["image"][top : top + 9, left : left + 9, 0]
        return _warp(part, rng.uniform(0, 2 * np.pi), rng.uniform(*_SCALE),
                     rng.uniform(0, size, 2), size)  # fmt: skip
    picture = Image.new("L", (2 * size, 2 * size))  # Drawn at twice the size: smooth edges.
    draw = ImageDraw.Draw(picture)
    x, y = rng.uniform(0, 2 * size, 2)
    if kind == 2:
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(10, 30)  # No 1 is as short.
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        draw.line([(x, y), end], fill=255, width=int(rng.integers(3, 9)))
    else:
        radius = rng.uniform(4, 12)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    small = picture.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _find_place(
    rng: np.random.Generator, digit: np.ndarray, instance: np.ndarray
) -> np.ndarray | None:
    """What a digit covers of each pixel, wholly inside the scene; None when there is no room."""
    size = len(instance)
    for _ in range(_ATTEMPTS):
        angle = np.deg2rad(rng.uniform(-_DEGREES, _DEGREES))
        scale = rng.uniform(*_SCALE)
        # Half of MNIST's 20 x 20 box in which each digit lies, turned.
        reach = 10 * scale * (np.cos(angle) + abs(np.sin(angle)))
        if reach > size / 2:
            continue
        cover = _warp(digit, angle, scale, rng.uniform(reach, size - reach, 2), size)
        if not instance[cover > 0.5].any():
            return cover
    return None


def _warp(
    patch: np.ndarray, angle: float, scale: float, centre: np.ndarray, size: int
) -> np.ndarray:
    """Turns and scales a patch, uint8 [h, w], and puts its middle at `centre`, x and y in pixels.

    Returns float32 [size, size] in [0, 1], 0 outside of the patch.
    """
    height, width = patch.shape
    # Pillow wants, for each pixel of the result, where in the patch it comes from.
    inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    offset = np.array([width, height]) / 2 - inverse @ centre
    matrix = np.column_stack([inverse, offset]).ravel().tolist()
    warped = Image.fromarray(np.ascontiguousarray(patch)).transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(warped, np.float32) / 255


def _boxes(instance: np.ndarray, labels: list[int]) -> Example:
    """The boxes around the instances, padded to the most that a scene can have."""
    boxes = np.zeros((_DIGITS[1], 4), np.float32)
    box_label, box_valid = np.zeros(_DIGITS[1], np.int32), np.zeros(_DIGITS[1], bool)
    for row, label in enumerate(labels):
        y, x = np.nonzero(instance == row + 1)
        boxes[row] = x.min(), y.min(), x.max() + 1, y.max() + 1
        box_label[row], box_valid[row] = label, True
    return {"boxes": boxes, "box_label": box_label, "box_valid": box_valid}
