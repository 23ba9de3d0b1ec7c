"""The XML in which PASCAL VOC, and many tools since, describe the boxes of an image."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cvjax.data.sources.coco_masks import short
from cvjax.data.sources.instances import check_box
from cvjax.errors import nearest


class Truth(NamedTuple):
    """What a file says of an image.

    Attributes:
        size: (height, width) in pixels.
        boxes: float64 [n, 4], x1 y1 x2 y2 in pixels, continuous coordinates.
        labels: n numbers of classes.
        difficult: n flags.
        faults: a line for each object that is bad and not among these.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: list[int]
    difficult: list[bool]
    faults: list[str]


def read_objects(content: bytes, class_names: Sequence[str], first_pixel: int = 1) -> Truth:
    """Reads an annotation file.

    Args:
        content: of the file.
        class_names: in the order of the labels.
        first_pixel: the number of the first pixel. With 1, as in VOC, xmax = 5 is the right edge of
            the fifth pixel; with 0 coordinates are continuous already.

    Raises:
        ValueError: it is no such XML, or has no size of the image.
    """
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"it cannot be read as XML: {error}") from error
    height, width = (_number(root, f"size/{side}") for side in ("height", "width"))
    if any(side != side // 1 or not 0 < side < 2**31 for side in (height, width)):
        raise ValueError(f"its size is {width:g} x {height:g} pixels")
    size = int(height), int(width)
    boxes, labels, difficult, faults = [], [], [], []
    for number, entry in enumerate(root.findall("object")):
        try:
            name = (entry.findtext("name") or "").strip()
            if name not in class_names:
                raise ValueError(f"its name is {short(name)}{nearest(name, class_names)}")
            x1, y1, x2, y2 = (
                _number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")
            )
            box = (x1 - first_pixel, y1 - first_pixel, x2, y2)
            check_box(box, *size, f"its box (xmin {x1:g}, ymin {y1:g}, xmax {x2:g}, ymax {y2:g})")
            is_difficult = (entry.findtext("difficult") or "0").strip()
            if is_difficult not in ("0", "1"):
                raise ValueError(f"its difficult is {short(is_difficult)}: it must be 0 or 1")
        except ValueError as error:
            faults.append(f"object {number}: {error}")
            continue
        boxes.append(box)
        labels.append(list(class_names).index(name))
        difficult.append(is_difficult == "1")
    return Truth(size, np.array(boxes, np.float64).reshape(-1, 4), labels, difficult, faults)


def _number(entry: ElementTree.Element, path: str) -> float:
    text = entry.findtext(path)
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f"its {path} is {short(text)}") from None
    if not math.isfinite(value):
        raise ValueError(f"its {path} is {short(text)}")
    return value
