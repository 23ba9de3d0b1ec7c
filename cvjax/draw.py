"""Arrays -> pictures: grids of images, what is known of them drawn over them, PNG files, curves.

An image is float [height, width, channels] in [0, 1] with 1 (grey) or 3 (red, green, blue)
channels. Files are written beside their place and renamed: who reads one never sees half of it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from cvjax import files
from cvjax.checks import check_count, check_unit

Series = tuple[ArrayLike, ArrayLike]

# Ten colours that are easy to tell apart (matplotlib's tab10), in [0, 1].
PALETTE = (
    np.array(
        [
            [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189],
            [140, 86, 75], [227, 119, 194], [127, 127, 127], [188, 189, 34], [23, 190, 207],
        ],
        np.float32,
    ) / 255
)  # fmt: skip


def grid(images: ArrayLike, columns: int = 10, padding: int = 1) -> jax.Array | np.ndarray:
    """Tiles images [n, h, w, c] into one picture [H, W, c], row by row.

    Between the images and around them are `padding` black pixels; what is left of the last row is
    black too. Fewer than `columns` images make one shorter row. Inside `jit` the result is a
    traced array and only the shape is checked, else it is a NumPy array.

    Raises:
      ValueError: images of another shape, or with values outside [0, 1], or no columns.
    """
    check_count(1, columns=columns)
    check_count(0, padding=padding)
    if not isinstance(images, jax.core.Tracer):
        images = np.asarray(images)
        check_unit(images)
    xp = np if isinstance(images, np.ndarray) else jnp
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images have shape {images.shape}; they must be [n, height, width, 1 or 3], n > 0"
        )
    n, height, width, channels = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    # Each image brings the padding above and to its left; the picture adds the last on each side.
    images = xp.pad(images, ((0, rows * columns - n), (padding, 0), (padding, 0), (0, 0)))
    height, width = height + padding, width + padding
    picture = images.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    picture = picture.reshape(rows * height, columns * width, channels)
    return xp.pad(picture, ((0, padding), (0, padding), (0, 0)))


def in_colour(images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Images [..., c] of any number of channels as [..., 3]; also inside `jit`.

    Of other than one or three channels the first three are shown, or of two the first.
    """
    images = images[..., : 3 if images.shape[-1] >= 3 else 1]
    xp = np if isinstance(images, np.ndarray) else jnp
    return xp.broadcast_to(images, (*images.shape[:-1], 3))


def tiled(images: jax.Array | np.ndarray, columns: int) -> jax.Array | np.ndarray:
    """`grid` of images of any number of channels: but for one or three of them `in_colour`."""
    return grid(images if images.shape[-1] in (1, 3) else in_colour(images), columns)


def boxes(
    image: ArrayLike, boxes: ArrayLike, labels: ArrayLike | None = None, width: int = 1
) -> np.ndarray:
    """Draws boxes [n, 4], x1 y1 x2 y2 in pixels, into a copy of an image; returns [h, w, 3].

    Coordinates are continuous: the box (0, 0, w, h) is framed by the outermost pixels. The lines,
    `width` pixels wide, lie inside; what is outside the image is not drawn. `labels`, integers [n],
    choose the colours from `PALETTE`; else each box has its own.
    """
    picture = _colored(image)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    rows, columns = np.ogrid[: picture.shape[0], : picture.shape[1]]
    for box, color in zip(boxes, _colors(len(boxes), labels), strict=True):
        x1, y1, x2, y2 = np.rint(box)
        x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        is_box = (x1 <= columns) & (columns < x2) & (y1 <= rows) & (rows < y2)
        is_inner = (x1 + width <= columns) & (columns < x2 - width)
        is_inner = is_inner & (y1 + width <= rows) & (rows < y2 - width)
        picture[is_box & ~is_inner] = color
    return picture


def masks(
    image: ArrayLike, masks: ArrayLike, labels: ArrayLike | None = None, opacity: float = 0.5
) -> np.ndarray:
    """Blends masks, bool [n, h, w], over a copy of an image, later ones on top; returns [h, w, 3].

    `labels` choose the colours, as in `boxes`. The colours of a map of classes are drawn by
    `masks(image, classes == np.arange(n)[:, None, None])`.
    """
    picture, masks = _colored(image), np.asarray(masks, bool)
    if masks.ndim != 3 or masks.shape[1:] != picture.shape[:2]:
        raise ValueError(
            f"the masks have shape {masks.shape}; they must be [n, {picture.shape[0]}, "
            f"{picture.shape[1]}], as the image"
        )
    for mask, color in zip(masks, _colors(len(masks), labels), strict=True):
        picture[mask] = (1 - opacity) * picture[mask] + opacity * color
    return picture


def points(
    image: ArrayLike, points: ArrayLike, labels: ArrayLike | None = None, width: int = 3
) -> np.ndarray:
    """Draws points [n, 2], x and y in pixels, as squares into a copy of an image: [h, w, 3]."""
    # Whole here, or halves would be rounded to even numbers, and squares be of two widths.
    corner = np.floor(np.asarray(points, np.float64).reshape(-1, 2) - width / 2 + 0.5)
    squares = np.concatenate([corner, corner + width], axis=1)
    return boxes(image, squares, labels, width=width)


def _colored(image: ArrayLike) -> np.ndarray:
    """Returns a float32 copy [h, w, 3] of an image with 1 or 3 channels."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"the image has shape {image.shape}; it must be [height, width, 1 or 3]")
    check_unit(image)
    return np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)


def _colors(count: int, labels: ArrayLike | None) -> np.ndarray:
    return PALETTE[np.asarray(range(count) if labels is None else labels, int) % len(PALETTE)]


def class_colors(count: int = 256) -> np.ndarray:
    """The colours of the PASCAL VOC masks, uint8 [count, 3], count <= 256; class 0 is black.

    Bit j of the red (green, blue) level, counted from the highest, is bit 3 j (+ 1, + 2) of the
    class: neighbouring classes are far apart. As in the VOC development kit.
    """
    bits = np.unpackbits(np.arange(count, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    levels = np.zeros((count, 3, 8), np.uint8)
    for bit in range(8):
        levels[:, bit % 3, bit // 3] = bits[:, bit]
    return np.packbits(levels, axis=2)[..., 0]


def paint_classes(images: jax.Array, masks: jax.Array, opacity: float = 0.7) -> jax.Array:
    """Colours images [..., h, w, 3] by integer masks [..., h, w] of classes in 0..255.

    The colours are `class_colors`, the image shows through; where the class is 0 there is only
    the image.
    """
    colors = jnp.asarray(class_colors(), jnp.float32)[jnp.asarray(masks)] / 255
    strength = jnp.where(jnp.asarray(masks) > 0, opacity, 0.0)[..., None]
    return images + strength * (colors - images)


def paint_boxes(
    images: jax.Array, boxes: jax.Array, labels: jax.Array, shown: jax.Array
) -> jax.Array:
    """Draws boxes into images [b, h, w, 1 or 3] as `boxes` does, one pixel wide, also inside `jit`.

    Args:
      images: floats.
      boxes: [b, n, 4], x1 y1 x2 y2 in pixels; the first lie on top.
      labels: integers [b, n], which choose the colours from `PALETTE`.
      shown: bool [b, n]; of the others nothing is seen.

    Returns:
      float32 [b, h, w, 3].
    """
    images = jnp.asarray(images, jnp.float32)
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    rows = jnp.arange(images.shape[1])[None, :, None]
    columns = jnp.arange(images.shape[2])[None, None, :]
    colors = jnp.asarray(PALETTE)[jnp.asarray(labels) % len(PALETTE)]

    def draw_one(pictures: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        box, color, is_shown = one
        x1, y1, x2, y2 = (x[:, None, None] for x in jnp.round(box).T)
        x2, y2 = jnp.maximum(x2, x1 + 1), jnp.maximum(y2, y1 + 1)
        is_box = (x1 <= columns) & (columns < x2) & (y1 <= rows) & (rows < y2)
        is_inner = (x1 < columns) & (columns < x2 - 1) & (y1 < rows) & (rows < y2 - 1)
        is_line = is_box & ~is_inner & is_shown[:, None, None]
        return jnp.where(is_line[..., None], color[:, None, None], pictures), None

    last_first = (jnp.moveaxis(jnp.asarray(x), 1, 0)[::-1] for x in (boxes, colors, shown))
    return jax.lax.scan(draw_one, images, tuple(last_first))[0]


def paint_masks(
    images: jax.Array, masks: jax.Array, labels: jax.Array, shown: jax.Array, opacity: float = 0.5
) -> jax.Array:
    """Blends masks over images [b, h, w, 1 or 3] as `masks` does, also inside `jit`.

    Args:
      images: floats.
      masks: bool [b, n, h, w]; the first lie on top.
      labels: integers [b, n], which choose the colours from `PALETTE`.
      shown: bool [b, n]; of the others nothing is seen.
      opacity: of the colours.

    Returns:
      float32 [b, h, w, 3].
    """
    images = jnp.asarray(images, jnp.float32)
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    colors = jnp.asarray(PALETTE)[jnp.asarray(labels) % len(PALETTE)]

    def draw_one(pictures: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        mask, color, is_shown = one
        strength = opacity * (mask & is_shown[:, None, None])[..., None]
        return pictures + strength * (color[:, None, None] - pictures), None

    last_first = (jnp.moveaxis(jnp.asarray(x), 1, 0)[::-1] for x in (masks, colors, shown))
    return jax.lax.scan(draw_one, images, tuple(last_first))[0]


def save_png(path: str | os.PathLike, image: ArrayLike) -> None:
    """Writes an image [height, width, 1 or 3] in [0, 1] as an 8-bit PNG.

    Raises:
      ValueError: an image of another shape, or with values outside [0, 1].
    """
    image = np.asarray(image)
    if image.ndim != 3 or 0 in image.shape or image.shape[-1] not in (1, 3):
        raise ValueError(f"the image has shape {image.shape}; it must be [height, width, 1 or 3]")
    check_unit(image)
    pixels = np.round(255 * image.astype(np.float32)).astype(np.uint8)
    pixels = pixels[..., 0] if image.shape[-1] == 1 else pixels
    files.replace(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def curves(
    path: str | os.PathLike, series: Mapping[str, Series], title: str = "", x: str = "step"
) -> None:
    """Plots {name: (steps, values)} as a PNG, one panel for each metric; `x` is what steps are.

    `train/loss` and `eval/loss` share the panel "loss": what is under `train/` is a light line and
    its moving average, all else are points joined by a line. A panel whose values are all
    positive and span more than a factor of 30 has a logarithmic axis. Values that are not finite
    leave a gap.
    """
    # Figures of their own rather than pyplot: no global state, no display, safe in any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for name in series:
        panels.setdefault(name.split("/", 1)[-1], []).append(name)
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(_as_it_is(title))
    for number, (panel, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set(title=_as_it_is(panel), xlabel=_as_it_is(x))
        axes.grid(alpha=0.3)
        everything = []
        for color, name in enumerate(names):
            steps, values = (np.asarray(x, np.float64) for x in series[name])
            if steps.shape != values.shape or steps.ndim != 1:
                raise ValueError(
                    f"{name}: steps have shape {steps.shape} and values {values.shape}; "
                    "they must be two lists of one length"
                )
            everything.append(values[np.isfinite(values)])
            style: dict[str, Any] = {"color": f"C{color}", "linewidth": 1.2}
            label = _as_it_is(name.removesuffix(f"/{panel}"))
            if name.startswith("train/") and len(values) > 20:
                axes.plot(steps, values, **{**style, "alpha": 0.25})
                axes.plot(steps, _moving_average(values), label=label, **style)
            else:
                marker = "" if name.startswith("train/") else "o"
                axes.plot(steps, values, label=label, marker=marker, markersize=3, **style)
        values = np.concatenate(everything)
        if values.size and values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
        if names != [panel]:
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(names) > 4 else {}
            axes.legend(fontsize="small", **beside)
    files.replace(path, lambda file: figure.savefig(file, format="png", dpi=100))


def table(columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """A table as a picture [h, w, 3]: a line for each row, below the names of the columns.

    Numbers have three decimals; a negative or undefined one, as of a class that never occurs, is a
    dash.
    """

    def cell(value: Any) -> str:
        if isinstance(value, float | np.floating):
            return f"{value:.3f}" if value >= 0 else "-"
        return str(value)

    texts = [[name, *map(cell, values)] for name, values in columns.items()]
    font = ImageFont.load_default(size=13)
    widths = [round(max(font.getlength(text) for text in column)) + 16 for column in texts]
    line = 18
    size = (sum(widths) + 8, line * max(map(len, texts)) + 10)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    left = 8
    for number, (column, width) in enumerate(zip(texts, widths, strict=True)):
        for row, text in enumerate(column):
            # Numbers are set to the right, so that their points are below each other.
            place = (left + width - 16, "ra") if number else (left, "la")
            pen.text((place[0], 4 + line * row), text, fill="black", font=font, anchor=place[1])
        left += width
    pen.line([(4, line + 3), (size[0] - 4, line + 3)], fill="gray")
    return np.asarray(picture, np.float32) / 255


def _as_it_is(text: str) -> str:
    """For matplotlib, which reads what is between two $ as mathematics."""
    return text.replace("$", r"\$")


def _moving_average(values: np.ndarray) -> np.ndarray:
    """The mean of the finite values in a centred window of about a twentieth of all."""
    window = np.ones(2 * (len(values) // 40) + 1)
    finite = np.isfinite(values)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
