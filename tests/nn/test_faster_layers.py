"""Layers that stand in for Flax's: the same parameters, numbers and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.attention import attend
from cvjax.nn.dense import Dense
from cvjax.nn.group_norm import GroupNorm

PAIRS = {
    "dense of a map": (Dense(5), nn.Dense(5), (2, 3, 4, 6)),
    "dense of a vector": (Dense(5, use_bias=False), nn.Dense(5, use_bias=False), (6,)),
    "dense of nothing": (Dense(5), nn.Dense(5), (0, 3, 6)),
    "dense in half precision": (Dense(5, dtype=jnp.bfloat16), nn.Dense(5, dtype=jnp.bfloat16),
                                (2, 3, 6)),
    "groups": (GroupNorm(3), nn.GroupNorm(3, epsilon=1e-5), (2, 5, 4, 12)),
    "one group of tokens": (GroupNorm(1, 1e-3), nn.GroupNorm(1, epsilon=1e-3), (2, 7, 6)),
    "a pixel": (GroupNorm(2), nn.GroupNorm(2, epsilon=1e-5), (3, 1, 1, 16)),
    "groups in half precision": (GroupNorm(4, dtype=jnp.bfloat16),
                                 nn.GroupNorm(4, epsilon=1e-5, dtype=jnp.bfloat16), (2, 3, 3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_numbers_parameters_and_gradients_are_those_of_flax(name):
    ours, theirs, shape = PAIRS[name]
    rng = np.random.default_rng(0)
    x = (1 + 3 * rng.standard_normal(shape)).astype(np.float32)
    if getattr(ours, "dtype", None) == jnp.bfloat16:
        x = jnp.asarray(x, jnp.bfloat16)
    params = theirs.init(jax.random.key(0), x)
    same = jax.tree.map(lambda leaf: leaf.shape, ours.init(jax.random.key(0), x))
    assert same == jax.tree.map(lambda leaf: leaf.shape, params)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)

    def measured(layer):
        y, pull = jax.vjp(layer.apply, params, x)
        return y, *pull(jnp.cos(jnp.arange(y.size).reshape(y.shape)).astype(y.dtype))

    for found, expected in zip(
        *map(jax.tree.leaves, jax.jit(lambda: (measured(ours), measured(theirs)))()), strict=True
    ):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        # Sums in another order: some roundings of the largest, or of the slopes, which are 1.
        most = 8 * float(jnp.finfo(found.dtype).eps) * np.abs(expected).max(initial=1)
        assert np.abs(np.float32(found) - np.float32(expected)).max(initial=0) <= most


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_that_of_jax(dtype):
    query, key, value, slope = (
        jax.random.normal(key, (2, n, 3, 4), dtype)
        for key, n in zip(jax.random.split(jax.random.key(0), 4), (5, 7, 7, 5), strict=True)
    )
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 1, 5, 7)).at[..., 0].set(True)

    def measured(attention, mask):
        y, pull = jax.vjp(lambda *given: attention(*given, mask=mask), query, key, value)
        return y, *pull(slope)

    for seen in (None, mask):
        found = jax.jit(lambda seen: measured(attend, seen))(seen)
        expected = measured(jax.nn.dot_product_attention, seen)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == dtype
            # The queries are scaled before the product instead of after it: one rounding more.
            most = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(theirs).max())
            assert float(jnp.abs(mine - theirs).max()) <= most


def test_channels_that_do_not_divide_into_groups_are_one_line():
    with pytest.raises(InputError, match="6 channels do not divide into 4 groups"):
        GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))
