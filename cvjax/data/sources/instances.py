"""What the sources of detection have in common: one image, one size, one number of rows.

A record of a set with boxes, whatever its format, whose rows are n = `max_instances` objects in the
order of the file and then zeros:

    image      uint8 [h, w, channels]
    boxes      float32 [n, 4], x1 y1 x2 y2 in pixels, continuous coordinates
    box_label  int32 [n], 0..classes - 1          box_valid  bool [n]
    crowd      bool [n], many objects in one box  ignore     bool [n], not to be counted
    area       float32 [n], of each object in pixels
    masks      bool [n, h, w]                     keypoints  float32 [n, k, 3]   where asked for
    scale      float32, how long a pixel of the file is in this image
    keypoint_swap  int32 [k], the point that each becomes in a mirror            with keypoints
"""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from cvjax.checks import Size, check_choice, check_count, height_and_width
from cvjax.data.sources import Example
from cvjax.data.sources.pictures import read_picture, upright
from cvjax.data.transforms import fields, geometry
from cvjax.errors import InputError

log = logging.getLogger("cvjax")

_SHOWN = 10  # lines of a list
_ON_BAD = ("error", "skip")


@dataclasses.dataclass
class LeftOut:
    """Counts the objects for which there were no rows, and says so at 1, 2, 4, 8, ... images."""

    name: str
    rows: int
    images: int = 0
    objects: int = 0
    most: int = 0

    def add(self, count: int, *, silent: bool = False) -> None:
        """Notes an image with `count` objects."""
        if count <= self.rows:
            return
        self.images += 1
        self.objects += count - self.rows
        self.most = max(self.most, count)
        if not silent and self.images & (self.images - 1) == 0:
            self.say()

    def say(self) -> None:
        """Says how many objects were left out until now, if there were any."""
        if self.images:
            log.warning(
                "%s: %d images have more than max_instances=%d objects, up to %d: %d objects are "
                "left out", self.name, self.images, self.rows, self.most, self.objects,
            )  # fmt: skip


class Faults:
    """What is wrong with a set: an error at the first, or (`on_bad="skip"`) a list of all."""

    def __init__(self, on_bad: str):
        check_choice(_ON_BAD, on_bad=on_bad)
        self.on_bad = on_bad
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Notes a fault, which names file, image and annotation."""
        if self.on_bad == "error":
            raise InputError(f"{line} (on_bad='skip' leaves out what is bad)")
        self.lines.append(line)

    def say(self, what: str) -> None:
        """Says how many there are and shows the first."""
        if self.lines:
            more = len(self.lines) - _SHOWN
            rest = [f"and {more} more, all in the field `skipped`"] if more > 0 else []
            log.warning(
                "%s: %d are bad and left out:\n  %s",
                what, len(self.lines), "\n  ".join(self.lines[:_SHOWN] + rest),
            )  # fmt: skip


def check_settings(
    channels: int, image_size: Size | None, max_instances: int, max_pixels: int
) -> None:
    """Raises InputError for a number that makes no sense."""
    check_choice((1, 3), channels=channels)
    if image_size is not None:
        height_and_width(image_size)
    check_count(1, max_instances=max_instances, max_pixels=max_pixels)


def check_box(box: Sequence[float], height: int, width: int, what: str) -> None:
    """Raises ValueError unless a box, x1 y1 x2 y2, has an area in an image of this size.

    It may reach beyond the image, but not by more than the image is long.
    """
    x1, y1, x2, y2 = np.clip(box, -1e30, 1e30).astype(np.float32)
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"{what} has no area")
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise ValueError(f"{what} is outside of the image of {width} x {height} pixels")
    reach = max(height, width)
    if min(x1, y1) < -reach or max(x2, y2) > 2 * reach:
        raise ValueError(f"{what} reaches far beyond the image of {width} x {height} pixels")


def read_image(
    file: str | pathlib.Path, channels: int, max_pixels: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Reads a file: uint8 [h, w, channels], upright as its EXIF orientation says.

    Raises InputError where it is damaged, larger than `max_pixels`, or of another `size`, (height,
    width), than its annotations say; OSError where it cannot be read.
    """
    array = np.atleast_3d(read_picture(file, max_pixels, partial(upright, channels=channels)))
    if size is not None and array.shape[:2] != size:
        raise InputError(
            f"{file} is {array.shape[1]} x {array.shape[0]} pixels, but its annotations are for "
            f"{size[1]} x {size[0]}"
        )
    return array


def record(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    *,
    rows: int,
    image_size: Size | None = None,
    crowd: Sequence[bool] | None = None,
    ignore: Sequence[bool] | None = None,
    area: Sequence[float] | None = None,
    **more: np.ndarray,
) -> Example:
    """Makes a record of one image and its objects.

    Args:
        image: uint8 [h, w, c].
        boxes: [n, 4], x1 y1 x2 y2 in pixels of the image.
        labels: n integers.
        rows: of the record. What is beyond is cut off: count it before.
        image_size: None keeps the image as it is; else it is scaled to fit inside (height, width),
            or the side of a square, with black on the right or below, and all moves with it.
        crowd: None is of none.
        ignore: likewise.
        area: None is that of the boxes.
        **more: other fields, as they are.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    count = len(boxes)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if area is None else area
    example = {
        "image": image,
        "boxes": boxes.astype(np.float32),
        "box_label": np.asarray(labels, np.int32).reshape(count),
        "box_valid": np.ones(count, bool),
        "crowd": np.zeros(count, bool) if crowd is None else np.asarray(crowd, bool),
        "ignore": np.zeros(count, bool) if ignore is None else np.asarray(ignore, bool),
        "area": np.asarray(area, np.float32),
        "scale": np.float32(1),
        **more,
    }
    example = fields.padded(example, min(rows, count))
    if image_size is not None:
        example = geometry.resize_and_pad(example, None, size=image_size)
    return fields.padded(example, rows)
