"""Group normalization (Y. Wu, K. He, https://arxiv.org/abs/1803.08494)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cvjax.errors import InputError


class GroupNorm(nn.Module):
    """Normalizes each example's channels in groups, over all places, [b, ..., c] -> the same.

    Numbers and parameters are those of `flax.linen.GroupNorm`.

    Attributes:
      groups: a divisor of the channels.
      epsilon: is added to the variance.
      dtype: of the result; parameters and statistics are float32.
    """

    groups: int
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer."""
        channels, places = x.shape[-1], tuple(range(1, x.ndim - 1))
        if channels % self.groups:
            raise InputError(f"norm: {channels} channels do not divide into {self.groups} groups")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        size = channels // self.groups

        def group_mean(y: jax.Array) -> jax.Array:
            return jnp.mean(jnp.mean(y, places).reshape(-1, self.groups, size), axis=-1)

        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        mean = group_mean(x)
        variance = jnp.maximum(group_mean(x * x) - mean * mean, 0)
        # From groups to channels by a matrix product: the loops over the pixels, which XLA fuses,
        # then have no index of the group, and can be vectorized.
        each = np.kron(np.eye(self.groups), np.ones((1, size))).astype(np.float32)
        mean, inverse = (
            jnp.matmul(y, each, precision="highest")
            for y in (mean, jax.lax.rsqrt(variance + self.epsilon))
        )
        scale = inverse * scale
        shift = bias - mean * scale
        to_places = (slice(None), *[None] * len(places))
        return (x * scale[to_places] + shift[to_places]).astype(self.dtype)
