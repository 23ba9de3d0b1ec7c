"""The masks of COCO: polygons and run lengths, pixel for pixel as pycocotools draws them.

A mask is told column by column, from top to bottom and from left to right. Run lengths are those of
pixels outside and inside in turn, the first outside; a string of them has six bits in each letter.
"""

import math

import numpy as np

# Vertices are rounded to this many steps in a pixel, and edges are lines of such steps.
_STEPS = 5
_RANGE = range(48, 48 + 64)  # the letters of a string of run lengths

Outline = list[np.ndarray] | np.ndarray  # polygons float64 [n, 2], or run lengths int64 [m]


def read_outline(segmentation: object, height: int, width: int) -> Outline:
    """Checks the `segmentation` of an annotation and makes arrays of it.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...], of which the mask is the union; or a
            dict with `size`, [height, width], and `counts`, a list or a string of run lengths.
        height: of the image, in pixels.
        width: likewise.

    Raises:
        ValueError: it is nothing of that, or does not fit the image.
    """
    if isinstance(segmentation, dict):
        return _read_runs(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"segmentation is {short(segmentation)}: it must be polygons or a dict")
    polygons = []
    for number, polygon in enumerate(segmentation):
        where = f"segmentation[{number}]"
        if not is_numbers(polygon):
            raise ValueError(f"{where} is {short(polygon)}: a polygon is a list of finite numbers")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"{where} has {len(polygon)} numbers: a polygon is x and y of at least 3 points"
            )
        points = np.array(polygon, np.float64).reshape(-1, 2)
        reach = max(height, width)
        if points.min() < -reach or points.max() > 2 * reach:
            raise ValueError(
                f"{where} reaches from {points.min():g} to {points.max():g}, far outside of the "
                f"image of {width} x {height} pixels"
            )
        polygons.append(points)
    return polygons


def draw_outline(outline: Outline, height: int, width: int) -> np.ndarray:
    """The mask, bool [height, width], of what `read_outline` made for this size."""
    if isinstance(outline, np.ndarray):
        inside = np.arange(len(outline)) % 2 == 1
        return np.repeat(inside, outline).reshape(width, height).T
    mask = np.zeros((height, width), bool)
    for polygon in outline:
        mask |= _draw_polygon(polygon, height, width)
    return mask


def _draw_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    x, y = np.int64(_STEPS * points.T + 0.5)  # towards zero, as in C
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    dx, dy = abs(x2 - x), abs(y2 - y)
    is_flat = dx >= dy
    # Each edge goes one step at a time along its longer side, and upwards in it: one from a to b
    # has the same points as one from b to a.
    is_turned = np.where(is_flat, x > x2, y > y2)
    from_x, to_x = np.where(is_turned, x2, x), np.where(is_turned, x, x2)
    from_y, to_y = np.where(is_turned, y2, y), np.where(is_turned, y, y2)
    steps = np.maximum(dx, dy)
    slope = np.where(is_flat, to_y - from_y, to_x - from_x) / np.maximum(steps, 1)
    count = steps + 1
    edge = np.repeat(np.arange(len(x)), count)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    step = np.where(is_turned[edge], steps[edge] - step, step)
    along = np.where(is_flat, from_x, from_y)[edge] + step
    across = np.int64(np.where(is_flat, from_y, from_x)[edge] + slope[edge] * step + 0.5)
    u = np.where(is_flat[edge], along, across)
    v = np.where(is_flat[edge], across, along)

    # Where the line passes the middle of a column, what is below changes sides.
    left, right = u[:-1], u[1:]
    column = (np.where(right < left, right, right - 1) + 0.5) / _STEPS - 0.5
    row = (np.minimum(v[:-1], v[1:]) + 0.5) / _STEPS - 0.5
    is_crossing = (left != right) & (np.floor(column) == column)
    is_crossing &= (column >= 0) & (column <= width - 1)
    row = np.ceil(np.clip(row[is_crossing], 0, height)).astype(np.int64)
    place = column[is_crossing].astype(np.int64) * height + row
    changes = np.bincount(place, minlength=height * width + 1)[: height * width]
    return (np.cumsum(changes) % 2 == 1).reshape(width, height).T


def _read_runs(segmentation: dict, height: int, width: int) -> np.ndarray:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(
            f"segmentation has the size {short(size)}: the image has [{height}, {width}]"
        )
    if isinstance(counts, str):
        counts = _decode(counts)
    if not is_numbers(counts) or any(type(n) is not int or n < 0 for n in counts):
        raise ValueError(
            f"segmentation has counts {short(counts)}: run lengths are whole and not negative"
        )
    if sum(counts) != height * width:
        raise ValueError(
            f"segmentation has run lengths of {sum(counts)} pixels: the image of {width} x "
            f"{height} has {height * width}"
        )
    return np.array(counts, np.int64)


def _decode(text: str) -> list[int]:
    """Run lengths from their string: five bits in each letter, the low ones first.

    The sixth bit says that more letters follow, the highest one of the last that the number is
    negative. From the fourth on it is the difference to the run before the last.
    """
    counts: list[int] = []
    value = bits = 0
    for letter in text:
        if ord(letter) not in _RANGE or bits > 60:
            raise ValueError(f"segmentation has counts {short(text)}: no string of run lengths")
        code = ord(letter) - _RANGE.start
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        value -= (code & 16) << (bits - 4)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError(f"segmentation has counts {short(text)}: the string is cut off")
    return counts


def is_numbers(values: object) -> bool:
    """Whether this is a list of finite numbers."""
    return isinstance(values, list) and all(
        abs(value) < 2**53 if type(value) is int else type(value) is float and math.isfinite(value)
        for value in values
    )


def short(value: object) -> str:
    """The value as it is shown in a message of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
