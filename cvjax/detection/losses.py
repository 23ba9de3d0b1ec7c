"""Losses of detection: one float32 per element or per box, and the sums over those that count.

Logits are of any float type; all is computed in float32 and finite, with finite gradients, for
logits up to 1e38. Boxes are xyxy, predicted and true ones side by side [..., 4].
What does not count (padding, ignored anchors) is taken out by `normalized`, whose weight is 0
there.
"""

import jax
import jax.numpy as jnp

from cvjax.detection.boxes import paired_ciou, paired_diou, paired_giou, paired_iou
from cvjax.errors import InputError
from cvjax.train.sharding import AXIS

NORMALIZERS = ("image", "batch", "global")


def normalized(
    losses: jax.Array,
    weights: jax.Array,
    counts: jax.Array,
    valid: jax.Array | None = None,
    *,
    by: str = "batch",
) -> jax.Array:
    """sum(weights * losses) / max(sum(counts), 1) as one number; 0 without a valid image.

    Args:
        losses: [b, ...]; of any value, NaN too, where the weight is 0.
        weights: [b, ...], broadcasts against the losses; 0 where a loss does not count.
        counts: [b, ...] what to divide by, the foreground for one: bool or float32.
        valid: bool [b]; nothing of the other images counts. None: all are.
        by: "image" divides image by image, and takes the mean of the valid ones. "batch" divides
            the sum of the batch by the count of the batch. Under `jax.jit` that is the batch of
            all devices; under `jax.pmap` it is each device's own, unless it is "global": then the
            mean over devices of the result is the sum of all over the count of all.

    Raises:
        InputError: another `by`.
    """
    check_normalizer(by)
    valid = jnp.ones(len(losses), bool) if valid is None else valid

    def of_images(values: jax.Array) -> jax.Array:
        return jnp.where(valid, jnp.sum(values.reshape(len(values), -1), 1), 0.0)

    weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), losses.shape)
    sums = of_images(jnp.where(weights != 0, losses.astype(jnp.float32), 0.0) * weights)
    counts = of_images(jnp.asarray(counts, jnp.float32))
    if by == "image":
        return jnp.sum(sums / jnp.maximum(counts, 1.0)) / jnp.maximum(jnp.sum(valid), 1)
    total, count = jnp.sum(sums), jnp.sum(counts)
    if by == "global" and _is_mapped():
        total, count = total * jax.lax.axis_size(AXIS), jax.lax.psum(count, AXIS)
    return total / jnp.maximum(count, 1.0)


def check_normalizer(name: str) -> None:
    """Raises InputError for a normalizer that `normalized` does not know."""
    if name not in NORMALIZERS:
        raise InputError(f"normalizer is {name!r}; it can be {', '.join(map(repr, NORMALIZERS))}")


def sigmoid_focal(
    logits: jax.Array, targets: jax.Array, *, alpha: float | None = 0.25, gamma: float = 2.0
) -> jax.Array:
    """-alpha_t (1 - p_t)^gamma log p_t of each logit, targets in 0..1; alpha None leaves it out.

    T.-Y. Lin et al.: Focal Loss (https://arxiv.org/abs/1708.02002), equation 5.
    """
    logits, targets = _float32(logits), _float32(targets)
    p = jax.nn.sigmoid(logits)
    wrong = p * (1 - targets) + jax.nn.sigmoid(-logits) * targets  # 1 - p_t, not cancelled
    losses = _power(wrong, gamma) * _cross_entropy(logits, targets)
    if alpha is not None:
        losses *= alpha * targets + (1 - alpha) * (1 - targets)
    return losses


def quality_focal(logits: jax.Array, quality: jax.Array, *, beta: float = 2.0) -> jax.Array:
    """|q - p|^beta times the cross-entropy with the quality q in 0..1 (the IoU, say).

    X. Li et al.: Generalized Focal Loss (https://arxiv.org/abs/2006.04388), equation 5.
    """
    logits, quality = _float32(logits), _float32(quality)
    distance = jnp.abs(quality - jax.nn.sigmoid(logits))
    return _power(distance, beta) * _cross_entropy(logits, quality)


def varifocal(
    logits: jax.Array, quality: jax.Array, *, alpha: float = 0.75, gamma: float = 2.0
) -> jax.Array:
    """q times the cross-entropy with q where q > 0, alpha p^gamma times that with 0 elsewhere.

    H. Zhang et al.: VarifocalNet (https://arxiv.org/abs/2008.13367), equation 2.
    """
    logits, quality = _float32(logits), _float32(quality)
    negative = alpha * _power(jax.nn.sigmoid(logits), gamma)
    weight = jnp.where(quality > 0, quality, negative)
    return weight * _cross_entropy(logits, quality)


def distribution_focal(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy of logits [..., k] with the two whole numbers beside target [...], in 0..k - 1.

    X. Li et al.: Generalized Focal Loss (https://arxiv.org/abs/2006.04388), equation 6. A target
    outside counts as the nearest end.
    """
    log_p, last = jax.nn.log_softmax(_float32(logits)), logits.shape[-1] - 1
    target = jnp.clip(_float32(target), 0.0, last)
    share = jnp.maximum(1 - jnp.abs(jnp.arange(last + 1) - target[..., None]), 0.0)
    return -jnp.sum(share * log_p, -1)


def smooth_l1(prediction: jax.Array, target: jax.Array, *, beta: float = 1.0) -> jax.Array:
    """d^2 / (2 beta) where |d| < beta, |d| - beta / 2 elsewhere; beta 0 is |d|. Elementwise.

    R. Girshick: Fast R-CNN (https://arxiv.org/abs/1504.08083), equation 3, where beta is 1.
    """
    away = jnp.abs(_float32(prediction) - _float32(target))
    if beta <= 0:
        return away
    near = jnp.minimum(away, beta)  # its square is finite
    return jnp.where(away < beta, near**2 / (2 * beta), away - beta / 2)


def iou_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - IoU of boxes [..., 4]: [...]."""
    return 1 - paired_iou(prediction, target)


def giou_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - GIoU of boxes [..., 4]: [...]."""
    return 1 - paired_giou(prediction, target)


def diou_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - DIoU of boxes [..., 4]: [...]."""
    return 1 - paired_diou(prediction, target)


def ciou_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - CIoU of boxes [..., 4]: [...]."""
    return 1 - paired_ciou(prediction, target)


def centerness(distances: jax.Array) -> jax.Array:
    """The target in 0..1 of left, top, right, bottom [..., 4]: 1 in the middle, 0 outside.

    Z. Tian et al.: FCOS (https://arxiv.org/abs/1904.01355), equation 3. It has no gradient.
    """
    distances = jax.lax.stop_gradient(_float32(distances))
    a, b = distances[..., :2], distances[..., 2:]
    far = jnp.maximum(a, b)
    share = jnp.maximum(jnp.minimum(a, b), 0.0) / jnp.where(far > 0, far, 1.0)
    return jnp.sqrt(share[..., 0] * share[..., 1])


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-t log p - (1 - t) log(1 - p) of each logit; targets in 0..1."""
    return _cross_entropy(_float32(logits), _float32(targets))


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return targets * jax.nn.softplus(-logits) + (1 - targets) * jax.nn.softplus(logits)


def _is_mapped() -> bool:
    """Whether this runs inside of the engine's `pmap`."""
    try:
        jax.lax.axis_size(AXIS)
    except NameError:  # jax's word for an axis that is not there
        return False
    return True


def _power(base: jax.Array, exponent: float) -> jax.Array:
    """base^exponent for a base >= 0, whose gradient at 0 is finite for any exponent."""
    return jnp.maximum(base, jnp.finfo(jnp.float32).tiny) ** exponent


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
