"""Maps enlarged by bilinear interpolation."""

from functools import partial

import jax
import jax.numpy as jnp


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear interpolation of [b, h, w, c] to [b, height, width, c], float32 inside.

    Pixels have half-integer centres, and beyond the border the image goes on as its edge; as in
    torch with align_corners=False. Without antialiasing.

    An axis that becomes a whole number of times as long is a sum of shifted maps, where
    `jax.image.resize` multiplies with a matrix: it takes a CPU up to five times as long
    (`experiments/step_time`).
    """
    dtype, x = x.dtype, x.astype(jnp.float32)
    for axis, size in ((2, width), (1, height)):
        factor, rest = divmod(size, x.shape[axis])
        if rest or factor == 0:
            shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
            x = jax.image.resize(x, shape, "bilinear", antialias=False)
        elif factor > 1:
            x = _repeat(x, factor, axis)
    return x.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _repeat(x: jax.Array, factor: int, axis: int) -> jax.Array:
    """Each pixel becomes `factor` pixels, each between its own value and that of a neighbour."""
    cut = partial(jax.lax.slice_in_dim, axis=axis)
    before = jnp.concatenate([cut(x, 0, 1), cut(x, 0, -1)], axis)
    after = jnp.concatenate([cut(x, 1, None), cut(x, -1, None)], axis)
    pixels = [
        (1 - abs(shift)) * x + abs(shift) * (before if shift < 0 else after)
        for shift in _shifts(factor)
    ]
    shape = (*x.shape[:axis], factor * x.shape[axis], *x.shape[axis + 1 :])
    return jnp.stack(pixels, axis + 1).reshape(shape)


@_repeat.defjvp
def _tangent(
    factor: int, axis: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """As the transpose of the gradient, so that in reverse it is the form written below."""
    y = _repeat(*primals, factor, axis)
    gradient = partial(_gradient, factor=factor, axis=axis)
    return y, jax.linear_transpose(gradient, y)(*tangents)[0]


def _gradient(dy: jax.Array, *, factor: int, axis: int) -> jax.Array:
    shape = (*dy.shape[:axis], dy.shape[axis] // factor, factor, *dy.shape[axis + 1 :])
    pixels = jnp.moveaxis(dy.reshape(shape), axis + 1, 0)
    shifts = _shifts(factor)
    to_before = sum(-s * dy for s, dy in zip(shifts, pixels, strict=True) if s < 0)
    to_after = sum(s * dy for s, dy in zip(shifts, pixels, strict=True) if s > 0)
    own = sum((1 - abs(s)) * dy for s, dy in zip(shifts, pixels, strict=True))
    # What the first pixel has for the one before it, and the last for the one after, is its own.
    cut = partial(jax.lax.slice_in_dim, axis=axis)
    from_after = jnp.concatenate([cut(to_before, 1, None), cut(to_after, -1, None)], axis)
    from_before = jnp.concatenate([cut(to_before, 0, 1), cut(to_after, 0, -1)], axis)
    return own + from_after + from_before


def _shifts(factor: int) -> list[float]:
    """How far the centre of each new pixel is from that of the old one, in old pixels."""
    return [(number + 0.5) / factor - 0.5 for number in range(factor)]
