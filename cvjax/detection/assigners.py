"""Which truth each anchor, point or prediction is to learn, for one image; `jax.vmap` for more.

The truth comes in padded: boxes [n, 4] xyxy in pixels, labels int [n], valid bool [n]; what stands
in rows that are not valid changes nothing. Out comes an `Assignment` of the k anchors, points
[k, 2] or predictions. Nothing here has a gradient. Of equal matches the first truth wins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cvjax.detection.boxes import area, iou
from cvjax.detection.coders import encode_distances
from cvjax.detection.losses import binary_cross_entropy
from cvjax.errors import InputError


class Assignment(NamedTuple):
    """For each of k places: what it is to learn.

    `index` int32 [k] is the row of its truth, 0 where there is none; `foreground` bool [k] says
    where there is one; `weight` float32 [k] is 0 where the place is to be ignored, else 1.
    `boxes[index]`, encoded, is the target of the foreground.
    """

    index: jax.Array
    foreground: jax.Array
    weight: jax.Array


def max_iou(
    anchors: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    *,
    foreground: float,
    background: float,
    low_quality: bool,
) -> Assignment:
    """The truth of the highest IoU, where that is at least `foreground`; below `background`, none.

    Between the two an anchor is ignored. With `low_quality`, anchors that have the highest IoU of
    all anchors with some truth (and any overlap with it) are foreground whatever it is; they keep
    the truth of their own highest IoU.
    S. Ren et al.: Faster R-CNN (https://arxiv.org/abs/1506.01497), section 3.1.2.

    Raises:
        InputError: `background` is above `foreground`.
    """
    if background > foreground:
        raise InputError(f"background is {background}; it must be at most foreground={foreground}")
    if boxes.shape[0] == 0:
        return _nobody(anchors.shape[0])
    boxes = _truth(boxes, valid)
    overlap = jnp.where(valid[:, None], iou(boxes, anchors), -1.0)
    best, index = jnp.max(overlap, 0), jnp.argmax(overlap, 0)
    chosen = best >= foreground
    ignored = (best >= background) & ~chosen
    if low_quality:
        highest = jnp.max(overlap, 1, keepdims=True, initial=0.0)
        chosen |= jnp.any((overlap == highest) & (highest > 0), 0)
    return _assignment(index, chosen, ignored & ~chosen)


def atss(
    anchors: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    level_sizes: Sequence[int],
    *,
    candidates: int = 9,
) -> Assignment:
    """Adaptive training sample selection: a threshold for each truth, mean + std of its IoUs.

    The IoUs are those of the `candidates` anchors of each level whose centres are nearest; the
    anchors come level by level, `level_sizes` of each. The centre must be inside the truth.
    S. Zhang et al.: Bridging the Gap (https://arxiv.org/abs/1912.02424), algorithm 1.

    Raises:
        InputError: the sizes of the levels do not add up to the number of anchors.
    """
    if sum(level_sizes) != anchors.shape[0]:
        raise InputError(
            f"level_sizes={tuple(level_sizes)} must add up to the {anchors.shape[0]} anchors"
        )
    if boxes.shape[0] == 0:
        return _nobody(anchors.shape[0])
    boxes = _truth(boxes, valid)
    overlap = iou(boxes, anchors)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    away = jnp.sum((centres - middle[:, None]) ** 2, -1)
    near, start = [], 0
    for size in level_sizes:
        _, place = jax.lax.top_k(-away[:, start : start + size], min(candidates, size))
        near.append(place + start)
        start += size
    near = jnp.concatenate(near, -1)
    ious = jnp.take_along_axis(overlap, near, -1)
    # The deviation of a sample, over one less than its size, as the authors' code has it.
    spread = jnp.sqrt(jnp.sum((ious - ious.mean(-1, keepdims=True)) ** 2, -1) / max(
        ious.shape[-1] - 1, 1
    ))  # fmt: skip
    # Less what rounding adds: where all IoUs are equal, all of them are the threshold.
    threshold = (ious.mean(-1) + spread) * (1 - 1e-5)
    rows = jnp.arange(boxes.shape[0])[:, None]
    is_near = jnp.zeros(overlap.shape, bool).at[rows, near].set(True)
    inside = jnp.min(encode_distances(boxes[:, None], centres), -1) > 0
    positive = is_near & inside & (overlap >= threshold[:, None]) & valid[:, None]
    index = jnp.argmax(jnp.where(positive, overlap, -1.0), 0)
    return _assignment(index, jnp.any(positive, 0))


def fcos(
    points: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    ranges: jax.Array,
    strides: jax.Array,
    *,
    radius: float | None = 1.5,
) -> Assignment:
    """Points inside a truth of the size of their level; the smallest truth wins.

    Args:
        points: [k, 2].
        boxes: [n, 4].
        valid: [n].
        ranges: [k, 2], within which, both ends too, the largest of the four distances to the sides
            must be, in pixels.
        strides: [k], pixels per cell.
        radius: how far in strides, along x and y, a point may be from the centre of the truth;
            None: anywhere inside (Z. Tian et al.: FCOS, https://arxiv.org/abs/1904.01355,
            section 3.2; the centre sampling is that of its journal version,
            https://arxiv.org/abs/2006.09214, section 3.1).
    """
    if boxes.shape[0] == 0:
        return _nobody(points.shape[0])
    boxes = _truth(boxes, valid)
    distances = encode_distances(boxes[:, None], points)
    largest = jnp.max(distances, -1)
    fits = (jnp.min(distances, -1) > 0) & (largest >= ranges[:, 0]) & (largest <= ranges[:, 1])
    if radius is not None:
        fits &= _from_centre(boxes, points) < radius * strides
    fits &= valid[:, None]
    index = jnp.argmin(jnp.where(fits, area(boxes)[:, None], jnp.inf), 0)
    return _assignment(index, jnp.any(fits, 0))


def sim_ota(
    points: jax.Array,
    strides: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    logits: jax.Array,
    predictions: jax.Array,
    *,
    radius: float = 2.5,
    iou_weight: float = 3.0,
    candidates: int = 10,
) -> Assignment:
    """The cheapest predictions of each truth, as many as its best IoUs add up to.

    The cost is the binary cross-entropy of the logits [k, classes] with the class, plus
    `iou_weight` times -log IoU of the predictions [k, 4] xyxy. Points inside the truth or within
    `radius` strides [k] of its centre are asked, and those that are not both come last. A
    prediction that several truths want goes to the one for which it is cheapest.
    Z. Ge et al.: YOLOX (https://arxiv.org/abs/2107.08430), section 2.1, SimOTA.
    """
    if boxes.shape[0] == 0:
        return _nobody(points.shape[0])
    boxes = _truth(boxes, valid)
    labels = jnp.where(valid, labels, 0)
    inside = jnp.min(encode_distances(boxes[:, None], points), -1) > 0
    central = _from_centre(boxes, points) < radius * strides
    asked = (inside | central) & valid[:, None]
    overlap = jnp.where(asked, iou(boxes, predictions), 0.0)
    classes = jax.nn.one_hot(labels, logits.shape[-1])
    # sum over classes of BCE(x, t) is that of BCE(x, 0), less the logit of the class.
    logits = jnp.asarray(logits, jnp.float32)
    negative = jnp.sum(binary_cross_entropy(logits, jnp.zeros_like(logits)), -1)
    cost = negative - jnp.matmul(classes, logits.T, precision="highest")
    cost += iou_weight * -jnp.log(overlap + 1e-8) + 1e5 * ~(inside & central)
    cost = jnp.where(asked, jnp.nan_to_num(cost, nan=1e30), jnp.inf)
    best = jax.lax.top_k(overlap, min(candidates, points.shape[0]))[0]
    wanted = jnp.maximum(jnp.sum(best, -1).astype(jnp.int32), 1)
    rank = jnp.argsort(jnp.argsort(cost, -1, stable=True), -1)
    taken = asked & (rank < wanted[:, None])
    index = jnp.argmin(jnp.where(taken, cost, jnp.inf), 0)
    return _assignment(index, jnp.any(taken, 0))


def _truth(boxes: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid[:, None], jnp.asarray(boxes, jnp.float32), 0.0)


def _from_centre(boxes: jax.Array, points: jax.Array) -> jax.Array:
    """The larger of the distances along x and y to the centres: [n, k]."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return jnp.max(jnp.abs(points - centre[:, None]), -1)


def _assignment(
    index: jax.Array, foreground: jax.Array, ignored: jax.Array | bool = False
) -> Assignment:
    return Assignment(
        jnp.where(foreground, index, 0).astype(jnp.int32),
        foreground,
        jnp.where(ignored, 0.0, jnp.ones(foreground.shape, jnp.float32)),
    )


def _nobody(count: int) -> Assignment:
    return _assignment(jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
