"""What composed scenes are drawn with: a textured ground with clutter, and digits upon it.

A canvas is float32 [size, size, 3]; a cover, float32 [size, size], is how much of each pixel is
covered. All is drawn from the generator that is handed in.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from cvjax.data.sources.digits import Digits

_DEGREES = 15.0  # the largest turn of a digit: a 6 shall not become a 9
_ATTEMPTS = 8  # at finding a place for a digit before it is left out
_SCRAP_SCALE = (1.5, 2.4)  # of pieces of digits


def ground(rng: np.random.Generator, size: int, digits: Digits, clutter: int) -> np.ndarray:
    """A canvas of smooth texture with up to `clutter` pieces of clutter."""
    canvas = _texture(rng, size)
    for _ in range(rng.integers(clutter + 1)):
        paint(canvas, _scrap(rng, size, digits), bright(rng))
    return canvas


def bright(rng: np.random.Generator) -> np.ndarray:
    """A colour of digits and clutter, float32 [3]."""
    return rng.uniform(0.6, 1.0, 3).astype(np.float32)


def paint(canvas: np.ndarray, cover: np.ndarray, color: np.ndarray) -> None:
    """Blends a colour into the canvas by its cover."""
    rows, columns = (np.flatnonzero(cover.any(axis=axis)) for axis in (1, 0))
    if rows.size:
        # Only the part that is covered somewhere: a digit is a small part of a scene.
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        canvas[part] += cover[part][..., None] * (color - canvas[part])


def find_place(
    rng: np.random.Generator,
    digit: np.ndarray,
    size: int,
    scale_range: tuple[float, float],
    is_free: Callable[[np.ndarray], bool],
) -> np.ndarray | None:
    """The cover of a digit, uint8 [28, 28], turned, scaled and wholly inside, where it `is_free`.

    None when there is no room.
    """
    for _ in range(_ATTEMPTS):
        angle = np.deg2rad(rng.uniform(-_DEGREES, _DEGREES))
        scale = rng.uniform(*scale_range)
        # Half of MNIST's 20 x 20 box in which each digit lies, turned.
        reach = 10 * scale * (np.cos(angle) + abs(np.sin(angle)))
        if reach > size / 2:
            continue
        cover = _warp(digit, angle, scale, rng.uniform(reach, size - reach, 2), size)
        if is_free(cover):
            return cover
    return None


def photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """The image of a canvas, uint8, with the noise of a sensor."""
    canvas = canvas + np.float32(0.03) * rng.standard_normal(canvas.shape, np.float32)
    return np.rint(255 * np.clip(canvas, 0.0, 1.0)).astype(np.uint8)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise of three grain sizes about a dark colour, float32 [size, size, 3]."""
    texture = np.full((size, size, 3), 1 - bright(rng))
    for cells, strength in ((3, 0.15), (8, 0.08), (24, 0.06)):
        noise = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
        planes = [
            Image.fromarray(noise[..., i]).resize((size, size), Image.Resampling.BICUBIC)
            for i in range(3)
        ]
        texture += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return texture


def _scrap(rng: np.random.Generator, size: int, digits: Digits) -> np.ndarray:
    """A piece of clutter: how much of each pixel it covers, float32 [size, size]."""
    kind = rng.integers(4)
    if kind < 2:  # A square cut out of a digit: strokes as real as those that count.
        top, left = rng.integers(0, 20, 2)
        part = digits[int(rng.integers(len(digits)))]["image"][top : top + 9, left : left + 9, 0]
        return _warp(part, rng.uniform(0, 2 * np.pi), rng.uniform(*_SCRAP_SCALE),
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
