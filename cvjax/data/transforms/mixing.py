"""Mixup and cutmix of a batch on the device, inside jit.

`mix(images, rng, valid) -> Mixed`: each image is mixed with another valid one, its partner, and
`mixed.targets(targets)` mixes what is to be learnt in the same proportion: the share of the image
that is really its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cvjax.data.transforms.batched import rectangles
from cvjax.data.transforms.settings import check_between


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

        What is not valid keeps its target.
        """
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
    check_between(1e-3, 1e3, alpha=alpha)
    images = jnp.asarray(images)
    order, weight = jax.random.split(rng)
    partner = _partners(order, images, valid)
    share = jax.random.beta(weight, alpha, alpha, (len(images),))
    own = share[:, None, None, None].astype(images.dtype)
    return Mixed(own * images + (1 - own) * images[partner], partner, share)


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
    check_between(1e-3, 1e3, alpha=alpha)
    images = jnp.asarray(images)
    batch, height, width, _ = images.shape
    order, weight, row, column = jax.random.split(rng, 4)
    partner = _partners(order, images, valid)
    side = jnp.sqrt(1 - jax.random.beta(weight, alpha, alpha, (batch,)))  # of those of the image
    y, x = (
        jax.random.randint(key, (batch,), 0, size) for key, size in ((row, height), (column, width))
    )
    half_height, half_width = (jnp.int32(side * size / 2) for size in (height, width))
    top, bottom = jnp.maximum(y - half_height, 0), jnp.minimum(y + half_height, height)
    left, right = jnp.maximum(x - half_width, 0), jnp.minimum(x + half_width, width)
    is_pasted = rectangles(height, width, top, left, bottom, right)[..., None]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixed(jnp.where(is_pasted, images[partner], images), partner, share)


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
    choice, rng = jax.random.split(rng)
    return jax.lax.cond(
        jax.random.bernoulli(choice, p_cutmix),
        lambda: cutmix(images, rng, valid, alpha=cutmix_alpha),
        lambda: mixup(images, rng, valid, alpha=mixup_alpha),
    )


def _partners(rng: jax.Array, images: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Returns int32 [b]: the valid ones in a random circle, each with the next as its partner."""
    batch = len(images)
    valid = jnp.ones(batch, bool) if valid is None else valid
    order = jnp.argsort(jnp.where(valid, jax.random.uniform(rng, (batch,)), jnp.inf))
    place, count = jnp.arange(batch), jnp.sum(valid)
    following = jnp.where(place < count, (place + 1) % jnp.maximum(count, 1), place)
    return jnp.zeros(batch, jnp.int32).at[order].set(order[following])
