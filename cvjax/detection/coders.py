"""What a network is taught to say about a box, relative to an anchor or to a point, and back.

Boxes and anchors are float32 [..., 4], xyxy in pixels; points [..., 2], x, y in pixels. All is
float32 and broadcasts; decoding what was encoded gives the box back.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

MAX_LOG_SCALE = math.log(1000 / 16)  # a box is at most 62.5 times as large as its anchor
_SMALLEST = 1e-6  # pixels; smaller sides count as this, so that no logarithm is infinite


def encode_deltas(
    boxes: jax.Array, anchors: jax.Array, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> jax.Array:
    """dx, dy, dw, dh [..., 4]: shift of the centre in anchor sizes, logarithm of the scale.

    R. Girshick et al.: Rich feature hierarchies (https://arxiv.org/abs/1311.2524), appendix C,
    equations 6 to 9. The result is multiplied by `weights`.
    """
    centre, size = _centre_and_size(anchors)
    box_centre, box_size = _centre_and_size(boxes)
    shift = (box_centre - centre) / size
    return jnp.concatenate([shift, jnp.log(box_size / size)], -1) * jnp.asarray(
        weights, jnp.float32
    )


def decode_deltas(
    deltas: jax.Array, anchors: jax.Array, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> jax.Array:
    """The boxes xyxy of `deltas`; dw and dh are held below ln(1000 / 16), not above anything."""
    centre, size = _centre_and_size(anchors)
    deltas = jnp.asarray(deltas, jnp.float32) / jnp.asarray(weights, jnp.float32)
    box_centre = centre + deltas[..., :2] * size
    half = jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * size / 2
    return jnp.concatenate([box_centre - half, box_centre + half], -1)


def encode_distances(
    boxes: jax.Array, points: jax.Array, scale: jax.Array | float = 1.0
) -> jax.Array:
    """left, top, right, bottom [..., 4]: from points to the sides of boxes, over `scale`.

    Z. Tian et al.: FCOS (https://arxiv.org/abs/1904.01355), equation 1. All four are positive
    where the point is inside. `scale` (the stride, say) broadcasts against [..., 4].
    """
    boxes, points = jnp.asarray(boxes, jnp.float32), jnp.asarray(points, jnp.float32)
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], -1) / scale


def decode_distances(
    distances: jax.Array, points: jax.Array, scale: jax.Array | float = 1.0
) -> jax.Array:
    """The boxes xyxy of `distances`: the inverse of `encode_distances`."""
    distances = jnp.asarray(distances, jnp.float32) * scale
    points = jnp.asarray(points, jnp.float32)
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], -1)


def _centre_and_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    boxes = jnp.asarray(boxes, jnp.float32)
    size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], _SMALLEST)
    return (boxes[..., :2] + boxes[..., 2:]) / 2, size
