"""Suppression of detections that overlap a better one, for one image, of static shape.

n detections come in: boxes [n, 4] xyxy, scores [n], labels [n] of any integers or None, where all
are of one class, and valid [n] or None; a detection whose score is NaN or -inf is not valid either.
Detections suppress only those of the same label: labels are compared, the boxes are never moved
apart. `max_outputs` rows come out, best first; of equal scores the one that came first wins.
`jax.vmap` serves a batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cvjax.checks import check_count
from cvjax.detection.boxes import iou


class Kept(NamedTuple):
    """What is left: `index` int32 [k] into the input, `scores` float32 [k], `valid` bool [k].

    Rows that are not valid have index 0 and score 0, and are last.
    """

    index: jax.Array
    scores: jax.Array
    valid: jax.Array


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    iou_threshold: float,
    max_outputs: int,
) -> Kept:
    """Takes the best detection, drops those with an IoU strictly above the threshold; repeats."""

    def left(scores: jax.Array, overlap: jax.Array) -> jax.Array:
        return jnp.where(overlap > iou_threshold, -jnp.inf, scores)

    return _one_by_one(boxes, scores, labels, valid, left, max_outputs)


def soft_nms(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    max_outputs: int,
    sigma: float | None = 0.5,
    iou_threshold: float = 0.3,
    min_score: float = 0.001,
) -> Kept:
    """Takes the best detection and lowers the scores of those that overlap it; repeats.

    N. Bodla et al.: Soft-NMS (https://arxiv.org/abs/1704.04503), equation 3, by
    exp(-IoU^2 / sigma), or, where sigma is None, equation 2, by 1 - IoU where the IoU is at least
    `iou_threshold`. Detections below `min_score`, before or after, are dropped. Scores in 0..1.
    """

    def left(scores: jax.Array, overlap: jax.Array) -> jax.Array:
        if sigma is None:
            factor = jnp.where(overlap >= iou_threshold, 1 - overlap, 1.0)
        else:
            factor = jnp.exp(-(overlap**2) / sigma)
        lowered = scores * factor
        # Those taken before are at -inf; times a factor of 0 that would be NaN.
        return jnp.where((scores >= min_score) & (lowered >= min_score), lowered, -jnp.inf)

    scores = jnp.asarray(scores, jnp.float32)
    scores = jnp.where(scores >= min_score, scores, -jnp.inf)
    return _one_by_one(boxes, scores, labels, valid, left, max_outputs)


def matrix_nms(
    overlaps: jax.Array,
    scores: jax.Array,
    labels: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    max_outputs: int,
    sigma: float | None = 2.0,
) -> Kept:
    """Lowers every score at once, by the overlaps [n, n] (IoU of boxes or of masks).

    X. Wang et al.: SOLOv2 (https://arxiv.org/abs/2003.10152), equations 4 and 5: a detection j is
    lowered by the least over better i of f(IoU_ij) / f(IoU of i with what is better than i), with
    f = exp(-sigma IoU^2) (the paper's code) or, where sigma is None, f = 1 - IoU.
    """
    scores, alive = _scores(scores, valid)
    check_count(1, max_outputs=max_outputs)
    count = scores.shape[0]
    if count == 0:
        return _nothing(max_outputs)
    order = jnp.argsort(-scores, stable=True)
    alive, ranked = alive[order], scores[order]
    better = jnp.triu(jnp.ones((count, count), bool), 1) & alive[:, None] & alive
    if labels is not None:
        labels = jnp.asarray(labels)
        better &= labels[order][:, None] == labels[order]
    overlap = jnp.asarray(overlaps, jnp.float32)[order][:, order]
    overlap = jnp.where(better & (overlap > 0), overlap, 0.0)  # one of NaN is none
    worst = jnp.max(overlap, axis=0)[:, None]  # of each i with what is better than i
    if sigma is None:
        # An i that is a copy of a better one, of 1 - IoU = 0, lowers nobody.
        factor = (1 - overlap) / jnp.where(worst < 1, 1 - worst, 1.0)
        factor = jnp.where(worst < 1, factor, jnp.inf)
    else:
        factor = jnp.exp(-sigma * (overlap**2 - worst**2))
    # The least may be above 1 only where nothing that is better overlaps: the score stays.
    factor = jnp.minimum(jnp.min(jnp.where(better, factor, jnp.inf), axis=0), 1.0)
    # A score of inf times a factor of 0 would be NaN.
    lowered = jnp.where(alive, jnp.where(factor > 0, ranked * factor, 0.0), -jnp.inf)
    top, place = jax.lax.top_k(lowered, min(max_outputs, count))
    pad = (0, max_outputs - top.shape[0])
    top = jnp.pad(top, pad, constant_values=-jnp.inf)
    return _kept(jnp.pad(order[place], pad), top)


def _one_by_one(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array | None,
    valid: jax.Array | None,
    left: Callable[[jax.Array, jax.Array], jax.Array],
    max_outputs: int,
) -> Kept:
    """`left(scores, overlap)` are the scores after one with that IoU to all has been taken."""
    scores, _ = _scores(scores, valid)
    check_count(1, max_outputs=max_outputs)
    count = scores.shape[0]
    if count == 0:
        return _nothing(max_outputs)
    places = jnp.arange(count, dtype=jnp.int32)
    labels = None if labels is None else jnp.asarray(labels)
    # Coordinate by coordinate: rows of four do not fill a processor's registers.
    columns = jnp.asarray(boxes, jnp.float32).T

    def take(scores: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        top = jnp.max(scores)
        # The first of the best, by two plain reductions, which the compiler vectorizes.
        best = jnp.min(jnp.where(scores == top, places, count))
        best = jnp.minimum(best, count - 1)
        overlap = iou(columns[:, best][None], columns.T)[0]
        if labels is not None:
            overlap = jnp.where(labels == labels[best], overlap, 0.0)
        # A box of NaN overlaps nothing.
        overlap = jnp.where(overlap > 0, overlap, 0.0)
        after = jnp.where(places == best, -jnp.inf, left(scores, overlap))
        return jnp.where(top > -jnp.inf, after, scores), (best, top)

    _, (index, top) = jax.lax.scan(take, scores, length=max_outputs)
    return _kept(index, top)


def _scores(scores: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    scores = jnp.asarray(scores, jnp.float32)
    alive = scores > -jnp.inf
    if valid is not None:
        alive &= valid
    return jnp.where(alive, scores, -jnp.inf), alive


def _nothing(count: int) -> Kept:
    return _kept(jnp.zeros(count, jnp.int32), jnp.full(count, -jnp.inf, jnp.float32))


def _kept(index: jax.Array, scores: jax.Array) -> Kept:
    valid = scores > -jnp.inf
    return Kept(jnp.where(valid, index, 0).astype(jnp.int32), jnp.where(valid, scores, 0.0), valid)
