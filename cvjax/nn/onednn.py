"""Convolutions on a CPU by oneDNN (https://github.com/uxlfoundation/oneDNN), PyTorch's library.

The jaxlib of Linux on x86-64 carries it, with an operation for a convolution, but XLA's compiler
was built without the pass that would put it into programs. Here the operation is written where a
program is made from `lax.conv_general_dilated`; gradients are convolutions, too, so that they, and
`vmap`, are as JAX has them. `experiments/step_time` has what it is worth.
"""

import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import mlir

from cvjax.errors import InputError

# The operation is XLA's own affair and may change: only in these was it tried.
VERSIONS = ("0.10.", "0.12.")
_FEW_FEATURES = 4  # of the output; for fewer XLA's own takes half of the time
_UNROLLED = 32  # images of the gradient of a depthwise kernel; more of them take turns in a loop
_MANY_SPREAD = 128  # channels of a spread map; with fewer XLA's own is as fast in a training step
_AT_ONCE = 16  # images of the gradient of a kernel whose maps have together more numbers than
_MANY_NUMBERS = 2**20
_MANY_CHANNELS = 8  # of what a kernel was for; for fewer its gradient takes a third longer

_NHWC = "NHWC", "HWIO", "NHWC"

Padding = tuple[tuple[int, int], tuple[int, int]]

_in_use = False


def in_use() -> bool:
    """Whether it was asked for, and programs are for one device, so that oneDNN can have a part."""
    return _in_use and jax.device_count() == 1


def why_not() -> str | None:
    """Why oneDNN cannot be had here, in one line; None if it can."""
    found = version("jaxlib")
    if (sys.platform, platform.machine()) == ("linux", "x86_64") and found.startswith(VERSIONS):
        return None
    return (
        f"oneDNN is in jaxlib {' and '.join(f'{one}x' for one in VERSIONS)} for Linux on x86_64; "
        f"this is jaxlib {found} on {sys.platform}, {platform.machine()}"
    )


def use_onednn() -> None:
    """From now on this process gives convolutions on a CPU to oneDNN; to be called before all else.

    Those of images in float32, with one group or depthwise, in both modes of differentiation, in
    programs for one device or, by `shard_map`, for one each; all others stay XLA's: other groups,
    gradients for the input of those with strides and fewer than 128 features, fewer than four
    features, other types, programs that XLA divides between devices.

    Results differ from XLA's by roundings. Its sums are those of PyTorch, one number after another:
    over 64 channels and 3 x 3 pixels the error against double precision is 1.4 times XLA's, over
    256 channels 2.6 times, of the input's gradient over 512 channels 3.6 times (root mean square;
    `experiments/step_time/roundings.py`).

    XLA cannot keep such programs: JAX's compilation cache is turned off, and each start compiles.

    Raises:
      InputError: where jaxlib has no oneDNN, or is of a version that was not tried.
    """
    global _in_use
    if reason := why_not():
        raise InputError(reason)
    # Private, so not above: another version may have another one.
    from jax._src.lax.convolution import _conv_general_dilated_lower

    own = partial(_conv_general_dilated_lower, expand_complex_convolutions=True)

    def lower(context: mlir.LoweringRuleContext, x: Any, kernel: Any, **options: Any) -> Any:
        form = _form(context, **options)
        if form is None:
            return own(context, x, kernel, **options)
        form = partial(form, shape=context.avals_out[0].shape, **options)
        return mlir.lower_fun(form, multiple_results=False)(context, x, kernel)

    mlir.register_lowering(conv_general_dilated_p, lower, platform="cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    _in_use = True
    compilation_cache.reset_cache()  # it asks once, with its first program


def _form(
    context: mlir.LoweringRuleContext,
    *,
    window_strides: tuple[int, ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    **_: Any,
) -> Callable[..., jax.Array] | None:
    """How a convolution is given to oneDNN; None for those that stay XLA's."""
    (x, kernel), (out,) = context.avals_in, context.avals_out
    devices = context.module_context.axis_context
    if isinstance(devices, mlir.SPMDAxisContext):
        is_one_device = devices.manual_axes == frozenset(devices.mesh.axis_names)
    else:
        is_one_device = getattr(devices, "num_devices", None) == 1
    are_images = is_one_device and x.ndim == 4 and min(x.size, kernel.size, out.size) > 0
    if not are_images or not x.dtype == kernel.dtype == out.dtype == jnp.float32:
        return None
    of_out, of_in, *_ = dimension_numbers.rhs_spec
    features = kernel.shape[of_out]
    if batch_group_count > 1:
        of_batch = x.shape[dimension_numbers.lhs_spec[0]] // batch_group_count
        is_for_each = min(of_batch, features // batch_group_count) == 1
        return _of_each_kernel if is_for_each else None
    is_depthwise = feature_group_count > 1 and kernel.shape[of_in] == 1
    if is_depthwise:
        return _convolve
    if feature_group_count > 1 or features < _FEW_FEATURES:
        return None
    if {*lhs_dilation} == {1}:
        of_batch, of_feature, *_ = dimension_numbers.lhs_spec
        is_of_kernel = of_batch > of_feature and x.shape[of_batch] >= 2 * _MANY_CHANNELS
        is_large = is_of_kernel and kernel.size > _MANY_NUMBERS
        return _of_each_part if is_large and x.shape[of_feature] > _AT_ONCE else _convolve
    is_plain = {*window_strides, *rhs_dilation} == {1}
    return _of_each_place if is_plain and kernel.shape[of_in] >= _MANY_SPREAD else None


def _of_each_kernel(
    x: jax.Array,
    kernel: jax.Array,
    *,
    shape: tuple[int, ...],
    window_strides: tuple[int, int],
    padding: Padding,
    lhs_dilation: tuple[int, int],
    rhs_dilation: tuple[int, int],
    dimension_numbers: Any,
    batch_group_count: int,
    **_: Any,
) -> jax.Array:
    """So JAX lays out the gradient of a depthwise kernel: the channels are the batch, in groups.

    Each channel of each image is convolved by itself, with a kernel as large as a map, and the
    images are summed. One image after another, as all at once would have to stand side by side.
    """
    (batch, feature, *space), (of_out, of_in, *of_kernel), out_spec = dimension_numbers
    x, kernel = x.transpose(feature, *space, batch), kernel.transpose(of_in, *of_kernel, of_out)
    features = kernel.shape[-1]

    def add(total: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        image, kernel = given  # [h, w, channels] and [height, width, features]
        image = jnp.moveaxis(image.reshape(*image.shape[:2], batch_group_count, -1), -1, 0)
        y = lax.conv_general_dilated(
            jnp.repeat(image, features // batch_group_count, axis=-1), kernel[:, :, None],
            window_strides, padding, lhs_dilation, rhs_dilation, _NHWC,
            feature_group_count=features,
        )  # fmt: skip
        return total + y, None

    to_nhwc, from_nhwc = [out_spec[axis] for axis in (0, 2, 3, 1)], _from_nhwc(out_spec)
    zeros = jnp.zeros([shape[axis] for axis in to_nhwc], x.dtype)
    total, _ = lax.scan(add, zeros, (x, kernel), unroll=min(len(x), _UNROLLED))
    return total.transpose(from_nhwc)


def _of_each_part(
    x: jax.Array,
    kernel: jax.Array,
    *,
    shape: tuple[int, ...],
    dimension_numbers: Any,
    **options: Any,
) -> jax.Array:
    """The gradient of a kernel, as JAX lays it out, of some images after others.

    The maps of all would not stay in the processor's own memory, and are wanted several times.
    """
    axes = dimension_numbers.lhs_spec[1], dimension_numbers.rhs_spec[1]
    of_part = partial(_convolve, shape=shape, dimension_numbers=dimension_numbers, **options)
    images = x.shape[axes[0]]
    whole = images - images % _AT_ONCE

    def parts(array: jax.Array, axis: int) -> jax.Array:
        array = lax.slice_in_dim(array, 0, whole, axis=axis)
        sides = array.shape[:axis], array.shape[axis + 1 :]
        return jnp.moveaxis(array.reshape(*sides[0], -1, _AT_ONCE, *sides[1]), axis, 0)

    def add(total: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + of_part(*given), None

    given = tuple(map(parts, (x, kernel), axes))
    total, _ = lax.scan(add, jnp.zeros(shape, x.dtype), given)
    if whole < images:
        rest = (
            lax.slice_in_dim(array, whole, images, axis=axis)
            for array, axis in zip((x, kernel), axes, strict=True)
        )
        total += of_part(*rest)
    return total


def _of_each_place(
    x: jax.Array,
    kernel: jax.Array,
    *,
    shape: tuple[int, ...],
    padding: Padding,
    lhs_dilation: tuple[int, int],
    dimension_numbers: Any,
    **_: Any,
) -> jax.Array:
    """So JAX lays out the gradient of a strided convolution for its input: with zeros in between.

    Each place of the stride sees a part of the kernel alone, and the map without the zeros.
    """
    (batch, feature, *space), (of_out, of_in, *of_kernel), out_spec = dimension_numbers
    x, kernel = x.transpose(batch, *space, feature), kernel.transpose(*of_kernel, of_in, of_out)
    images, rows, columns, features = (shape[out_spec[axis]] for axis in (0, 2, 3, 1))
    height, width = lhs_dilation
    most = -(-rows // height), -(-columns // width)  # pixels of a place

    def seen(axis: int, place: int) -> tuple[slice, tuple[int, int]]:
        """The part of the kernel, and the padding."""
        length, step, low = kernel.shape[axis], lhs_dilation[axis], padding[axis][0]
        first = (low - place) % step
        before = (low - place - first) // step
        after = most[axis] - 1 + len(range(first, length, step)) - before - x.shape[1 + axis]
        return slice(first, length, step), (before, after)

    def of_place(row: int, column: int) -> jax.Array:
        parts, padding = zip(seen(0, row), seen(1, column), strict=True)
        part = kernel[parts]
        if part.size == 0:
            return jnp.zeros((images, *most, features), x.dtype)
        return lax.conv_general_dilated(x, part, (1, 1), padding, dimension_numbers=_NHWC)

    each = [jnp.stack([of_place(row, one) for one in range(width)], 3) for row in range(height)]
    y = jnp.stack(each, 2).reshape(images, most[0] * height, most[1] * width, features)
    return y[:, :rows, :columns].transpose(_from_nhwc(out_spec))


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    shape: tuple[int, ...],
    window_strides: tuple[int, int],
    padding: Padding,
    lhs_dilation: tuple[int, int],
    rhs_dilation: tuple[int, int],
    dimension_numbers: Any,
    feature_group_count: int,
    **_: Any,
) -> jax.Array:
    # Layouts are (batch, feature, height, width), of a kernel (output, input, height, width). For
    # images with another last axis than the features oneDNN is 500 times slower.
    (batch, feature, *space), (of_out, of_in, *of_kernel) = dimension_numbers[:2]
    out_batch, out_feature, *out_space = dimension_numbers.out_spec
    if {*lhs_dilation} != {1} or min(map(min, padding)) < 0:  # oneDNN neither spreads nor crops
        spread = [(0, 0, 0)] * 4
        for axis, pads, step in zip(space, padding, lhs_dilation, strict=True):
            spread[axis] = (*pads, step - 1)
        x, padding = lax.pad(x, jnp.float32(0), spread), ((0, 0), (0, 0))
    if feature_group_count > 1:  # a depthwise one may have several features for a channel
        x = jnp.repeat(x, kernel.shape[of_out] // feature_group_count, axis=feature)
        feature_group_count = kernel.shape[of_out]
    window = [*zip(of_kernel, padding, window_strides, rhs_dilation, strict=True)]
    axes, out_axes = (batch, *space, feature), (out_batch, *out_space, out_feature)
    images = x.transpose(axes)
    if feature_group_count == 1 and batch > feature and x.shape[batch] >= _MANY_CHANNELS:
        # So JAX lays out the gradient of a kernel: few pixels, each a sum over many. With what is
        # the batch here (the channels that the kernel was for) as a third axis of space it takes
        # half of the time.
        axes, out_axes = (*space, batch, feature), (*out_space, out_batch, out_feature)
        images, kernel = x.transpose(axes)[None], kernel[..., None]
        window.append((4, (0, 0), 1, 1))
    of_kernel, padding, strides, dilations = zip(*window, strict=True)
    spatial = range(1, images.ndim - 1)
    layout = {"batch_dim": 0, "feature_dim": images.ndim - 1, "spatial_dims": [*spatial]}
    convolution = {
        "dims": images.ndim,
        "input": {"data": layout},
        "kernel": {
            "filter": {
                "output_feature_dim": of_out,
                "input_feature_dim": of_in,
                "spatial_dims": of_kernel,
            }
        },
        "output": {"data": layout},
        "window": {
            "pad_left": [low for low, _ in padding],
            "pad_right": [high for _, high in padding],
            "strides": strides,
            "window_dilations": dilations,
        },
        "feature_groups": feature_group_count,
    }
    out = [shape[axis] for axis in out_axes]
    call = jax.ffi.ffi_call(
        "__onednn$convolution",
        jax.ShapeDtypeStruct(out if images.ndim == 4 else [1, *out], x.dtype),
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"onednn_conv_config": convolution}),
    )
    return call(images, kernel).reshape(out).transpose(np.argsort(out_axes))


def _from_nhwc(spec: tuple[int, int, int, int]) -> list[int]:
    """The transposition of [b, h, w, c] to a layout of (batch, feature, height, width)."""
    return [(0, 3, 1, 2)[spec.index(axis)] for axis in range(4)]
