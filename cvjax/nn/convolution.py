"""The convolution of the backbones, with the padding that published weights were trained with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from cvjax.errors import InputError
from cvjax.nn.depthwise import depthwise_conv
from cvjax.nn.fast_conv import fast_conv

PADDINGS = ("symmetric", "same")


def convolution(
    features: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    padding: str = "symmetric",
    use_bias: bool = False,
    kernel_init: Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """A square convolution, [b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), features].

    Args:
      features: channels of the output.
      kernel: height and width; odd.
      stride: of both axes.
      groups: parts of the channels that see only each other; with as many as `features`, which
        must then be the channels of the input, it is depthwise.
      padding: "symmetric" pads kernel // 2 on all sides, as torch does. "same" is TensorFlow's:
        with a stride it pads more on the right than on the left or on the right alone, which
        moves the map by half a pixel; weights trained with one want the same one again.
      use_bias: adds a vector; there is none where a norm follows.
      kernel_init: by default normal with variance 2 / (kernel ** 2 * features / groups), after
        K. He et al., https://arxiv.org/abs/1502.01852, equation 14.
      dtype: of the computation; parameters are float32.
      name: of the module.
    """
    if padding not in PADDINGS:
        raise InputError(f"padding is {padding!r}; it can be {', '.join(map(repr, PADDINGS))}")
    if kernel_init is None:
        kernel_init = nn.initializers.variance_scaling(2.0 * groups, "fan_out", "truncated_normal")
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2 if padding == "symmetric" else "SAME",
        feature_group_count=groups,
        conv_general_dilated=depthwise_conv if groups == features > 1 else fast_conv,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


def patchify(
    features: int,
    patch: int,
    *,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """Patches that do not overlap, each to a vector, [b, h, w, c] -> [b, h/p, w/p, features].

    Where the patches do not divide an image it is to be completed first (`pad_to_multiple`).
    """
    return nn.Conv(
        features,
        (patch, patch),
        strides=patch,
        padding="VALID",
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.truncated_normal(0.02),
        name=name,
    )


def pad_to_multiple(x: jax.Array, height: int, width: int | None = None) -> jax.Array:
    """Zeros below and to the right, [b, h, w, c], until `height` (and `width`) divide h and w."""
    padding = (-x.shape[1] % height, -x.shape[2] % (width or height))
    if not any(padding):
        return x
    return jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
