"""A convolution: XLA's own, but on a CPU a faster form where there is one.

The backbones have it, by `cvjax.nn.convolution`, the heads of segmenters and detectors, and the
last layers that make images. Plain `nn.Conv` are those of ResNet-9, Inception, patches, and the
rest of GANs, autoencoders and U-Nets.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cvjax.nn import onednn

_FEW_PIXELS = 16  # of the output, up to which patches are gathered
_FEW_FEATURES = 4  # up to which products are summed
DIMENSIONS = ("NHWC", "HWIO", "NHWC")

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
    - All else is XLA's, and so is everything on other platforms, and with groups, dilations or
      another type than float32.

    It can be differentiated in both modes, as often as wanted, and mapped over each argument.

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
    of_product = {name: options.get(name) for name in ("precision", "preferred_element_type")}
    if _is_gathered(x, kernel, strides, padding):
        on_cpu = partial(_gathered, strides=strides, padding=padding, **of_product)
    elif _is_scattered(x, kernel, strides, padding):
        on_cpu = partial(_scattered, padding=padding, **of_product)
    else:
        return own(x, kernel)

    # The patches are made again where the gradient is taken, not kept from the forward pass.
    @partial(jax.checkpoint, prevent_cse=False)
    def either(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.platform_dependent(x, kernel, cpu=on_cpu, default=own)

    return either(x, kernel)


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


def _gathered(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    **of_product: Any,
) -> jax.Array:
    rows, columns = _output(x, kernel, strides, padding)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
    shifts = [
        x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0],
          j : j + (columns - 1) * strides[1] + 1 : strides[1]]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]  # fmt: skip
    # As a matrix, so that the kernel's gradient is a product of matrices, too (`cvjax.nn.dense`).
    matrix = kernel.reshape(-1, kernel.shape[-1])
    patches = jnp.concatenate(shifts, axis=-1).reshape(-1, len(matrix))
    products = jnp.matmul(patches, matrix, **of_product)
    return products.reshape(len(x), rows, columns, kernel.shape[-1])


def _scattered(x: jax.Array, kernel: jax.Array, padding: Padding, **of_product: Any) -> jax.Array:
    height, width, channels, features = kernel.shape
    (top, bottom), (left, right) = padding
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    products = jnp.matmul(x.reshape(-1, channels), matrix, **of_product)
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


def _output(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[int, int]:
    """Rows and columns of the output; 0 or less where the kernel does not fit."""
    return tuple(
        (length + low + high - side) // stride + 1
        for length, (low, high), side, stride in zip(
            x.shape[1:3], padding, kernel.shape[:2], strides, strict=True
        )
    )


def _is_gathered(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> bool:
    rows, columns = _output(x, kernel, strides, padding)
    is_small = rows * columns <= _FEW_PIXELS and not (onednn.in_use() and strides == (1, 1))
    return rows > 0 and columns > 0 and (is_small or prod(kernel.shape[:2]) == 1)


def _is_scattered(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> bool:
    rows, columns = _output(x, kernel, strides, padding)
    height, width, channels, features = kernel.shape
    is_thin = features <= _FEW_FEATURES and channels >= 2 * _FEW_FEATURES
    return min(rows, columns) > 0 and strides == (1, 1) and height * width <= 9 and is_thin
