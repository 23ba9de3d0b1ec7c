"""Self-attention over the pixels of a map."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class SelfAttention(nn.Module):
    """Multi-head attention among all pixels, added to the input; the identity at the beginning.

    As in Ho et al. 2020 (appendix B): group normalization before, no position embedding.
    """

    heads: int = 4
    groups: int = 8
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to the same shape."""
        batch, height, width, channels = x.shape
        h = nn.GroupNorm(self.groups, dtype=self.dtype)(x).reshape(batch, -1, channels)
        h = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, out_kernel_init=nn.initializers.zeros
        )(h)
        return x + h.reshape(x.shape)
