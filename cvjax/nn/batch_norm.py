"""Batch normalization (S. Ioffe, C. Szegedy, https://arxiv.org/abs/1502.03167)."""

from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class BatchNorm(nn.Module):
    """Normalizes each channel over all examples and places, [b, ..., c] -> the same.

    Numbers, parameters and statistics are those of `flax.linen.BatchNorm`, whose mask is counted
    place by place, and whose gradient takes three sums where two will do.

    Attributes:
      momentum: what is kept of the running statistics in each step.
      epsilon: is added to the variance.
      dtype: of the result; parameters and statistics are float32.
      use_scale, use_bias: whether channels are scaled and shifted after it, by parameters.
      scale_init: where the scale begins.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    use_bias: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: [b, ..., c].
          train: normalize by this batch's statistics, and update their running average (not in
            `init`), which is normalized by otherwise.
          valid: bool [b]: the statistics are those of these rows alone. At least one must be True,
            else they are NaN.
        """
        channels, places = x.shape[-1], x.shape[1:-1]
        running = [
            self.variable("batch_stats", name, start, channels, jnp.float32)
            for name, start in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))

        def batch_mean(y: jax.Array) -> jax.Array:
            each = jnp.sum(y, tuple(range(1, y.ndim - 1))) / prod(places)  # [b, c]
            if valid is None:
                return jnp.mean(each, axis=0)
            return jnp.sum(jnp.where(valid[:, None], each, 0), axis=0) / jnp.sum(valid)

        if train:
            mean = batch_mean(x)
            variance = jnp.maximum(batch_mean(x * x) - mean * mean, 0)
            if not self.is_initializing():
                for average, value in zip(running, (mean, variance), strict=True):
                    average.value = self.momentum * average.value + (1 - self.momentum) * value
        else:
            mean, variance = (average.value for average in running)
        scale = jax.lax.rsqrt(variance + self.epsilon)
        if self.use_scale:
            scale = scale * self.param("scale", self.scale_init, (channels,), jnp.float32)
        # (x - mean) scale, so written that the mean's gradient needs no sum over places of its own:
        # any number in place of `fixed` gives the same, and it is near enough not to lose digits.
        fixed = jax.lax.stop_gradient(mean)
        shift = (fixed - mean) * scale
        if self.use_bias:
            zeros = nn.initializers.zeros
            shift = shift + self.param("bias", zeros, (channels,), jnp.float32)
        return ((x - fixed) * scale + shift).astype(self.dtype)
