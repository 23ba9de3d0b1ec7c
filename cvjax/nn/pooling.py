"""Max pooling: XLA's own, but on a CPU with a gradient that is ten times faster."""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]


def max_pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: Sequence
) -> jax.Array:
    """The largest value in each window, as `flax.linen.max_pool`, its gradient too.

    That gradient goes to the first of equal values, in the order of rows. XLA's CPU backend looks
    for it pixel by pixel; here it is the shifted map, compared with the result, which fuses into
    few loops (8 x 64 x 64 x 64, 3 x 3 by 2, two cores: 3 ms instead of 30). It can be
    differentiated in both modes, as often as wanted.

    Args:
      x: floating [b, h, w, c].
      window, strides: rows and columns.
      padding: ((above, below), (left, right)), of minus infinity.
    """
    padding = tuple((int(low), int(high)) for low, high in padding)
    return _pool(x, tuple(window), tuple(strides), padding)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> jax.Array:
    def of_shifts(x: jax.Array) -> jax.Array:
        return reduce(jnp.maximum, _shifts(x, window, strides, padding, -jnp.inf))

    return lax.platform_dependent(x, cpu=of_shifts, default=_own(window, strides, padding))


@_pool.defjvp
def _tangent(
    window: tuple[int, int], strides: tuple[int, int], padding: Padding, primals: tuple,
    tangents: tuple,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    (x,), (dx,) = primals, tangents
    y = _pool(x, window, strides, padding)

    def chosen(x: jax.Array, y: jax.Array, dx: jax.Array) -> jax.Array:
        total, is_found = jnp.zeros_like(y), jnp.zeros(y.shape, bool)
        values = _shifts(x, window, strides, padding, -jnp.inf)
        for value, step in zip(values, _shifts(dx, window, strides, padding, 0), strict=True):
            is_largest = (value == y) & ~is_found
            total, is_found = total + jnp.where(is_largest, step, 0), is_found | is_largest
        return total

    def own(x: jax.Array, y: jax.Array, dx: jax.Array) -> jax.Array:
        return jax.jvp(_own(window, strides, padding), (x,), (dx,))[1]

    # What is compared is found again where the gradient is taken, not kept from the forward pass.
    chosen = jax.checkpoint(chosen, prevent_cse=False)
    return y, lax.platform_dependent(x, y, dx, cpu=chosen, default=own)


def _own(window: tuple[int, int], strides: tuple[int, int], padding: Padding) -> Callable:
    return partial(nn.max_pool, window_shape=window, strides=strides, padding=padding)


def _shifts(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: Padding, value: float
) -> list[jax.Array]:
    """What each pixel of the window sees, a list of [b, rows, columns, c], row by row."""
    x = lax.pad(x, jnp.array(value, x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
    rows, columns = (
        (length - side) // stride * stride + 1
        for length, side, stride in zip(x.shape[1:3], window, strides, strict=True)
    )
    return [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
