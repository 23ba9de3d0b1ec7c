"""Composed scenes for detection: real digits that partly hide each other, exactly annotated.

A scene is a function of (split, seed, index) alone: a smooth texture, clutter, and one to six
digits of MNIST from back to front, each turned, scaled, coloured and put anywhere inside. Boxes,
masks and areas are those of the ink that is seen, as annotators of COCO draw them: what a later
digit covers belongs to that one. A digit of which less than half would be seen is not placed.
"""

import dataclasses

import numpy as np

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example, drawing
from cvjax.data.sources.digits import Digits

_SPLITS = ("train", "test")
_DIGITS = (1, 6)  # the fewest and the most that a scene is meant to have
_SCALE = (1.0, 2.8)  # of a digit: MNIST's 20 x 20 pixels become 20 to 56
_CLUTTER = 6  # the most pieces
_LEAST_SEEN = 0.5  # of the ink of each digit


@dataclasses.dataclass(frozen=True)
class DetectionScenes:
    """Scenes of 1 to 6 digits that may overlap; the same index is the same scene.

    Scenes of "train" are made of the 4,000 training digits of `cvjax.data.sources.digits.Digits`
    alone, those of "test" of its 1,000 held-out ones. A record, whose rows are n = `max_instances`
    objects, back to front, then zeros:

      image: uint8 [size, size, 3].
      boxes: float32 [n, 4], x1, y1, x2, y2 in pixels, around the pixels of the mask.
      box_label: int32 [n], 0..9.  box_valid: bool [n].
      masks: bool [n, size, size]: pixels of which the digit covers more than half and no digit
        in front of it does. Only with `masks`.
      keypoints: float32 [n, 4, 3]: x, y in pixels and visibility of the top, bottom, left and right
        end of the whole stroke: centre of the outermost row (column) of pixels, middle one of those
        that are covered there. Visibility is 2 where that pixel is seen, 1 where a digit in front
        hides it. Only with `keypoints`, and then there is
      keypoint_swap: int32 [4], left for right: what a mirror from left to right does to the names.
        Upside down, or turned, the ends of a stroke have other names than these.

    Attributes:
        split: "train" or "test".
        count: how many scenes there are.
        size: height and width in pixels, at least 64.
        seed: of the scenes.
        max_instances: rows of a record, at least 6, so that no digit is ever left out.
        masks: whether records have them.
        keypoints: whether records have them.

    Raises:
        InputError: no such split, or a number that makes no sense.
    """

    split: str = "train"
    count: int = 20_000
    size: int = 128
    seed: int = 0
    max_instances: int = 6
    masks: bool = False
    keypoints: bool = False

    def __post_init__(self) -> None:
        check_choices(self, split=_SPLITS)
        check_at_least(self, count=1, size=64, seed=0, max_instances=_DIGITS[1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """The ends of a stroke, in the order of the keypoints."""
        return ("top", "bottom", "left", "right")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} is not in 0..{self.count - 1}")
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), index))
        digits = Digits(self.split)
        canvas = drawing.ground(rng, self.size, digits, _CLUTTER)
        strokes: list[np.ndarray] = []  # bool [size, size], whole ones, back to front
        labels: list[int] = []
        for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
            digit = digits[int(rng.integers(len(digits)))]
            cover = drawing.find_place(
                rng, digit["image"][..., 0], self.size, _SCALE,
                lambda cover: _are_seen([*strokes, cover > 0.5]),
            )  # fmt: skip
            if cover is None:
                continue
            drawing.paint(canvas, cover, drawing.bright(rng))
            strokes.append(cover > 0.5)
            labels.append(int(digit["label"]))
        return {"image": drawing.photograph(rng, canvas), **self._truth(strokes, labels)}

    def _truth(self, strokes: list[np.ndarray], labels: list[int]) -> Example:
        rows = self.max_instances
        seen = _seen(strokes)
        boxes, points = np.zeros((rows, 4), np.float32), np.zeros((rows, 4, 3), np.float32)
        masks = np.zeros((rows, self.size, self.size), bool)
        label = np.zeros(rows, np.int32)
        for row, (stroke, mask) in enumerate(zip(strokes, seen, strict=True)):
            y, x = np.nonzero(mask)
            boxes[row] = x.min(), y.min(), x.max() + 1, y.max() + 1
            masks[row], label[row] = mask, labels[row]
            for k, (px, py) in enumerate(_ends(stroke)):
                points[row, k] = px + 0.5, py + 0.5, 2 if mask[py, px] else 1
        record = {"boxes": boxes, "box_label": label, "box_valid": np.arange(rows) < len(labels)}
        if self.masks:
            record["masks"] = masks
        if self.keypoints:
            record["keypoints"], record["keypoint_swap"] = points, np.array([0, 1, 3, 2], np.int32)
        return record


def _seen(strokes: list[np.ndarray]) -> list[np.ndarray]:
    """What is seen of each stroke, bool [h, w], of several from back to front."""
    seen = []
    hidden = np.zeros_like(strokes[0]) if strokes else None
    for stroke in reversed(strokes):
        seen.append(stroke & ~hidden)
        hidden = hidden | stroke
    return seen[::-1]


def _are_seen(strokes: list[np.ndarray]) -> bool:
    """Whether the last stroke has ink, and of each, from back to front, enough is seen."""
    shares = [
        mask.sum() / max(stroke.sum(), 1)
        for stroke, mask in zip(strokes, _seen(strokes), strict=True)
    ]
    return strokes[-1].any() and min(shares) >= _LEAST_SEEN


def _ends(stroke: np.ndarray) -> list[tuple[int, int]]:
    """Pixels (x, y) of a stroke, bool [h, w]: in its first and last row, first and last column."""
    y, x = np.nonzero(stroke)
    ends = []
    for of, value in ((y, y.min()), (y, y.max()), (x, x.min()), (x, x.max())):
        there = np.flatnonzero(of == value)
        # In the order of the other axis; its middle one is a pixel of the stroke, as a mean is not.
        there = there[np.argsort((x if of is y else y)[there], kind="stable")]
        middle = there[len(there) // 2]
        ends.append((int(x[middle]), int(y[middle])))
    return ends
