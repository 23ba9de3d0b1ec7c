"""Convolutions on a CPU by oneDNN (https://github.com/uxlfoundation/oneDNN), PyTorch's library.

The jaxlib of Linux on x86-64 carries it, with an operation for a convolution, but XLA's compiler
was built without the pass that would put it into programs. Here the operation is written where a
program is made from `lax.conv_general_dilated`; gradients are convolutions, too, so that they, and
`vmap`, are as JAX has them. `experiments/step_time` has what it is worth.
"""

import json
import platform
import sys
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import mlir

from cvjax.errors import InputError

# The operation is XLA's own affair and may change: only in these was it tried.
VERSIONS = ("0.10.", "0.12.")
_FEW_FEATURES = 4  # of the output; for fewer XLA's own takes half of the time
_MANY_CHANNELS = 8  # of what a kernel was for; for fewer its gradient takes a third longer

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

    Those of images in float32, in both modes of differentiation, in programs for one device or, by
    `shard_map`, for one each; all others stay XLA's: groups, gradients of strided ones for their
    input, fewer than four features, other types, programs that XLA divides between devices. Results
    differ from XLA's by roundings.

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
        if not _is_for_onednn(context, **options):
            return own(context, x, kernel, **options)
        convolve = partial(_convolve, shape=context.avals_out[0].shape, **options)
        return mlir.lower_fun(convolve, multiple_results=False)(context, x, kernel)

    mlir.register_lowering(conv_general_dilated_p, lower, platform="cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    _in_use = True
    compilation_cache.reset_cache()  # it asks once, with its first program


def _is_for_onednn(
    context: mlir.LoweringRuleContext,
    *,
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    **_: Any,
) -> bool:
    (x, kernel), (out,) = context.avals_in, context.avals_out
    devices = context.module_context.axis_context
    if isinstance(devices, mlir.SPMDAxisContext):
        is_one_device = devices.manual_axes == frozenset(devices.mesh.axis_names)
    else:
        is_one_device = getattr(devices, "num_devices", None) == 1
    return (
        is_one_device
        and x.ndim == 4
        and x.dtype == kernel.dtype == out.dtype == jnp.float32
        and min(x.size, kernel.size, out.size) > 0
        and feature_group_count == batch_group_count == 1
        and set(lhs_dilation) == {1}
        and min(pad for pads in padding for pad in pads) >= 0
        and out.shape[dimension_numbers.out_spec[1]] >= _FEW_FEATURES
    )


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    shape: tuple[int, ...],
    window_strides: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
    rhs_dilation: tuple[int, int],
    dimension_numbers: Any,
    **_: Any,
) -> jax.Array:
    # Layouts are (batch, feature, height, width), of a kernel (output, input, height, width). For
    # images with another last axis than the features oneDNN is 500 times slower.
    (batch, feature, *space), (of_out, of_in, *of_kernel) = dimension_numbers[:2]
    out_batch, out_feature, *out_space = dimension_numbers.out_spec
    window = [*zip(of_kernel, padding, window_strides, rhs_dilation, strict=True)]
    axes, out_axes = (batch, *space, feature), (out_batch, *out_space, out_feature)
    images = x.transpose(axes)
    if batch > feature and x.shape[batch] >= _MANY_CHANNELS:
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
        "feature_groups": 1,
    }
    out = [shape[axis] for axis in out_axes]
    call = jax.ffi.ffi_call(
        "__onednn$convolution",
        jax.ShapeDtypeStruct(out if images.ndim == 4 else [1, *out], x.dtype),
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"onednn_conv_config": convolution}),
    )
    return call(images, kernel).reshape(out).transpose(np.argsort(out_axes))
