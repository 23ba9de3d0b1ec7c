"""Mixup and cutmix of a batch on the device, inside jit.

`mix(images, rng, valid) -> Mixed`: each image is mixed with another valid one, its partner, and
`mixed.targets(targets)` mixes what is to be learnt in the same proportion: the share of the image
that is really its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cvjax.checks import check_between
from cvjax.data.transforms.batched import rectangles
from cvjax.errors import InputError


class Mixed(NamedTuple):
    """A batch of mixed images.

    Attributes:
        images: [b, h, w, c], as they were given but mixed.
        partner: int32 [b], the number of the image that each was mixed with. A valid one has
            another valid one, unless it is the only one; one that is not valid has itself.
        share: float32 [b], the part of each image that is its own, from 0 to 1.
    """

    images: jax.Array
    partner: jax.Array
    share: jax.Array

    def targets(self, targets: jax.Array) -> jax.Array:
        """Mixes probabilities [b, classes]; a row that summed to 1 with its partner's still does.

        What is not valid keeps its target. Raises InputError for targets of another shape.
        """
        if targets.ndim != 2:
            raise InputError(f"targets are {list(targets.shape)}; they must be [b, classes]")
        share = self.share[:, None]
        return share * targets + (1 - share) * jnp.asarray(targets)[self.partner]


def mixup(
    images: jax.Array, rng: jax.Array, valid: jax.Array | None = None, *, alpha: float = 0.2
) -> Mixed:
    """Blends each image with its partner.

    H. Zhang et al.: mixup (https://arxiv.org/abs/1710.09412, equation 2).

    Args:
        images: float [b, h, w, c].
        rng: draws the partners, and a share for each image.
        valid: bool [b]; None means all.
        alpha: the share is from Beta(alpha, alpha).
    """
    order, rng = jax.random.split(rng)
    return _mixed(images, order, valid, *_mixup_weights(rng, images.shape, alpha))


def cutmix(
    images: jax.Array, rng: jax.Array, valid: jax.Array | None = None, *, alpha: float = 1.0
) -> Mixed:
    """Pastes a rectangle of its partner into each image, at the same place.

    S. Yun et al.: CutMix (https://arxiv.org/abs/1905.04899, equation 2). The middle of the
    rectangle is any pixel; what would lie outside the image is lost, and the share is counted from
    the pixels that were really pasted.

    Args:
        images: float [b, h, w, c].
        rng: draws the partners, and a rectangle for each image.
        valid: bool [b]; None means all.
        alpha: the share before the rectangle is clipped is from Beta(alpha, alpha).
    """
    order, rng = jax.random.split(rng)
    return _mixed(images, order, valid, *_cutmix_weights(rng, images.shape, alpha))


def mixup_or_cutmix(
    images: jax.Array,
    rng: jax.Array,
    valid: jax.Array | None = None,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    p_cutmix: float = 0.5,
) -> Mixed:
    """One of the two for the whole batch: cutmix with probability `p_cutmix`.

    The defaults are those of DeiT (https://arxiv.org/abs/2012.12877, table 9).
    """
    check_between(0, 1, p_cutmix=p_cutmix)
    order, choice, rng = jax.random.split(rng, 3)
    is_cutmix = jax.random.bernoulli(choice, p_cutmix)
    # Not a conditional around all: devices that exchange images inside one can wait for each other.
    weights, share = (
        jnp.where(is_cutmix, cut, blend)
        for cut, blend in zip(
            _cutmix_weights(rng, images.shape, cutmix_alpha),
            _mixup_weights(rng, images.shape, mixup_alpha),
            strict=True,
        )
    )
    return _mixed(images, order, valid, weights, share)


def _mixup_weights(
    rng: jax.Array, shape: tuple[int, ...], alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the weight of each own pixel, [b, 1, 1, 1], and their mean, the share, [b]."""
    check_between(1e-3, 1e3, alpha=alpha)
    share = jax.random.beta(rng, alpha, alpha, shape[:1])
    return share[:, None, None, None], share


def _cutmix_weights(
    rng: jax.Array, shape: tuple[int, ...], alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the weight of each own pixel, 0 or 1, [b, h, w, 1], and the share, [b]."""
    check_between(1e-3, 1e3, alpha=alpha)
    batch, height, width, _ = shape
    size, row, column = jax.random.split(rng, 3)
    side = jnp.sqrt(1 - jax.random.beta(size, alpha, alpha, (batch,)))  # of those of the image
    y = jax.random.randint(row, (batch,), 0, height)
    x = jax.random.randint(column, (batch,), 0, width)
    half_height, half_width = (jnp.int32(side * length / 2) for length in (height, width))
    top, bottom = jnp.maximum(y - half_height, 0), jnp.minimum(y + half_height, height)
    left, right = jnp.maximum(x - half_width, 0), jnp.minimum(x + half_width, width)
    is_pasted = rectangles(height, width, top, left, bottom, right)[..., None]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return 1 - is_pasted.astype(share.dtype), share


def _mixed(
    images: jax.Array,
    rng: jax.Array,
    valid: jax.Array | None,
    weights: jax.Array,
    share: jax.Array,
) -> Mixed:
    images = jnp.asarray(images)
    partner = _partners(rng, images, valid)
    # In float32, with the very share of the targets; images of whole numbers become float32.
    mixed = weights * images + (1 - weights) * images[partner]
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    return Mixed(mixed.astype(images.dtype) if is_float else mixed, partner, share)


def _partners(rng: jax.Array, images: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Returns int32 [b]: the valid ones in a random circle, each with the next as its partner."""
    batch = len(images)
    valid = jnp.ones(batch, bool) if valid is None else valid
    order = jnp.argsort(jnp.where(valid, jax.random.uniform(rng, (batch,)), jnp.inf))
    place, count = jnp.arange(batch), jnp.sum(valid)
    following = jnp.where(place < count, (place + 1) % jnp.maximum(count, 1), place)
    return jnp.zeros(batch, jnp.int32).at[order].set(order[following])
