"""Squeeze and excitation: channels weighted by what is in the whole map.

J. Hu, L. Shen, G. Sun: Squeeze-and-Excitation Networks, CVPR 2018
(https://arxiv.org/abs/1709.01507, section 3).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class SqueezeExcite(nn.Module):
    """x * gate(expand(activation(reduce(mean of x)))), [b, h, w, c] -> [b, h, w, c].

    Attributes:
      features: channels between the two layers.
      activation, gate: of the first and of the second layer.
      dtype: of the computation; parameters are float32.
    """

    features: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Weighs the channels."""
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = self.activation(nn.Dense(self.features, dtype=self.dtype, name="reduce")(y))
        return x * self.gate(nn.Dense(x.shape[-1], dtype=self.dtype, name="expand")(y))
