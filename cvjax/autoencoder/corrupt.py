"""What a denoising autoencoder sees: images [b, h, w, c] in [0, 1] and a key to such images."""

import math

import jax
import jax.numpy as jnp

from cvjax.checks import check_between, check_count


def add_noise(image: jax.Array, rng: jax.Array, *, std: float = 0.3) -> jax.Array:
    """Normal noise on every value, clipped to [0, 1]."""
    check_between(0, math.inf, **{"add_noise: std": std})
    return jnp.clip(image + std * jax.random.normal(rng, image.shape), 0.0, 1.0)


def mask_patches(
    image: jax.Array, rng: jax.Array, *, rate: float = 0.5, patch: int = 4
) -> jax.Array:
    """Makes each square of `patch` x `patch` pixels black with the chance `rate`.

    With patch 1 it is the masking noise of P. Vincent et al., ICML 2008, section 2.3. Squares that
    reach over the right or lower border are cut.
    """
    check_between(0, 1, **{"mask_patches: rate": rate})
    check_count(1, **{"mask_patches: patch": patch})
    b, h, w, _ = image.shape
    kept = jax.random.bernoulli(rng, 1 - rate, (b, -(-h // patch), -(-w // patch), 1))
    kept = jnp.repeat(jnp.repeat(kept, patch, axis=1), patch, axis=2)[:, :h, :w]
    return image * kept
