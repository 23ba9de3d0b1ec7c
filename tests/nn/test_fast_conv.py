from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cvjax.nn import fast_conv as module
from cvjax.nn.fast_conv import fast_conv

LAYOUT = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
# (x, kernel, strides, padding): every form, at the edges of each.
CASES = {
    "map smaller than the kernel": ((3, 2, 2, 5), (3, 3, 5, 4), (1, 1), "SAME"),
    "one pixel, uneven padding": ((2, 1, 1, 3), (3, 4, 3, 2), (1, 2), ((2, 1), (0, 5))),
    "nothing seen": ((2, 1, 2, 3), (3, 3, 3, 2), (2, 1), ((3, 0), (1, 1))),
    "a pixel between the strides": ((2, 1, 2, 3), (2, 3, 3, 2), (3, 1), ((2, 2), (1, 1))),
    "one pixel": ((2, 1, 1, 3), (5, 5, 3, 2), (1, 1), ((2, 2), (2, 2))),
    "four by four": ((2, 4, 4, 3), (3, 3, 3, 6), (1, 1), ((1, 1), (1, 1))),
    "strided to few": ((2, 7, 9, 3), (3, 3, 3, 6), (2, 3), ((1, 1), (1, 1))),
    "uneven padding": ((2, 5, 4, 3), (2, 3, 3, 4), (1, 2), ((0, 1), (2, 0))),
    "cropping": ((2, 6, 6, 3), (3, 3, 3, 4), (1, 1), ((-1, 0), (1, -2))),
    "cropped and padded": ((1, 4, 9, 3), (4, 3, 3, 16), (1, 1), ((-1, 1), (-1, -1))),
    "cropped and padded, strided": ((3, 9, 11, 6), (3, 1, 6, 6), (2, 2), ((-2, 2), (-2, 1))),
    "cropped and padded, all of it": ((2, 7, 8, 32), (1, 2, 32, 32), (1, 1), ((-2, 2), (-1, 3))),
    "kernel of a pixel": ((2, 12, 11, 3), (1, 1, 3, 7), (1, 1), "VALID"),
    "strided kernel of a pixel": ((2, 12, 11, 3), (1, 1, 3, 7), (2, 2), "VALID"),
    "few features": ((2, 6, 7, 8), (3, 3, 8, 4), (1, 1), "SAME"),
    "one feature, uneven padding": ((2, 7, 6, 9), (2, 3, 9, 1), (1, 1), ((2, 0), (0, 3))),
    "few features, cropping": ((2, 9, 8, 8), (3, 3, 8, 3), (1, 1), ((-1, 0), (1, -2))),
    "an image": ((2, 6, 8, 3), (3, 3, 3, 9), (1, 1), "SAME"),
    "an image, one channel": ((2, 7, 5, 1), (3, 3, 1, 3), (1, 1), "SAME"),
    "an image, five by five": ((2, 7, 9, 1), (5, 5, 1, 4), (1, 1), "SAME"),
    "an image, strided": ((2, 13, 15, 3), (3, 3, 3, 32), (2, 3), ((1, 1), (1, 1))),
    "an image, uneven padding": ((2, 12, 13, 4), (2, 4, 4, 17), (2, 2), ((1, 2), (0, 1))),
    "an image, cropping": ((2, 9, 8, 3), (3, 3, 3, 8), (1, 1), ((-1, 0), (1, -2))),
    "narrow": ((2, 6, 8, 5), (3, 3, 5, 5), (1, 1), "SAME"),
    "narrow, an odd width": ((2, 6, 7, 16), (3, 3, 16, 16), (1, 1), "SAME"),
    "narrow, one column": ((2, 18, 1, 8), (3, 3, 8, 9), (1, 1), "SAME"),
    "narrow, uneven padding": ((2, 7, 6, 5), (2, 5, 5, 8), (1, 1), ((2, 0), (0, 3))),
    "narrow, cropping": ((2, 9, 8, 5), (3, 2, 5, 9), (1, 1), ((-1, 0), (2, -1))),
    "narrow, much padding": ((2, 3, 3, 5), (2, 2, 5, 6), (1, 1), ((4, 3), (2, 5))),
    "seven by seven": ((2, 7, 7, 32), (3, 3, 32, 32), (1, 1), "SAME"),
}


def arrays(name, seed=0):
    rng = np.random.default_rng(seed)
    x_shape, kernel_shape, strides, padding = CASES[name]
    x = rng.standard_normal(x_shape).astype(np.float32)
    kernel = rng.standard_normal(kernel_shape).astype(np.float32) / 3

    def own(x, kernel):
        # Padded before: XLA of jax 0.10 reads beyond a map that is cropped and padded.
        pads = padding
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, pads)
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))
        return lax.conv_general_dilated(x, kernel, strides, "VALID", **LAYOUT)

    ours = partial(fast_conv, strides=strides, padding=padding, **LAYOUT)
    return x, kernel, ours, own


def measured(convolve, x, kernel, dy):
    """The output and both gradients."""
    y, pull = jax.vjp(convolve, x, kernel)
    return (y, *pull(dy))


@jax.enable_x64(True)
def exact(own, *given):
    """The same in double precision."""
    return jax.device_get(jax.jit(partial(measured, own))(*(np.float64(value) for value in given)))


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_as_exact_as_those_of_xla(name):
    x, kernel, ours, own = arrays(name)
    dy = np.random.default_rng(1).standard_normal(jax.eval_shape(own, x, kernel).shape)
    dy = dy.astype(np.float32)

    both = jax.jit(lambda *given: (measured(ours, *given), measured(own, *given)))
    of_ours, of_xla = jax.device_get(both(x, kernel, dy))
    of_exact = exact(own, x, kernel, dy)
    for mine, theirs, truth in zip(of_ours, of_xla, of_exact, strict=True):
        scale = np.abs(truth).max()
        # Twice XLA's error, or eight roundings of the largest value where XLA happens to have less.
        bound = max(2 * np.abs(theirs - truth).max(), 8 * 6e-8 * scale)
        assert np.abs(mine - truth).max() <= bound


def derivatives(convolve, x, kernel, dx, dkernel):
    """Of first and second order in both modes, and mapped over each argument."""
    norm = lambda x, kernel: jnp.sum(jnp.tanh(convolve(x, kernel)) ** 2)  # noqa: E731
    gradient = jax.grad(norm, argnums=(0, 1))
    # Forward over reverse, and reverse twice, from one trace of the gradient.
    slopes, along = jax.linearize(gradient, x, kernel)
    xs, kernels = jnp.stack([x, dx]), jnp.stack([kernel, dkernel])
    return (
        slopes,
        along(dx, dkernel),
        jax.linear_transpose(along, x, kernel)((dx, dkernel)),
        jax.vmap(convolve, (0, None))(xs, kernel),
        jax.vmap(convolve, (None, 0))(x, kernels),
        jax.vmap(gradient)(xs, kernels),
    )


@pytest.mark.parametrize(
    "name",
    [
        "map smaller than the kernel",
        "one pixel, uneven padding",
        "few features",
        "narrow, an odd width",
        "narrow, cropping",
        "an image, uneven padding",
        "an image, cropping",
        "seven by seven",
        "cropped and padded, all of it",
    ],
)
def test_second_derivatives_forward_mode_and_vmap(name):
    x, kernel, ours, own = arrays(name)
    dx, dkernel, *_ = arrays(name, seed=1)
    of_ours, of_own = (
        jax.device_get(jax.jit(partial(derivatives, convolve))(x, kernel, dx, dkernel))
        for convolve in (ours, own)
    )
    # Sums in another order; up to 2,000 terms and a second derivative: 1e-4 of the largest.
    for mine, theirs in zip(jax.tree.leaves(of_ours), jax.tree.leaves(of_own), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "options",
    [
        dict(feature_group_count=2, padding="SAME"),
        dict(rhs_dilation=(2, 2), padding="SAME"),
        dict(lhs_dilation=(2, 2), padding=((1, 1), (1, 1))),
    ],
)
def test_groups_and_dilations_are_xlas(options):
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 6)).astype(np.float32)
    groups = options.get("feature_group_count", 1)
    kernel = np.random.default_rng(1).standard_normal((3, 3, 6 // groups, 4)).astype(np.float32)
    # Not in one program, where the same operation would be computed once.
    ours, own = (
        jax.jit(partial(convolve, **LAYOUT, **options), static_argnums=2)(x, kernel, (1, 1))
        for convolve in (fast_conv, lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours, own)


def test_dimensions():
    """Those that are not said are NHWC, others are XLA's: the two give the same."""
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 3)).astype(np.float32)
    kernel = np.random.default_rng(1).standard_normal((3, 3, 3, 4)).astype(np.float32)
    unsaid = jax.jit(lambda: fast_conv(x, kernel, (1, 1), "SAME"))()
    dimensions = ("NCHW", "OIHW", "NCHW")
    turned = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    said = jax.jit(lambda: fast_conv(*turned, (1, 1), "SAME", dimension_numbers=dimensions))()
    # Sums of 27 products of order one, in another order.
    np.testing.assert_allclose(said.transpose(0, 2, 3, 1), unsaid, rtol=1e-5, atol=1e-5)


def test_other_types_and_empty_batches_are_xlas():
    x, kernel = np.ones((2, 2, 2, 3), jnp.bfloat16), np.ones((3, 3, 3, 4), jnp.bfloat16)
    convolve = jax.jit(lambda x: fast_conv(x, kernel, (1, 1), "SAME", **LAYOUT))
    assert convolve(x).dtype == jnp.bfloat16
    assert convolve(x[:0]).shape == (0, 2, 2, 4)
    x, kernel = np.ones((2, 2, 2, 3), np.float32), np.ones((3, 3, 3, 4), np.float32)
    asked = dict(LAYOUT, preferred_element_type=np.float64)
    convolve = partial(fast_conv, strides=(1, 1), padding="SAME", **asked)
    with jax.enable_x64(True):
        assert jax.eval_shape(convolve, x, kernel).dtype == np.float64


def test_each_form_is_taken_where_it_says():
    forms = {
        "map smaller than the kernel": module._gathered,
        "four by four": module._gathered,
        "kernel of a pixel": module._gathered,
        "few features": module._scattered,
        "one feature, uneven padding": module._scattered,
        "few features, cropping": module._scattered,
        "seven by seven": None,
    }
    for name in CASES:
        if name.startswith("narrow"):
            forms[name] = module._paired
        if name.startswith("an image"):
            forms[name] = module._shifted
    for name, form in forms.items():
        x, kernel, strides, padding = CASES[name]
        x, kernel = jnp.zeros(x), jnp.zeros(kernel)
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        x, padding = module._padded(x, kernel, tuple(padding))
        assert module._form(x, kernel, strides, padding) is form, name


def test_in_a_layer():
    x = np.ones((2, 3, 3, 4), np.float32)
    layer = nn.Conv(5, (3, 3), conv_general_dilated=fast_conv)
    plain = nn.Conv(5, (3, 3))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    ours, own = jax.jit(lambda v, x: (layer.apply(v, x), plain.apply(v, x)))(variables, x)
    np.testing.assert_allclose(ours, own, rtol=1e-5, atol=1e-6)
