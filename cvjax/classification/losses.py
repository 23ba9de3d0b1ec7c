"""Losses of a classifier: logits and targets, both [b, classes], to one number for each example.

Targets of exclusive classes are distributions (one-hot, smoothed or mixed: rows sum to 1); those of
labels that do not exclude each other are probabilities in [0, 1], each for itself. Everything is
computed in float32. Settings are bound with `functools.partial`, or by a config. InputErrors are
another number of weights than of classes, negative ones, an `alpha` outside [0, 1], and a `gamma`
below 0.

    y   targets            p   probabilities of the model
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cvjax.checks import check_between, check_count, check_positive, check_weights
from cvjax.errors import InputError


def softmax_cross_entropy(
    logits: jax.Array, targets: jax.Array, *, class_weights: Sequence[float] | None = None
) -> jax.Array:
    """-sum_c w_c y_c log p_c, [b]; the weights w [classes] are 1 when there are none.

    The mean over a batch is that over its examples, not (as in torch) over their weights.
    """
    targets = _weighted(targets, "class_weights", class_weights)
    return -jnp.sum(_times_log(targets, jax.nn.log_softmax(logits.astype(jnp.float32))), axis=-1)


def softmax_focal(
    logits: jax.Array,
    targets: jax.Array,
    *,
    gamma: float = 2.0,
    class_weights: Sequence[float] | None = None,
) -> jax.Array:
    """-sum_c w_c y_c (1 - p_c)^gamma log p_c, [b]: what is learned already counts less.

    T.-Y. Lin et al., Focal Loss (https://arxiv.org/abs/1708.02002), equation 4, for a softmax.
    """
    check_between(0, math.inf, gamma=gamma)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    targets = _weighted(targets, "class_weights", class_weights)
    weights = targets * _power(-jnp.expm1(log_p), gamma)
    return -jnp.sum(_times_log(weights, log_p), axis=-1)


def sigmoid_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    class_weights: Sequence[float] | None = None,
    positive_weights: Sequence[float] | None = None,
) -> jax.Array:
    """Binary cross-entropy of every class for itself, mean over classes, [b].

    -(1 / classes) sum_c w_c (v_c y_c log p_c + (1 - y_c) log(1 - p_c)), with the class weights w
    and the positive weights v (1 when there are none); v > 1 raises recall, v < 1 precision.
    """
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    positive = _weighted(targets, "positive_weights", positive_weights)
    positive, negative = (
        _times_log(_weighted(weight, "class_weights", class_weights), jax.nn.log_sigmoid(logit))
        for weight, logit in ((positive, logits), (1 - targets, -logits))
    )
    return -jnp.mean(positive + negative, axis=-1)


def sigmoid_focal(
    logits: jax.Array,
    targets: jax.Array,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    class_weights: Sequence[float] | None = None,
) -> jax.Array:
    """The focal loss of every class for itself, times its weight, mean over classes, [b].

    `alpha` in [0, 1] weighs positive targets, 1 - alpha negative ones; None weighs neither
    (T.-Y. Lin et al., https://arxiv.org/abs/1708.02002, equation 5).
    """
    check_between(0, math.inf, gamma=gamma)
    check_between(0, 1, alpha=0.5 if alpha is None else alpha)
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    positive = _times_log(targets, jax.nn.log_sigmoid(logits))
    negative = _times_log(1 - targets, jax.nn.log_sigmoid(-logits))
    wrong = targets * jax.nn.sigmoid(-logits) + (1 - targets) * jax.nn.sigmoid(logits)
    weight = 1.0 if alpha is None else alpha * targets + (1 - alpha) * (1 - targets)
    losses = -weight * _power(wrong, gamma) * (positive + negative)
    return jnp.mean(_weighted(losses, "class_weights", class_weights), axis=-1)


def class_balanced_weights(counts: Sequence[int], beta: float = 0.999) -> tuple[float, ...]:
    """Weights for classes that have `counts` training examples: (1 - beta) / (1 - beta^n).

    Scaled so that they sum to the number of classes that have examples; the others get weight 0.
    beta = 0 weighs all alike, beta -> 1 by the inverse of the count. Y. Cui et al., Class-Balanced
    Loss (https://arxiv.org/abs/1901.05555), equation 2. Raises InputError for a beta outside
    [0, 1), for a negative count and where no class has an example.
    """
    if not 0 <= beta < 1:
        raise InputError(f"beta is {beta}; it must be in [0, 1)")
    for number, count in enumerate(counts):
        check_count(0, **{f"counts[{number}]": count})
    if not any(counts):
        raise InputError(f"counts are {tuple(counts)}; one class must have examples")
    weights = [(1 - beta) / (1 - beta**n) if n else 0.0 for n in counts]
    scale = sum(1 for n in counts if n) / sum(weights)
    return tuple(weight * scale for weight in weights)


def class_balanced(
    logits: jax.Array,
    targets: jax.Array,
    *,
    counts: Sequence[int],
    beta: float = 0.999,
    loss_function: Callable[..., jax.Array] = softmax_cross_entropy,
) -> jax.Array:
    """A loss that takes `class_weights`, with `class_balanced_weights(counts, beta)`, [b]."""
    return loss_function(logits, targets, class_weights=class_balanced_weights(counts, beta))


def distillation(
    logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """T^2 KL(teacher || student) of the distributions softened by the temperature T, [b].

    The factor keeps the size of the gradient when T changes. G. Hinton et al., Distilling the
    Knowledge in a Neural Network (https://arxiv.org/abs/1503.02531), section 2.
    """
    check_positive(**{"distillation: temperature": temperature})
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(_times_log(jnp.exp(log_q), log_q - log_p), axis=-1)


def sigmoid_distillation(
    logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """`distillation` of labels that do not exclude each other: the mean over them, [b]."""
    # A sigmoid is a softmax over the logit and 0.
    student, teacher = (jnp.stack([x, jnp.zeros_like(x)], -1) for x in (logits, teacher_logits))
    return jnp.mean(distillation(student, teacher, temperature=temperature), axis=-1)


def _weighted(values: jax.Array, name: str, weights: Sequence[float] | None) -> jax.Array:
    values = values.astype(jnp.float32)
    if weights is None:
        return values
    check_weights(values.shape[-1], **{name: weights})
    return values * jnp.asarray(weights, jnp.float32)


def _times_log(weight: jax.Array, log_p: jax.Array) -> jax.Array:
    """weight * log p, and 0 where the weight is 0, though the logit be minus infinity."""
    counts = weight != 0
    return jnp.where(counts, weight * jnp.where(counts, log_p, 0.0), 0.0)


def _power(base: jax.Array, exponent: float) -> jax.Array:
    """base ** exponent for a base >= 0, with a finite gradient at 0 also for exponents below 1."""
    positive = base > 0
    at_zero = jnp.where(exponent == 0, 1.0, 0.0)  # the exponent may be traced, too
    return jnp.where(positive, jnp.where(positive, base, 1.0) ** exponent, at_zero)
