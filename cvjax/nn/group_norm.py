"""Group normalization (Y. Wu, K. He, https://arxiv.org/abs/1803.08494)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


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
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        size = channels // self.groups
        # Group means by a matrix product leave one number for each channel, and the loops over
        # the pixels, which XLA fuses, without an index of the group: these it can vectorize.
        same_group = np.kron(np.eye(self.groups), np.ones((size, size))) / size

        def group_mean(y: jax.Array) -> jax.Array:
            return jnp.matmul(
                jnp.mean(y, places), same_group.astype(np.float32), precision="highest"
            )

        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        mean = group_mean(x)
        variance = jnp.maximum(group_mean(x * x) - mean * mean, 0)
        scale = jax.lax.rsqrt(variance + self.epsilon) * scale
        shift = bias - mean * scale
        to_places = (slice(None), *[None] * len(places))
        return (x * scale[to_places] + shift[to_places]).astype(self.dtype)
