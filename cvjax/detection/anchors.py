"""Anchors and points on the grid of a feature map.

Row by row, from left to right, and at each cell anchor by anchor: the order of a head's output
[height, width, anchors, ...] when it is flattened. Coordinates are pixels of the image.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_count
from cvjax.errors import InputError


def grid_points(height: int, width: int, stride: int, *, offset: float) -> jax.Array:
    """The points of a feature map: float32 [height * width, 2], x, y in pixels.

    Args:
        height: of the feature map, in cells.
        width: of the feature map, in cells.
        stride: pixels per cell.
        offset: where a point sits in its cell: 0, its corner (torchvision's detectors), or 0.5,
            its middle (FCOS, https://arxiv.org/abs/1904.01355, section 3.1).

    Raises:
        InputError: another offset, or a stride below 1.
    """
    return jnp.asarray(_points(height, width, stride, offset))


def cell_anchors(
    sizes: Sequence[float], aspect_ratios: Sequence[float], *, rounded: bool
) -> jax.Array:
    """Anchors around 0, 0: float32 [len(aspect_ratios) * len(sizes), 4], sizes counted first.

    Each has the area size^2 and the height aspect_ratio times the width. `rounded` rounds their
    corners to whole pixels, half to even, as torchvision does.
    """
    return jnp.asarray(_cell_anchors(sizes, aspect_ratios, rounded))


def grid_anchors(
    height: int,
    width: int,
    stride: int,
    sizes: Sequence[float],
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    *,
    offset: float,
    rounded: bool,
) -> jax.Array:
    """`cell_anchors` around each of `grid_points`: float32 [height * width * anchors, 4], xyxy."""
    points = _points(height, width, stride, offset)
    cell = _cell_anchors(sizes, aspect_ratios, rounded)
    return jnp.asarray((np.tile(points, 2)[:, None] + cell).reshape(-1, 4))


def _points(height: int, width: int, stride: int, offset: float) -> np.ndarray:
    if offset not in (0, 0.5):
        raise InputError(f"offset is {offset}; it must be 0 (a cell's corner) or 0.5 (its middle)")
    check_count(1, stride=stride)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (np.stack([x, y], -1).reshape(-1, 2) + np.float32(offset)) * np.float32(stride)


def _cell_anchors(
    sizes: Sequence[float], aspect_ratios: Sequence[float], rounded: bool
) -> np.ndarray:
    if not all(number > 0 for number in (*sizes, *aspect_ratios)):
        raise InputError(
            f"sizes is {sizes} and aspect_ratios {aspect_ratios}; each must be above 0"
        )
    # In float32 from the start: what lies at a half must round as it does in torchvision.
    tall = np.sqrt(np.asarray(aspect_ratios, np.float32))[:, None]
    scale = np.asarray(sizes, np.float32)[None]
    half = np.stack([(1 / tall * scale).ravel(), (tall * scale).ravel()], -1) / np.float32(2)
    anchors = np.concatenate([-half, half], -1)
    return np.round(anchors) if rounded else anchors
