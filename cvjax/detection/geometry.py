"""Anchors, boxes, and the choice among overlapping ones, for the one-stage detectors.

Boxes are x1 y1 x2 y2 in pixels, continuous, float32. All functions can be batched by `jax.vmap` and
keep their shapes whatever the number of objects.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_STEP = math.log(1000 / 16)  # of the logarithm of a size: exp(100) would be no number


def anchors(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scale: float,
    octaves: int,
    ratios: Sequence[float],
    offset: float = 0.5,
) -> np.ndarray:
    """The anchors of all levels, float32 [a, 4], in the order of level, row, column, ratio, octave.

    T.-Y. Lin et al., https://arxiv.org/abs/1708.02002, section 4: at each place of a level with
    stride s, boxes of the areas (scale s 2^(i / octaves))^2 and the ratios height / width.

    Args:
      sizes: height and width of each level.
      strides: of each level.
      scale: side of the smallest square anchor, in strides.
      octaves: how many sizes there are at a place.
      ratios: height / width.
      offset: of the centres, in strides: 0.5 is the middle of a cell, 0 its upper left corner.
    """
    found = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        sides = scale * stride * 2.0 ** (np.arange(octaves) / octaves)
        h = (np.sqrt(ratios)[:, None] * sides).ravel()
        w = (1 / np.sqrt(ratios)[:, None] * sides).ravel()
        y, x = np.mgrid[:height, :width]
        y, x = ((centres[..., None] + offset) * stride for centres in (y, x))
        found.append(np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).reshape(-1, 4))
    return np.concatenate(found).astype(np.float32)


def iou_matrix(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of boxes [n, 4] and [m, 4]: [n, m]; 0 where both have no area."""
    corner = jnp.maximum(a[:, None, :2], b[None, :, :2])
    sides = jnp.maximum(jnp.minimum(a[:, None, 2:], b[None, :, 2:]) - corner, 0.0)
    both = sides[..., 0] * sides[..., 1]
    either = _area(a)[:, None] + _area(b)[None] - both
    return jnp.where(either > 0, both / jnp.where(either > 0, either, 1.0), 0.0)


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalized IoU of pairs of boxes [..., 4], in [-1, 1]: [...].

    H. Rezatofighi et al., https://arxiv.org/abs/1902.09630, algorithm 1. Two points in one place
    have 0, and all gradients are finite.
    """
    corner = jnp.maximum(a[..., :2], b[..., :2])
    sides = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - corner, 0.0)
    hull = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    both, hull = sides[..., 0] * sides[..., 1], hull[..., 0] * hull[..., 1]
    either = _area(a) + _area(b) - both
    iou = jnp.where(either > 0, both / jnp.where(either > 0, either, 1.0), 0.0)
    empty = jnp.where(hull > 0, (hull - either) / jnp.where(hull > 0, hull, 1.0), 0.0)
    return iou - empty


def _area(boxes: jax.Array) -> jax.Array:
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def encode(boxes: jax.Array, anchors: jax.Array) -> jax.Array:
    """Boxes [..., 4] with an area as steps from anchors: (dx / w, dy / h, ln w'/w, ln h'/h).

    R. Girshick et al., https://arxiv.org/abs/1311.2524, equations 6 to 9.
    """
    size, anchor = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    step = (boxes[..., 2:] + boxes[..., :2] - anchors[..., 2:] - anchors[..., :2]) / 2 / anchor
    return jnp.concatenate([step, jnp.log(size / anchor)], axis=-1)


def decode(deltas: jax.Array, anchors: jax.Array) -> jax.Array:
    """The inverse of `encode`; no side grows by more than 1000 / 16."""
    anchor, centre = anchors[..., 2:] - anchors[..., :2], (anchors[..., 2:] + anchors[..., :2]) / 2
    centre = centre + deltas[..., :2] * anchor
    half = jnp.exp(jnp.minimum(deltas[..., 2:], LARGEST_STEP)) * anchor / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def match(
    boxes: jax.Array,
    valid: jax.Array,
    anchors: jax.Array,
    positive: float,
    negative: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which box each anchor shall find: the one with the largest IoU.

    An anchor is positive from the IoU `positive` on, and also when no other anchor overlaps some
    box more than it does (S. Ren et al., https://arxiv.org/abs/1506.01497, section 3.1.2), negative
    below `negative`, else it counts nowhere.

    Args:
      boxes: [n, 4], n >= 1.
      valid: bool [n]; a row that is not valid must be finite.
      anchors: [a, 4].
      positive, negative: thresholds of the IoU.

    Returns:
      matched: int32 [a], rows of `boxes`; is_positive: bool [a]; is_negative: bool [a].
    """
    iou = jnp.where(valid[:, None], iou_matrix(boxes, anchors), -1.0)
    matched, best = jnp.argmax(iou, axis=0), jnp.max(iou, axis=0)
    best_of_box = jnp.max(iou, axis=1, keepdims=True)
    is_best = jnp.any((iou == best_of_box) & (best_of_box > 0), axis=0)
    is_positive = (best >= positive) | is_best
    return matched.astype(jnp.int32), is_positive, (best < negative) & ~is_positive


def sigmoid_focal(
    logits: jax.Array, targets: jax.Array, alpha: float = 0.25, gamma: float = 2.0
) -> jax.Array:
    """The focal loss of T.-Y. Lin et al., https://arxiv.org/abs/1708.02002, equation 5: [...].

    Targets are 0 or 1. From logarithms: right and with finite gradients for any finite logit.
    """
    signed = jnp.where(targets > 0, logits, -logits)
    weight = jnp.where(targets > 0, alpha, 1 - alpha)
    modulation = jnp.exp(gamma * jax.nn.log_sigmoid(-signed))  # (1 - p_t) ** gamma
    return -weight * modulation * jax.nn.log_sigmoid(signed)


def select(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    candidates: int,
    score: float,
    iou: float,
    outputs: int,
    size: tuple[int, int],
) -> dict[str, jax.Array]:
    """Detections of one image: the best that no better one of the same class overlaps.

    Args:
      boxes: [a, 4], of any place; they are clipped to the image.
      scores: [a, k], of each class, in [0, 1].
      candidates: so many of the a * k scores, the highest, are looked at.
      score: what is not above it is no detection.
      iou: a detection with more overlap with a better one of its class is suppressed.
      outputs: rows of the result.
      size: height and width of the image.

    Returns:
      boxes [outputs, 4], scores [outputs], labels int32 [outputs], detected bool [outputs], the
      best first, of equal ones that with the lower index; zeros where nothing was detected.
    """
    classes = scores.shape[-1]
    best, index = jax.lax.top_k(scores.reshape(-1), min(candidates, scores.size))
    labels = (index % classes).astype(jnp.int32)
    limits = jnp.array([size[1], size[0], size[1], size[0]], jnp.float32)
    found = jnp.clip(boxes[index // classes], 0.0, limits)
    good = (best > score) & jnp.all(found[:, 2:] > found[:, :2], axis=-1)
    rival = (iou_matrix(found, found) > iou) & (labels[:, None] == labels[None])
    later = jnp.arange(len(best))

    def suppress(i: jax.Array, kept: jax.Array) -> jax.Array:
        return kept & ~(rival[i] & kept[i] & (later > i))

    kept = jax.lax.fori_loop(0, len(best), suppress, good)
    order = jnp.argsort(~kept, stable=True)[:outputs]
    order = jnp.pad(order, (0, outputs - len(order)))
    detected = jnp.arange(outputs) < jnp.sum(kept)
    return {
        "boxes": jnp.where(detected[:, None], found[order], 0.0),
        "scores": jnp.where(detected, best[order], 0.0),
        "labels": jnp.where(detected, labels[order], 0),
        "detected": detected,
    }
