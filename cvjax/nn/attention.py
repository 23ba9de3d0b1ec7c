"""Multi-head attention (A. Vaswani et al., https://arxiv.org/abs/1706.03762, section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.errors import InputError
from cvjax.nn.dense import Dense


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | float = 0.0,
) -> jax.Array:
    """What the queries find among the values: softmax(query key / sqrt(c) + bias) value.

    As `jax.nn.dot_product_attention`, which takes longer on a CPU (experiments/step_time).

    Args:
      query: [..., n, heads, c].
      key, value: [..., m, heads, c].
      mask: bool, to be broadcast to [..., heads, n, m]; True where a query may see a key.
      bias: float32, to be broadcast likewise.

    Returns:
      [..., n, heads, c], of the dtype of `value`; the softmax is float32.
    """
    # Heads beside the batch: XLA multiplies matrices that lie so without turning them around.
    query, key, value = (x.swapaxes(-3, -2) for x in (query * query.shape[-1] ** -0.5, key, value))
    logits = jnp.matmul(query, key.swapaxes(-2, -1), preferred_element_type=jnp.float32)
    logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return (jax.nn.softmax(logits).astype(value.dtype) @ value).swapaxes(-3, -2)


class SelfAttention(nn.Module):
    """Every token looks at every other, [b, n, c] -> [b, n, c].

    Attributes:
      heads: each has c / heads channels. The first layer gives all heads' queries, then all
        keys, then all values, as the published weights do.
      zero_init: start with an output of zeros, so that a residual branch begins as nothing.
      dtype: of the computation, softmax excepted; parameters are float32.
    """

    heads: int
    zero_init: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The `mask`, bool [b or 1, heads or 1, n, n], is True where a query may see a key."""
        channels = x.shape[-1]
        if channels % self.heads:
            raise InputError(
                f"attention: {channels} channels do not divide into {self.heads} heads"
            )
        x = Dense(3 * channels, dtype=self.dtype, name="query_key_value")(x)
        x = x.reshape(*x.shape[:2], 3, self.heads, channels // self.heads)
        query, key, value = x[:, :, 0], x[:, :, 1], x[:, :, 2]
        x = attend(query, key, value, mask)
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        x = x.reshape(*x.shape[:2], channels)
        return Dense(channels, kernel_init=init, dtype=self.dtype, name="output")(x)


class CrossAttention(nn.Module):
    """Every token looks at every word of another sequence, [b, n, c] and [b, m, d] -> [b, n, c].

    Attributes: as of `SelfAttention`.
    """

    heads: int
    zero_init: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
        """Applies the layer."""
        channels = x.shape[-1]
        if channels % self.heads:
            raise InputError(
                f"attention: {channels} channels do not divide into {self.heads} heads"
            )
        each = self.heads, channels // self.heads
        split = lambda y: y.reshape(*y.shape[:2], *each)  # noqa: E731
        query = split(Dense(channels, dtype=self.dtype, name="query")(x))
        both = Dense(2 * channels, dtype=self.dtype, name="key_value")(words)
        key, value = map(split, jnp.split(both, 2, axis=-1))
        x = attend(query, key, value).reshape(*x.shape[:2], channels)
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        return Dense(channels, kernel_init=init, dtype=self.dtype, name="output")(x)
