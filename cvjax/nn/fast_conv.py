"""A convolution: XLA's own, but on a CPU a faster form where there is one.

The backbones have it, by `cvjax.nn.convolution`, the heads of segmenters and detectors, and the
last layers that make images. Plain `nn.Conv` are those of Inception, patches, and the rest of GANs,
autoencoders and U-Nets.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cvjax.nn import onednn

_FEW_PIXELS = 16  # of the output, up to which patches are gathered
_FEW = 4  # features up to which products are summed, channels up to which shifted maps are
_FEW_TERMS = 36  # shifted maps times channels
_NARROW = 16  # channels and features up to which two pixels are computed at once
DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Strides = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]


def fast_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """What `lax.conv_general_dilated` gives, faster on a CPU; for `nn.Conv(conv_general_dilated=)`.

    Forms of the same sum, chosen by shape (`experiments/step_time` has the measurements):

    - An output of at most 4 x 4 pixels, or a kernel of one pixel: the patch under each pixel of the
      output is gathered and multiplied with the kernel as one matrix. XLA's own takes 75 times as
      long where the map is smaller than the kernel (2 x 2 pixels, 512 channels). oneDNN's, if it is
      in use (`cvjax.nn.onednn`), does not: then only kernels of one pixel, and those with strides.
    - At most 4 features of at least 8 channels, of a kernel of at most 3 x 3 without strides: each
      pixel is multiplied with all of the kernel as one matrix, and the products are summed where
      they belong. XLA's own takes up to five times as long.
    - At most 4 channels, as images have, and a small kernel (3 x 3, of one channel 6 x 6): the map
      shifted to each pixel of the kernel is multiplied with that pixel's vector, and all are added.
      XLA's own takes up to nine times as long. Not where oneDNN is in use, nor is the next.
    - At most 16 channels and features, without strides: two neighbours of a row of the output are
      computed as features of one pixel, by a kernel that is wider by one. XLA's own takes up to
      twice as long. (A number that is not finite then reaches a column more than the kernel does.)
    - All else is XLA's, and so is everything on other platforms, and with groups, dilations or
      another type than float32.

    It can be differentiated in both modes, as often as wanted, and mapped over each argument.
    Against double precision its root mean square error is 0.4 to 1.8 times that of XLA's own, but
    2.3 times of maps of 2 x 2 pixels and 4.2 of one: so large is that of XLA's products of matrices
    there (`experiments/step_time/roundings.py`).

    Args:
      x: [b, h, w, c].
      kernel: [height, width, c, features].
      strides, padding: as of `lax.conv_general_dilated`.
      options: the rest of what `nn.Conv` gives; dimensions are as above if it says nothing of them.
    """
    options = {"dimension_numbers": DIMENSIONS, **options}
    strides = tuple(strides)
    own = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    is_plain = (
        is_undilated_nhwc(x, kernel, options)
        and x.dtype == kernel.dtype == jnp.float32
        and options.get("feature_group_count", 1) == 1
        and prod(x.shape) > 0
    )
    if not is_plain:
        return own(x, kernel)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    if min(_output(x, kernel, strides, padding)) > 0:
        x, padding = _padded(x, kernel, padding)
        own = partial(own, padding=padding)
    form = _form(x, kernel, strides, padding)
    if form is None:
        return own(x, kernel)
    if form in (_shifted, _paired):
        on_cpu = _with_fast_gradients(form, own, strides, padding, options)
    else:  # the patches are made again where the gradient is taken, not kept from the forward pass
        on_cpu = partial(form, strides=strides, padding=padding, **options)
        on_cpu = jax.checkpoint(on_cpu, prevent_cse=False)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=own)


def _padded(x: jax.Array, kernel: jax.Array, padding: Padding) -> tuple[jax.Array, Padding]:
    """Cropped, or padded by what is more than a kernel needs, and the padding that is left.

    XLA of jax 0.10 reads beyond a map that is cropped at one side and padded at another; so is the
    gradient's map where there is more padding.
    """
    kept = tuple(
        (min(max(low, 0), side - 1), min(max(high, 0), side - 1))
        for side, (low, high) in zip(kernel.shape[:2], padding, strict=True)
    )
    if kept == padding:
        return x, padding
    beyond = [
        (low - kept_low, high - kept_high, 0)
        for (low, high), (kept_low, kept_high) in zip(padding, kept, strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *beyond, (0, 0, 0))), kept


def is_undilated_nhwc(x: jax.Array, kernel: jax.Array, options: dict[str, Any]) -> bool:
    """Whether these options of `lax.conv_general_dilated` are those of a usual layer on images."""
    if x.ndim != 4:
        return False
    wanted, asked = (
        lax.conv_dimension_numbers(x.shape, kernel.shape, dimensions)
        for dimensions in (DIMENSIONS, options["dimension_numbers"])
    )
    dilations = (options.get(name) or () for name in ("lhs_dilation", "rhs_dilation"))
    return (
        asked == wanted
        and all(step == 1 for steps in dilations for step in steps)
        and options.get("batch_group_count", 1) == 1
    )


def _form(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding
) -> Callable[..., jax.Array] | None:
    """Which form is the fastest; None for XLA's own."""
    rows, columns = _output(x, kernel, strides, padding)
    *sides, channels, features = kernel.shape
    if min(rows, columns) <= 0:
        return None
    without_strides, by_onednn = strides == (1, 1), onednn.in_use()
    is_small = rows * columns <= _FEW_PIXELS and not (by_onednn and without_strides)
    if is_small or prod(sides) == 1:
        return _gathered
    if without_strides and prod(sides) <= 9 and features <= _FEW and channels >= 2 * _FEW:
        return _scattered
    if by_onednn:
        return None
    if channels <= _FEW and channels * prod(sides) <= _FEW_TERMS:
        return _shifted
    if without_strides and prod(sides) <= 25 and max(channels, features) <= _NARROW:
        return _paired
    return None


def _gathered(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding, **options: Any
) -> jax.Array:
    kernel, padding = _without_blind(x, kernel, strides, padding)
    # As a matrix, so that the kernel's gradient is a product of matrices, too (`cvjax.nn.dense`).
    patches = jnp.concatenate(_shifts(x, kernel, strides, padding), axis=-1)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    products = _product(patches.reshape(-1, len(matrix)), matrix, options)
    return products.reshape(*patches.shape[:3], kernel.shape[-1])


def _scattered(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding, **options: Any
) -> jax.Array:
    height, width, channels, features = kernel.shape
    (top, bottom), (left, right) = padding
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    products = _product(x.reshape(-1, channels), matrix, options)
    products = products.reshape(*x.shape[:3], height, width, features)
    shifts = [
        lax.pad(
            products[:, :, :, i, j], jnp.zeros((), products.dtype),
            ((0, 0, 0), (top - i, bottom - (height - 1 - i), 0),
             (left - j, right - (width - 1 - j), 0), (0, 0, 0)),
        )
        for i in range(height)
        for j in range(width)
    ]  # fmt: skip
    return sum(shifts[1:], shifts[0])


def _shifted(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding, **options: Any
) -> jax.Array:
    dtype = options.get("preferred_element_type") or x.dtype
    shifts = _shifts(x.astype(dtype), kernel, strides, padding)
    vectors = kernel.astype(dtype).reshape(len(shifts), *kernel.shape[2:])
    terms = [
        shift[..., channel, None] * vector[channel]
        for shift, vector in zip(shifts, vectors, strict=True)
        for channel in range(x.shape[-1])
    ]
    return sum(terms[1:], terms[0])


def _paired(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding, **options: Any
) -> jax.Array:
    # The kernel twice, as features, the second time moved by a pixel, at every other pixel.
    rows, columns = _output(x, kernel, strides, padding)
    none = (0, 0, 0)
    both = [
        lax.pad(kernel, jnp.zeros((), kernel.dtype), (none, (*sides, 0), none, none))
        for sides in ((0, 1), (1, 0))
    ]
    odd = columns % 2
    y = lax.conv_general_dilated(
        x, jnp.concatenate(both, axis=-1), (1, 2),
        (padding[0], (padding[1][0], padding[1][1] + odd)), **options,
    )  # fmt: skip
    return y.reshape(len(x), rows, columns + odd, kernel.shape[-1])[:, :, :columns]


def _with_fast_gradients(
    form: Callable[..., jax.Array],
    own: Callable[..., jax.Array],
    strides: Strides,
    padding: Padding,
    options: dict[str, Any],
) -> Callable[..., jax.Array]:
    """A form whose gradients are not what JAX would make of it, but the fastest of theirs."""
    convolve = jax.custom_jvp(partial(form, strides=strides, padding=padding, **options))

    def tangent(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        """The product rule, each term such that its transpose, in reverse, is the fast one."""
        (x, kernel), (dx, dkernel) = primals, tangents
        y = convolve(x, kernel)
        turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
        sides = tuple(
            (side - 1 - low, side - 1 - high)
            for side, (low, high) in zip(kernel.shape, padding, strict=False)
        )
        of_x = _form(y, turned, strides, sides) if strides == (1, 1) else None
        if of_x is None:
            along_x = own(dx, kernel)
        else:
            of_x = partial(of_x, kernel=turned, strides=strides, padding=sides, **options)
            along_x = jax.linear_transpose(of_x, y)(dx)[0]
        is_thin = form is _paired and kernel.shape[-1] <= _NARROW // 2
        along_kernel = convolve.fun if is_thin else own
        return y, along_x + along_kernel(x, dkernel)

    convolve.defjvp(tangent)
    return convolve


def _without_blind(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding
) -> tuple[jax.Array, Padding]:
    """Without the edges of the kernel that see only padding: of 3 x 3 on a map of one pixel, 1."""
    counts = _output(x, kernel, strides, padding)
    taken, left = [], []
    for length, side, (low, high), stride, count in zip(
        x.shape[1:3], kernel.shape[:2], padding, strides, counts, strict=True
    ):
        start = min(max(0, low - (count - 1) * stride), side - 1)
        stop = max(min(side, low + length), start + 1)
        taken.append(slice(start, stop))
        left.append((low - start, high - (side - stop)))
    return kernel[tuple(taken)], tuple(left)


def _shifts(x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding) -> list[jax.Array]:
    """What each pixel of the kernel sees, [b, rows, columns, c] each."""
    rows, columns = _output(x, kernel, strides, padding)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
    return [
        x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0],
          j : j + (columns - 1) * strides[1] + 1 : strides[1]]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]  # fmt: skip


def _product(x: jax.Array, matrix: jax.Array, options: dict[str, Any]) -> jax.Array:
    wanted = {name: options.get(name) for name in ("precision", "preferred_element_type")}
    return jnp.matmul(x, matrix, **wanted)


def _output(x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding) -> tuple[int, int]:
    """Rows and columns of the output; 0 or less where the kernel does not fit."""
    return tuple(
        (length + low + high - side) // stride + 1
        for length, (low, high), side, stride in zip(
            x.shape[1:3], padding, kernel.shape[:2], strides, strict=True
        )
    )
