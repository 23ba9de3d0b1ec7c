"""Flips, crops, changes of size, rotations, affine maps and perspectives, drawn at random.

Each draws its numbers once and moves all fields together (`fields.py`). `size` is the side of a
square or (height, width); `fill` is a value of the image, or one for each channel; `interpolation`
is that of the image: "nearest", "bilinear" or "bicubic".
"""

import math
from collections.abc import Sequence

import numpy as np

from cvjax.checks import (
    Size,
    check_between,
    check_count,
    check_range,
    height_and_width,
)
from cvjax.data.sources import Example
from cvjax.data.transforms import fields
from cvjax.data.transforms.fields import Fill
from cvjax.errors import InputError


def random_flip(
    example: Example,
    rng: np.random.Generator,
    *,
    p: float = 0.5,
    swap: Sequence[int] | None = None,
) -> Example:
    """Mirrors left and right with probability p; `swap` is explained in `fields.flip`."""
    check_between(0, 1, p=p)
    return fields.flip(example, swap=swap) if rng.random() < p else fields.visible(example)


def random_vertical_flip(example: Example, rng: np.random.Generator, *, p: float = 0.5) -> Example:
    """Mirrors top and bottom with probability p."""
    check_between(0, 1, p=p)
    return fields.flip(example, vertical=True) if rng.random() < p else fields.visible(example)


def random_quarter_turn(example: Example, rng: np.random.Generator) -> Example:
    """Turns by 0, 90, 180 or 270 degrees with equal chance, without loss."""
    return fields.quarter_turn(example, int(rng.integers(4)))


def center_crop(
    example: Example, rng: np.random.Generator, *, size: Size, fill: Fill | str = 0
) -> Example:
    """Cuts out the middle, rounded as in torchvision; beyond the image is `fill`."""
    new = height_and_width(size)
    slack = [a - b for a, b in zip(fields.image_of(example).shape[:2], new, strict=True)]
    top, left = (round(s / 2) if s > 0 else -(-s // 2) for s in slack)
    return fields.crop(example, top, left, *new, fill)


def random_crop(
    example: Example,
    rng: np.random.Generator,
    *,
    size: Size | None = None,
    padding: int = 0,
    fill: Fill | str = 0,
) -> Example:
    """Cuts out a window, anywhere with equal chance.

    Args:
        example: fields as in `cvjax.data.transforms`.
        rng: draws the place.
        size: of the window; None is that of the image. Where it is larger than the image, the
            image lies whole in it, anywhere.
        padding: pixels added to each side of the image before.
        fill: of these pixels; "reflect" continues the image by its mirror image.
    """
    check_count(0, padding=padding)
    old = fields.image_of(example).shape[:2]
    new = old if size is None else height_and_width(size)
    slack = [have + 2 * padding - want for have, want in zip(old, new, strict=True)]
    top, left = (int(rng.integers(min(s, 0), max(s, 0) + 1)) - padding for s in slack)
    return fields.crop(example, top, left, *new, fill)


def resize(
    example: Example,
    rng: np.random.Generator,
    *,
    size: Size,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Example:
    """Stretches to `size`, as `fields.resize`."""
    return fields.resize(example, size, interpolation=interpolation, antialias=antialias)


def resize_shorter(
    example: Example,
    rng: np.random.Generator,
    *,
    size: int,
    longest: int | None = None,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Example:
    """Makes the shorter side `size` pixels, or less where the other would be above `longest`.

    The other keeps the proportion, and fractions of a pixel are cut off, as in torchvision.
    """
    check_count(1, size=size, longest=1 if longest is None else longest)
    height, width = fields.image_of(example).shape[:2]
    shorter, longer = size, size * max(height, width) // min(height, width)
    if longest is not None and longer > longest:
        shorter, longer = max(1, longest * shorter // longer), longest
    new = (shorter, longer) if height <= width else (longer, shorter)
    return fields.resize(example, new, interpolation=interpolation, antialias=antialias)


def resize_and_pad(
    example: Example,
    rng: np.random.Generator,
    *,
    size: Size,
    fill: Fill = 0,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Example:
    """Scales the image to fit inside `size` and adds `fill` on the right or below."""
    return _scale_and_place(example, None, size, 1.0, fill, interpolation, antialias)


def random_scale_crop(
    example: Example,
    rng: np.random.Generator,
    *,
    size: Size,
    scale: tuple[float, float] = (0.5, 2.0),
    fill: Fill = 0,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Example:
    """Scales by a random factor and cuts out `size`: large-scale jitter.

    At factor 1 the image just fits inside `size`; above, a random part is cut out; below, it lies
    anywhere in `fill`. With scale (0.1, 2.0) it is that of G. Ghiasi et al.: Simple Copy-Paste
    (https://arxiv.org/abs/2012.07177, section 3), but for the place.
    """
    check_range(1e-3, 1e3, scale=scale)
    factor = rng.uniform(*scale)
    return _scale_and_place(example, rng, size, factor, fill, interpolation, antialias)


def _scale_and_place(
    example: Example,
    rng: np.random.Generator | None,
    size: Size,
    factor: float,
    fill: Fill,
    interpolation: str,
    antialias: bool,
) -> Example:
    height, width = height_and_width(size)
    old_height, old_width = fields.image_of(example).shape[:2]
    factor *= min(height / old_height, width / old_width)
    new = max(1, round(old_height * factor)), max(1, round(old_width * factor))
    example = fields.resize(example, new, interpolation=interpolation, antialias=antialias)
    if rng is None:
        return fields.crop(example, 0, 0, height, width, fill)
    return random_crop(example, rng, size=(height, width), fill=fill)


def random_resized_crop(
    example: Example,
    rng: np.random.Generator,
    *,
    size: Size,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Example:
    """Cuts out a part of random area and shape and stretches it to `size`.

    C. Szegedy et al.: Going deeper with convolutions (https://arxiv.org/abs/1409.4842, section 6),
    as in torchvision: ten attempts, then the largest part in the middle that `ratio` allows.

    Args:
        example: fields as in `cvjax.data.transforms`.
        rng: draws the area uniformly, the logarithm of the ratio uniformly, and the place.
        size: of the result.
        scale: least and largest share of the image's area.
        ratio: least and largest width / height.
        interpolation: as in `fields.resize`.
        antialias: as in `fields.resize`.
    """
    check_range(0, 1, scale=scale)
    check_range(1e-3, 1e3, ratio=ratio)
    height, width = fields.image_of(example).shape[:2]
    window = _window(height, width, rng, scale, ratio)
    cut = fields.crop(example, *window)
    return fields.resize(cut, size, interpolation=interpolation, antialias=antialias)


def _window(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of a part of the image."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        new_height, new_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < new_height <= height and 0 < new_width <= width:
            top = int(rng.integers(height - new_height + 1))
            left = int(rng.integers(width - new_width + 1))
            return top, left, new_height, new_width
    new_height, new_width = height, width
    if width / height < ratio[0]:
        new_height = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        new_width = max(1, min(width, round(height * ratio[1])))
    return (height - new_height) // 2, (width - new_width) // 2, new_height, new_width


def affine_matrix(
    image_size: tuple[int, int],
    *,
    degrees: float = 0.0,
    scale: float = 1.0,
    shear: tuple[float, float] = (0.0, 0.0),
    pixels: tuple[float, float] = (0.0, 0.0),
    center: tuple[float, float] | None = None,
) -> np.ndarray:
    """Returns the 3x3 matrix that shears, scales and turns about a centre, and then moves.

    Args:
        image_size: (height, width); its middle is the centre if no other is given.
        degrees: to turn, clockwise as one sees it.
        scale: above 1 enlarges.
        shear: two angles in degrees: x loses tan(first) * y, then y loses tan(second) * x.
        pixels: to move, right and down.
        center: (x, y), the point that stays but for the move.
    """
    height, width = image_size
    angle, (shear_x, shear_y) = math.radians(degrees), map(math.radians, shear)
    sine, cosine = math.sin(angle), math.cos(angle)
    linear = (
        scale
        * np.array([[cosine, -sine], [sine, cosine]])
        @ np.array([[1, 0], [-math.tan(shear_y), 1]])
        @ np.array([[1, -math.tan(shear_x)], [0, 1]])
    )
    middle = np.array((width / 2, height / 2) if center is None else center)
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = middle + pixels - linear @ middle
    return matrix


def perspective_matrix(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Returns the 3x3 matrix that takes four points [4, 2], x and y, to four others."""
    # For each point, (x', y') times the third row of the matrix are the first two; the last entry
    # is set to 1.
    rows = []
    for (x, y), (to_x, to_y) in zip(start, end, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -to_x * x, -to_x * y], [0, 0, 0, x, y, 1, -to_y * x, -to_y * y]]
    solution = np.linalg.solve(np.array(rows, np.float64), np.ravel(end).astype(np.float64))
    return np.append(solution, 1.0).reshape(3, 3)


def random_affine(
    example: Example,
    rng: np.random.Generator,
    *,
    degrees: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    pixels: float = 0.0,
    shear: float = 0.0,
    fill: Fill = 0,
    interpolation: str = "bilinear",
) -> Example:
    """Shears, scales and turns about the image's centre and then moves.

    Args:
        example: fields as in `cvjax.data.transforms`.
        rng: draws each number uniformly.
        degrees: the largest angle to either side.
        scale: the smallest and the largest factor; above 1 enlarges.
        pixels: the largest move, along each axis, to either side.
        shear: the largest angle of shearing, in degrees, along each axis, to either side.
        fill: of what comes into view.
        interpolation: of the image.
    """
    check_between(0, 360, degrees=degrees)
    check_range(1e-3, 1e3, scale=scale)
    check_between(0, 1e6, pixels=pixels)
    check_between(0, 80, shear=shear)
    matrix = affine_matrix(
        fields.image_of(example).shape[:2],
        degrees=rng.uniform(-degrees, degrees),
        scale=rng.uniform(*scale),
        pixels=rng.uniform(-pixels, pixels, size=2),
        shear=rng.uniform(-shear, shear, size=2),
    )
    return fields.warp(example, matrix, fill=fill, interpolation=interpolation)


def random_rotation(
    example: Example,
    rng: np.random.Generator,
    *,
    degrees: float,
    fill: Fill = 0,
    interpolation: str = "bilinear",
) -> Example:
    """Turns about the image's centre by up to `degrees` to either side."""
    return random_affine(example, rng, degrees=degrees, fill=fill, interpolation=interpolation)


def random_perspective(
    example: Example,
    rng: np.random.Generator,
    *,
    distortion: float = 0.5,
    p: float = 0.5,
    fill: Fill = 0,
    interpolation: str = "bilinear",
) -> Example:
    """Moves each corner inwards, with probability p, by up to `distortion` of half the image.

    From two thirds on the four corners could form a quadrangle that is no view of a rectangle.
    """
    check_between(0, 1, p=p)
    check_between(0, 0.66, distortion=distortion)
    fields.check_sampling(example, fill, interpolation)
    if rng.random() >= p:
        return fields.visible(example)
    height, width = fields.image_of(example).shape[:2]
    start = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    end = start + inwards * rng.uniform(0, distortion / 2, size=(4, 2)) * [width, height]
    return fields.warp(
        example, perspective_matrix(start, end), fill=fill, interpolation=interpolation
    )


def drop_small_boxes(example: Example, rng: np.random.Generator, *, pixels: float = 1.0) -> Example:
    """Drops each object whose box is narrower or lower than that."""
    check_between(0, math.inf, pixels=pixels)
    if "boxes" not in example:
        raise InputError("drop_small_boxes needs a field boxes, and there is none")
    x1, y1, x2, y2 = example["boxes"].T
    keep = (x2 - x1 >= pixels) & (y2 - y1 >= pixels)
    return fields.kept(example, keep)
