"""How much an image is like the one that it should be."""

import dm_pix
import jax
import jax.numpy as jnp

from cvjax.checks import check_unit
from cvjax.errors import InputError


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """-10 log10 of the mean squared error of each pair [b, h, w, c] in [0, 1]; dB, [b].

    An error below 1e-10 counts as that, so that equal images have 100 dB. Raises InputError for
    images that are no floats or, outside of jit, not in [0, 1], and for two shapes.
    """
    a, b = _pair(a, b)
    # Bounded before the logarithm, whose slope at 0 would be NaN.
    return -10 * jnp.log10(jnp.maximum(dm_pix.mse(a, b), 1e-10))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of each pair [b, h, w, c] in [0, 1], mean over channels; [b], up to 1.

    Z. Wang et al., IEEE Transactions on Image Processing 13(4), 2004; windows of 11 x 11 pixels,
    or as large as a smaller image allows. The variances are sums of differences: what lies outside
    by rounding is put to the bound. Raises InputError as `psnr` does.
    """
    a, b = _pair(a, b)
    size = min(11, *a.shape[1:3])
    return jnp.minimum(dm_pix.ssim(a, b, filter_size=size), 1.0)


def _pair(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as float32: of a half an error of 1e-10 is none."""
    check_unit(a)
    check_unit(b)
    if a.shape != b.shape:
        raise InputError(f"images are {list(a.shape)} and {list(b.shape)}; they must be alike")
    return a.astype(jnp.float32), b.astype(jnp.float32)
