"""Losses of segmentation: pure functions of logits and a mask of classes.

Notation: `logits` [..., k] are the scores of k classes at each pixel, of any float type and of a
size up to 1e37; `mask` [...] are integers, the true class of each pixel in
0..k - 1, or `ignore` where the pixel does not count (unlabelled, or a row that is padding); there
the logits may be anything, NaN included. p are the softmax probabilities and t the one-hot truth.
Each loss is one float32 over all pixels that count, wherever in the batch they are: 0, and without
a gradient, when there is none; NaN when a label is neither a class nor `ignore`, for else nobody
would know.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cvjax.checks import check_between, check_weights
from cvjax.errors import InputError

IGNORE = 255  # the label of pixels without truth, as in PASCAL VOC


def cross_entropy(
    logits: jax.Array,
    mask: jax.Array,
    *,
    ignore: int = IGNORE,
    class_weights: Sequence[float] | None = None,
) -> jax.Array:
    """The mean over pixels of -log p_t; with k class weights w it is sum(w_t loss) / sum(w_t)."""
    log_p, label, counts = _log_p_of_truth(logits, mask, ignore)
    weight = counts.astype(jnp.float32)
    if class_weights is not None:
        weight *= _weights(class_weights, logits)[label]
    total = jnp.sum(weight)
    mean = jnp.sum(-log_p * weight) / jnp.where(total > 0, total, 1.0)
    return _checked(mean, logits, mask, ignore)


def focal(
    logits: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 2.0,
    ignore: int = IGNORE,
    class_weights: Sequence[float] | None = None,
) -> jax.Array:
    """The mean over pixels of -w_t (1 - p_t)^gamma log p_t: easy pixels count less.

    T.-Y. Lin et al.: Focal Loss for Dense Object Detection (https://arxiv.org/abs/1708.02002),
    equation 5, for the softmax; the `class_weights` w are its alpha. gamma 0 is the cross-entropy.
    """
    check_between(0, math.inf, gamma=gamma)
    log_p, label, counts = _log_p_of_truth(logits, mask, ignore)
    # 1 - p without cancellation; kept above 0, where a power below 1 would have no gradient.
    wrong = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny)
    losses = -(wrong**gamma) * log_p
    if class_weights is not None:
        losses *= _weights(class_weights, logits)[label]
    mean = jnp.sum(jnp.where(counts, losses, 0.0)) / jnp.maximum(jnp.sum(counts), 1)
    return _checked(mean, logits, mask, ignore)


def dice(logits: jax.Array, mask: jax.Array, *, ignore: int = IGNORE) -> jax.Array:
    """1 - the soft Dice coefficient, mean over the classes that are in the mask.

    The coefficient of a class is 2 sum(p t) / (sum(p) + sum(t)), with sums over all pixels of the
    batch (F. Milletari et al.: V-Net, https://arxiv.org/abs/1606.04797, section 3, without its
    squares). A class that is not in the mask has none: what is wrongly given to it is missing from
    the others.
    """
    p, truth, counts = _probabilities(logits, mask, ignore)
    overlap, size = jnp.sum(p * truth, axis=0), jnp.sum(truth, axis=0)
    both = jnp.sum(jnp.where(counts[:, None], p, 0.0), axis=0) + size
    present = size > 0
    losses = 1 - 2 * overlap / jnp.where(present, both, 1.0)
    return _checked(_mean_of(losses, present), logits, mask, ignore)


def lovasz_softmax(logits: jax.Array, mask: jax.Array, *, ignore: int = IGNORE) -> jax.Array:
    """The Lovasz extension of 1 - IoU, mean over the classes that are in the mask.

    M. Berman, A. Rannen Triki, M. Blaschko: The Lovasz-Softmax Loss
    (https://arxiv.org/abs/1705.08790), equations 8, 9 and 11 ("present" classes, IoU over the
    whole batch). Where errors tie the gradient is one of the subgradients. Costs a sort of all
    pixels for each class.
    """
    p, truth, counts = _probabilities(logits, mask, ignore)

    def of_class(p: jax.Array, truth: jax.Array) -> jax.Array:
        errors = jnp.where(counts, jnp.abs(truth - p), 0.0)
        # Pixels that do not count are last, with an error of 0: they change no sum before them.
        order = jnp.argsort(jnp.where(counts, -errors, 1.0))
        errors, truth = errors[order], truth[order] > 0
        # What each next pixel adds to 1 - IoU when it is wrong too, all after it still being right
        # (algorithm 1, with its differences worked out: they would vanish in float32).
        seen, total = jnp.cumsum(truth, dtype=jnp.int32), jnp.sum(truth, dtype=jnp.int32)
        union = total + jnp.cumsum(~truth, dtype=jnp.int32).astype(jnp.float32)
        added = jnp.where(truth, 1.0, (total - seen) / jnp.maximum(union - 1, 1))
        return jnp.sum(errors * added / jnp.maximum(union, 1))

    losses = jax.vmap(of_class, in_axes=1)(p, truth)
    present = jnp.sum(truth, axis=0) > 0
    return _checked(_mean_of(losses, present), logits, mask, ignore)


def counted(mask: jax.Array, ignore: int = IGNORE) -> jax.Array:
    """Which pixels count: bool, of the mask's shape."""
    return mask != ignore


def check_shapes(logits: jax.Array, mask: jax.Array) -> None:
    """Raises InputError unless a mask is [b, h, w] where logits are [b, h, w, classes]."""
    if logits.shape[:-1] != mask.shape:
        raise InputError(
            f"the mask is {list(mask.shape)}; for logits {list(logits.shape)} it must be "
            f"{list(logits.shape[:-1])}"
        )


def _log_p_of_truth(
    logits: jax.Array, mask: jax.Array, ignore: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log p_t (0 where a pixel does not count), the label (0 there too), and which count."""
    check_shapes(logits, mask)
    counts = counted(mask, ignore)
    label = jnp.where(counts, mask, 0).astype(jnp.int32)
    log_p = jax.nn.log_softmax(_where_counted(logits, counts))
    log_p = jnp.take_along_axis(log_p, label[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where(counts, log_p, 0.0), label, counts


def _probabilities(
    logits: jax.Array, mask: jax.Array, ignore: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p and t, float32 [n, k], t all zeros where a pixel does not count; which count, bool [n]."""
    check_shapes(logits, mask)
    classes, mask = logits.shape[-1], mask.reshape(-1)
    counts = counted(mask, ignore)
    p = jax.nn.softmax(_where_counted(logits.reshape(-1, classes), counts))
    truth = jax.nn.one_hot(jnp.where(counts, mask.astype(jnp.int32), -1), classes)
    return p, truth, counts


def _where_counted(logits: jax.Array, counts: jax.Array) -> jax.Array:
    """Zeros elsewhere: a NaN there would reach the gradient, times 0."""
    return jnp.where(counts[..., None], logits.astype(jnp.float32), 0.0)


def _weights(class_weights: Sequence[float], logits: jax.Array) -> jax.Array:
    check_weights(logits.shape[-1], class_weights=class_weights)
    return jnp.asarray(class_weights, jnp.float32)


def _mean_of(losses: jax.Array, present: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(present, losses, 0.0)) / jnp.maximum(jnp.sum(present), 1)


def _checked(value: jax.Array, logits: jax.Array, mask: jax.Array, ignore: int) -> jax.Array:
    label = mask.astype(jnp.int32)  # in 8 bits the number of classes would be another one
    wrong = counted(mask, ignore) & ((label < 0) | (label >= logits.shape[-1]))
    return jnp.where(jnp.any(wrong), jnp.nan, value)
