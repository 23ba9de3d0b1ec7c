"""Vectors for times and classes, which condition a network."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def sinusoidal(t: jax.Array, features: int, max_period: float = 10_000.0) -> jax.Array:
    """Sines and cosines of `1000 t` at geometric frequencies (Vaswani et al. 2017, section 3.5).

    Args:
      t: float [batch], times in [0, 1].
      features: an even number.
      max_period: the longest wave length, in thousandths of the time interval.

    Returns:
      float32 [batch, features].
    """
    half = features // 2
    frequencies = max_period ** (-jnp.arange(half) / half)
    angles = 1000.0 * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeAndClassEmbedding(nn.Module):
    """The sum of an embedded time and an embedded class, [batch, features].

    Class `num_classes` is the null class: it stands for "any", which classifier-free guidance
    needs (Ho and Salimans 2022).
    """

    features: int
    num_classes: int = 0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, t: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """Embeds `t` [batch] in [0, 1] and, with classes, `label` int [batch] in [0, num_classes]."""
        x = sinusoidal(t, self.features)
        x = nn.silu(nn.Dense(self.features, dtype=self.dtype, name="time_in")(x))
        x = nn.Dense(self.features, dtype=self.dtype, name="time_out")(x)
        if self.num_classes:
            embed = nn.Embed(self.num_classes + 1, self.features, dtype=self.dtype, name="class")
            x = x + embed(jnp.full(t.shape, self.num_classes) if label is None else label)
        return x
