"""SiLU against Flax's, in value and in derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.nn.silu import silu

X = jnp.concatenate([jnp.linspace(-30, 30, 601), jnp.float32([-1e30, -88, 0, 1e-20, 88, 1e30])])


def test_values_and_derivatives_are_those_of_flax():
    """Also where x is 0, as in a network that begins as zero, and in forward mode."""
    first, second = jax.grad, lambda f: jax.grad(jax.grad(f))
    # 1 - sigmoid(-x) is known to a rounding of 1, 6e-8, and multiplied by x where it is not 0: up
    # to 17 of them.
    for change, atol in ((lambda f: f, 0), (first, 1e-6), (second, 2e-6)):
        ours, theirs = (jax.jit(jax.vmap(change(f)))(X) for f in (silu, nn.silu))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    tangents = [jax.jvp(f, (X,), (2 * jnp.ones_like(X),))[1] for f in (silu, nn.silu)]
    np.testing.assert_allclose(*tangents, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_types_stay_theirs(dtype):
    x = X[:601].astype(dtype)
    value, gradient = jax.vmap(jax.value_and_grad(silu))(x)
    assert value.dtype == gradient.dtype == dtype
    wanted = jax.vmap(jax.grad(nn.silu))(x.astype(jnp.float32))
    # x times 1 - sigmoid, which is known to a rounding (2^-8, 2^-11) of 1.
    room = 40 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, atol=room)
