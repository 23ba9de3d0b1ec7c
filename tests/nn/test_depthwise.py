"""The depthwise convolution against XLA's, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cvjax.nn.depthwise import depthwise_conv

OPTIONS = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((9, 7), 3, 1, ((1, 1), (1, 1))),
        ((9, 7), 3, 2, "SAME"),
        ((8, 6), 5, 2, "SAME"),
        ((8, 6), 5, 2, ((2, 2), (2, 2))),
        ((2, 3), 5, 1, ((2, 2), (2, 2))),
        ((1, 1), 3, 2, ((1, 1), (1, 1))),
        ((8, 5), 3, 1, "VALID"),
    ],
)
def test_equals_the_general_convolution(size, kernel, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 4)).astype(np.float32)
    weight = rng.normal(size=(kernel, kernel, 1, 4)).astype(np.float32)

    def general(x, weight):
        return lax.conv_general_dilated(
            x, weight, (stride, stride), padding, feature_group_count=4, **OPTIONS
        )

    def ours(x, weight):
        return depthwise_conv(
            x, weight, (stride, stride), padding, feature_group_count=4, **OPTIONS
        )

    def all_of(function):
        def value(x, weight):
            y = function(x, weight)
            return jnp.sum(jnp.sin(y)), y

        @jax.jit
        def run(x, weight):
            # Forward alone, and over the gradient as `jax.hessian` does it, and in reverse over it:
            # all from one trace, which takes most of the time.
            gradient = jax.grad(value, (0, 1), has_aux=True)
            (slopes, y), along = jax.linearize(gradient, x, weight)
            zero = jnp.zeros_like(y)
            return (
                y,
                slopes,
                along(x[::-1], jnp.sin(weight)),
                jax.linear_transpose(along, x, weight)((slopes, zero)),
                jax.vmap(function, (0, None))(x[:, None], weight),
            )

        return jax.tree.map(np.asarray, run(x, weight))

    # Sums of up to 49 products in another order, through a sine.
    for a, b in zip(*map(jax.tree.leaves, (all_of(ours), all_of(general))), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 5, 4, 6), (3, 3, 1, 6), {}),
        ((2, 5, 4, 6), (3, 3, 1, 6), dict(rhs_dilation=(2, 2))),
        ((2, 5, 4, 6), (3, 3, 1, 6), dict(lhs_dilation=(2, 1), padding=((1, 1), (2, 0)))),
        ((2, 5, 4, 6), (3, 3, 1, 12), {}),
        ((2, 5, 4, 6), (3, 3, 2, 6), dict(feature_group_count=3)),
        (
            (2, 6, 5, 4),
            (6, 1, 3, 3),
            dict(feature_group_count=6, dimension_numbers=("NCHW", "OIHW", "NCHW")),
        ),
        ((2, 3, 2, 6), (5, 5, 1, 6), dict(padding="VALID")),
        ((2, 5, 6), (3, 1, 6), dict(dimension_numbers=("NHC", "HIO", "NHC"))),
    ],
)
def test_options_that_are_not_said_and_those_of_xla(shape, kernel, options):
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=of).astype(np.float32) for of in (shape, kernel))
    strides = (1,) * (len(shape) - 2)
    options = dict(padding="SAME") | options
    said = dict(feature_group_count=6, **OPTIONS) | options
    ours = jax.jit(lambda *given: depthwise_conv(*given, strides, **options))
    own = jax.jit(lambda *given: lax.conv_general_dilated(*given, strides, **said))
    # Sums of up to 9 products of order one, in another order.
    np.testing.assert_allclose(ours(x, weight), own(x, weight), rtol=1e-5, atol=1e-5)


def test_negative_padding_crops():
    """XLA's own reads beside the map, on a CPU."""
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=of).astype(np.float32) for of in ((2, 5, 4, 6), (3, 3, 1, 6)))
    cropped = depthwise_conv(x, weight, (1, 1), ((-1, 1), (0, -1)))
    own = depthwise_conv(x[:, 1:, :-1], weight, (1, 1), ((0, 1), (0, 0)))
    np.testing.assert_array_equal(cropped, own)


def test_it_is_linear_in_each_argument():
    """Its derivative along x at any place is the convolution of that direction, in bfloat16 too."""
    rng = np.random.default_rng(0)
    x, dx = (rng.normal(size=(1, 6, 5, 2)).astype(jnp.bfloat16) for _ in range(2))
    weight = rng.normal(size=(3, 3, 1, 2)).astype(jnp.bfloat16)

    def convolve(x):
        return depthwise_conv(x, weight, (2, 2), "SAME", feature_group_count=2, **OPTIONS)

    along, there = jax.jit(lambda x, dx: (jax.jvp(convolve, (x,), (dx,))[1], convolve(dx)))(x, dx)
    assert along.dtype == jnp.bfloat16
    # Summed in float32 too, in another order: the last of the 8 bits of bfloat16 may differ.
    np.testing.assert_allclose(np.float32(along), np.float32(there), rtol=2**-7, atol=2**-7)


def test_bfloat16_is_summed_in_float32():
    x = np.ones((1, 3, 3, 2), jnp.bfloat16)
    kernel = np.full((3, 3, 1, 2), 1 / 256, jnp.bfloat16)
    kernel[0, 0] = 1.0
    options = dict(feature_group_count=2, **OPTIONS)
    y = jax.jit(lambda *given: depthwise_conv(*given, (1, 1), "VALID", **options))(x, kernel)
    assert y.dtype == jnp.bfloat16
    # Added one by one to 1.0 in bfloat16, 8 times 1/256 would be lost.
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.float32(1 + 8 / 256))
