"""What a denoising autoencoder sees: images [b, h, w, c] in [0, 1] and a key to such images."""

import jax
import jax.numpy as jnp

from cvjax.errors import InputError


def add_noise(image: jax.Array, rng: jax.Array, *, std: float = 0.3) -> jax.Array:
    """Normal noise on every value, clipped to [0, 1]."""
    if not std >= 0:
        raise InputError(f"add_noise: std is {std}; it must be 0 or more")
    return jnp.clip(image + std * jax.random.normal(rng, image.shape), 0.0, 1.0)


def mask_patches(
    image: jax.Array, rng: jax.Array, *, rate: float = 0.5, patch: int = 4
) -> jax.Array:
    """Makes each square of `patch` x `patch` pixels black with the chance `rate`.

    With patch 1 it is the masking noise of P. Vincent et al., ICML 2008, section 2.3. Squares that
    reach over the right or lower border are cut.
    """
    if not 0 <= rate <= 1 or patch < 1 or patch % 1:
        raise InputError(
            f"mask_patches: rate is {rate} and patch {patch}; they must be in [0, 1], and a whole "
            "number, 1 or more"
        )
    b, h, w, _ = image.shape
    kept = jax.random.bernoulli(rng, 1 - rate, (b, -(-h // patch), -(-w // patch), 1))
    kept = jnp.repeat(jnp.repeat(kept, patch, axis=1), patch, axis=2)[:, :h, :w]
    return image * kept
