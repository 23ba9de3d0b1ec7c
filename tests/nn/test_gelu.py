"""GELU against its definition in double precision, and against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from cvjax.nn.gelu import gelu

X = np.concatenate([np.linspace(-12, 12, 601), [-1e30, -40, -1e-20, 0, 1e-20, 40, 1e30]])
X = X.astype(np.float32)


def test_values_and_derivatives_are_those_of_the_definition():
    """x Phi(x), Phi(x) + x phi(x), (2 - x^2) phi(x)."""
    x = np.float64(X)
    density = np.exp(-np.minimum(x**2, 1e4) / 2) / np.sqrt(2 * np.pi)
    wanted = [x * ndtr(x), ndtr(x) + x * density, (2 - x**2) * density]
    first, second = jax.grad, lambda f: jax.grad(jax.grad(f))
    for change, exact in zip((lambda f: f, first, second), wanted, strict=True):
        found = jax.jit(jax.vmap(change(gelu)))(X)
        # Phi is known to some roundings of 1, 6e-8 each, which x multiplies.
        np.testing.assert_allclose(found, exact, rtol=3e-7, atol=5e-7)
    tangent = jax.jvp(gelu, (jnp.asarray(X),), (jnp.full(X.shape, 2.0),))[1]
    np.testing.assert_allclose(tangent, 2 * wanted[1], rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_of_16_bits_it_is_a_rounding(dtype):
    x = jnp.asarray(X[:601], dtype)
    value, gradient = jax.vmap(jax.value_and_grad(gelu))(x)
    assert value.dtype == gradient.dtype == dtype
    wide = x.astype(jnp.float32)
    for found, wanted in ((value, gelu(wide)), (gradient, jax.vmap(jax.grad(gelu))(wide))):
        np.testing.assert_array_equal(found, wanted.astype(dtype))


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 1, 5)])
def test_any_shape(shape):
    x = jnp.ones(shape)
    value, pull = jax.vjp(gelu, x)
    assert value.shape == pull(x)[0].shape == shape


def test_double_precision_and_what_is_no_number():
    with jax.enable_x64(True):
        x = np.float64(X)
        found, slope = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(x)
        assert found.dtype == slope.dtype == np.float64
        # Roundings of Phi, 1.1e-16 each, which x multiplies.
        assert (np.abs(found - x * ndtr(x)) <= 1e-15 * np.abs(x)).all()
    assert np.isnan(gelu(jnp.float32(jnp.nan))) and np.isnan(jax.grad(gelu)(jnp.float32(jnp.nan)))
    assert gelu(jnp.float32(jnp.inf)) == np.inf
