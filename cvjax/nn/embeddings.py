"""Vectors that tell a network the time and the class."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def sinusoidal(t: jax.Array, features: int, max_period: float = 10_000.0) -> jax.Array:
    """Cosines and sines of t in [0, 1], float32 [b] -> [b, features]; `features` is even.

    The wavelengths grow geometrically from 2 pi to 2 pi * `max_period` thousandths of the unit
    of time, which are the steps of J. Ho et al., https://arxiv.org/abs/2006.11239, and of
    A. Vaswani et al., https://arxiv.org/abs/1706.03762, section 3.5.
    """
    frequencies = max_period ** -jnp.linspace(0.0, 1.0, features // 2)
    angles = 1000.0 * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """A perceptron with one hidden layer on the sinusoids of the time, [b] -> [b, features].

    Attributes:
      features: of the hidden layer and of the output; even.
      dtype: of the computation; the sinusoids and the parameters are float32.
      sinusoids: how many; even. None for as many as `features`.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    sinusoids: int | None = None

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Embeds times in [0, 1]."""
        x = sinusoidal(t, self.sinusoids or self.features).astype(self.dtype)
        x = nn.silu(nn.Dense(self.features, dtype=self.dtype, name="hidden")(x))
        return nn.Dense(self.features, dtype=self.dtype, name="output")(x)


class ClassEmbedding(nn.Module):
    """A learned vector for each class and one for the null class, int32 [b] -> [b, features].

    The null class has the index `num_classes`: it stands for "no class given" in classifier-free
    guidance (J. Ho, T. Salimans, https://arxiv.org/abs/2207.12598). A label out of range gives NaN.

    Attributes:
      num_classes: without the null class; 0 leaves only that one.
      features: length of a vector.
      dtype: of the output; the parameters are float32.
    """

    num_classes: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        """Embeds labels in 0..num_classes."""
        # As long as the embedded time, at the beginning, so that neither drowns the other.
        table = nn.Embed(
            self.num_classes + 1,
            self.features,
            embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype,
            name="table",
        )
        # Counted from the end, a negative label would be a class.
        return table(jnp.where(label < 0, self.num_classes + 1, label))
