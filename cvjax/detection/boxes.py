"""Boxes: their overlap, their conversions, their area.

A box is float32 [4], x1, y1, x2, y2 in absolute pixels and continuous coordinates: its width is
x2 - x1. Whatever the float type that comes in, the geometry is done in float32. A box with
x2 <= x1 or y2 <= y1 has area 0, and its overlap with anything is 0, with finite gradients.
Coordinates beyond +-1e18 count as +-1e18, so that no area is infinite.

The pairwise functions take a [..., n, 4] and b [..., m, 4] and give [..., n, m]; those that begin
with `paired_` take two [..., 4] that broadcast and give [...].
"""

import math

import jax
import jax.numpy as jnp

_FAR = 1e18  # squares of lengths up to this stay finite in float32


def area(boxes: jax.Array) -> jax.Array:
    """The area of boxes [..., 4] in square pixels: float32 [...], 0 where a side is negative."""
    sides = _sides(_float32(boxes))
    return sides[..., 0] * sides[..., 1]


def paired_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union, in 0..1."""
    a, b = _float32(a), _float32(b)
    inside = _intersection(a, b)
    return _ratio(inside, area(a) + area(b) - inside)


def paired_giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """IoU less the share of the enclosing box that neither covers, in -1..1.

    H. Rezatofighi et al.: Generalized Intersection over Union (https://arxiv.org/abs/1902.09630),
    algorithm 1.
    """
    a, b = _float32(a), _float32(b)
    inside = _intersection(a, b)
    union = area(a) + area(b) - inside
    hull = area(_enclosing(a, b))
    return _ratio(inside, union) - _ratio(hull - union, hull)


def paired_diou(a: jax.Array, b: jax.Array) -> jax.Array:
    """IoU less the squared distance of the centres over the enclosing box's squared diagonal.

    Z. Zheng et al.: Distance-IoU Loss (https://arxiv.org/abs/1911.08287), equation 7.
    """
    a, b = _float32(a), _float32(b)
    between = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    diagonal = _sides(_enclosing(a, b))
    return paired_iou(a, b) - _ratio(jnp.sum(between**2, -1), jnp.sum(diagonal**2, -1))


def paired_ciou(a: jax.Array, b: jax.Array) -> jax.Array:
    """DIoU less alpha v, where v compares the aspect ratios; alpha has no gradient.

    Z. Zheng et al.: Distance-IoU Loss (https://arxiv.org/abs/1911.08287), equations 8 to 11.
    """
    a, b = _float32(a), _float32(b)
    v = 4 / math.pi**2 * (_angle(a) - _angle(b)) ** 2
    # Equal boxes have v = 0 and 1 - IoU = 0: alpha is 0 there.
    alpha = jax.lax.stop_gradient(_ratio(v, 1 - paired_iou(a, b) + v))
    return paired_diou(a, b) - alpha * v


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """`paired_iou` of each of a with each of b."""
    return paired_iou(a[..., :, None, :], b[..., None, :, :])


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """`paired_giou` of each of a with each of b."""
    return paired_giou(a[..., :, None, :], b[..., None, :, :])


def diou(a: jax.Array, b: jax.Array) -> jax.Array:
    """`paired_diou` of each of a with each of b."""
    return paired_diou(a[..., :, None, :], b[..., None, :, :])


def ciou(a: jax.Array, b: jax.Array) -> jax.Array:
    """`paired_ciou` of each of a with each of b."""
    return paired_ciou(a[..., :, None, :], b[..., None, :, :])


def crowd_iou(a: jax.Array, crowds: jax.Array) -> jax.Array:
    """Intersection over the area of a: COCO's overlap with a crowd, which holds many objects."""
    a, crowds = _float32(a)[..., :, None, :], _float32(crowds)[..., None, :, :]
    return _ratio(_intersection(a, crowds), area(a))


def xyxy_to_xywh(boxes: jax.Array) -> jax.Array:
    """x1, y1, x2, y2 to x1, y1, width, height; [..., 4], as all conversions."""
    boxes = jnp.asarray(boxes, jnp.float32)
    return jnp.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)


def xywh_to_xyxy(boxes: jax.Array) -> jax.Array:
    """x1, y1, width, height to x1, y1, x2, y2."""
    boxes = jnp.asarray(boxes, jnp.float32)
    return jnp.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)


def xyxy_to_cxcywh(boxes: jax.Array) -> jax.Array:
    """x1, y1, x2, y2 to the centre, width and height."""
    boxes = jnp.asarray(boxes, jnp.float32)
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], -1)


def cxcywh_to_xyxy(boxes: jax.Array) -> jax.Array:
    """The centre, width and height to x1, y1, x2, y2."""
    boxes = jnp.asarray(boxes, jnp.float32)
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], -1)


def xyxy_to_yxyx(boxes: jax.Array) -> jax.Array:
    """x1, y1, x2, y2 to y1, x1, y2, x2; it is its own inverse."""
    return jnp.asarray(boxes, jnp.float32)[..., jnp.array([1, 0, 3, 2])]


def to_relative(boxes: jax.Array, height: float, width: float) -> jax.Array:
    """Pixels to shares of the image, for any order that begins with x (xyxy, xywh, cxcywh)."""
    return jnp.asarray(boxes, jnp.float32) / _extent(height, width)


def to_absolute(boxes: jax.Array, height: float, width: float) -> jax.Array:
    """Shares of the image to pixels: the inverse of `to_relative`."""
    return jnp.asarray(boxes, jnp.float32) * _extent(height, width)


def clip(boxes: jax.Array, height: float, width: float) -> jax.Array:
    """The part of boxes [..., 4] within 0..width and 0..height: area 0 for a box outside."""
    return jnp.clip(jnp.asarray(boxes, jnp.float32), 0.0, _extent(height, width))


def _extent(height: float, width: float) -> jax.Array:
    return jnp.stack([jnp.asarray(side, jnp.float32) for side in (width, height, width, height)])


def _float32(boxes: jax.Array) -> jax.Array:
    return jnp.clip(jnp.asarray(boxes, jnp.float32), -_FAR, _FAR)


def _sides(boxes: jax.Array) -> jax.Array:
    return jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)


def _intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    # A box whose x2 is left of its x1 makes this negative, too: it meets nothing.
    sides = jnp.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]


def _enclosing(a: jax.Array, b: jax.Array) -> jax.Array:
    low = jnp.minimum(a[..., :2], b[..., :2])
    high = jnp.maximum(a[..., 2:], b[..., 2:])
    return jnp.concatenate([low, high], -1)


def _angle(boxes: jax.Array) -> jax.Array:
    """arctan(width / height); sides below 1e-6 pixels count as that, for finite gradients."""
    sides = jnp.maximum(_sides(boxes), 1e-6)
    return jnp.arctan2(sides[..., 0], sides[..., 1])


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 without a gradient where whole is too small to divide by."""
    usable = whole > 1e-18
    return jnp.where(usable, part, 0.0) / jnp.where(usable, whole, 1.0)
