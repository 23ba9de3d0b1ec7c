"""Max pooling against flax's own, with its gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.nn.pooling import max_pool


@pytest.mark.parametrize(
    ("size", "window", "strides", "padding"),
    [
        ((9, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((7, 5), (2, 2), (2, 2), ((0, 0), (0, 0))),
        ((5, 6), (3, 2), (1, 2), ((0, 2), (1, 0))),
        ((1, 1), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_flax_with_ties(size, window, strides, padding, dtype):
    # Few different numbers: in most windows the largest value is there more than once.
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (2, *size, 3)).astype(dtype)
    # All different, for the second derivative, where XLA's own takes another one of equal values
    # than in the first.
    different = rng.permutation(np.arange(x.size) % 256 - 128)
    different = different.reshape(x.shape).astype(np.float32)

    def all_of(pool):
        def value(x):
            return jnp.sum(pool(x).astype(jnp.float32) ** 3)

        def second(x):
            return jnp.sum(jnp.sin(jax.grad(value)(x) / 1e4))

        return jax.jit(
            lambda x, different: (
                pool(x),
                jax.grad(value)(x),
                jax.vmap(jax.grad(value))(x[:, None]),
                jax.grad(second)(different),
            )
        )(x, different)

    *ours, our_second = all_of(lambda x: max_pool(x, window, strides, padding))
    *theirs, their_second = all_of(
        lambda x: nn.max_pool(x, window, strides=strides, padding=padding)
    )
    # Whole numbers below 256: no sum is rounded, in bfloat16 neither.
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    # A sine and sums of up to six products.
    np.testing.assert_allclose(our_second, their_second, rtol=1e-4, atol=1e-6)


def test_both_modes_of_differentiation_agree():
    rng = np.random.default_rng(0)
    x, step = rng.normal(size=(2, 1, 7, 6, 3)).astype(np.float32)
    weights = rng.normal(size=(1, 4, 3, 3)).astype(np.float32)

    def pool(x):
        return max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    @jax.jit
    def both(x, step, weights):
        return jax.jvp(pool, (x,), (step,))[1], jax.vjp(pool, x)[1](weights)[0]

    forward, backward = both(x, step, weights)
    # The same 36 products, added in another order.
    np.testing.assert_allclose(np.sum(weights * forward), np.sum(backward * step), rtol=1e-5)
