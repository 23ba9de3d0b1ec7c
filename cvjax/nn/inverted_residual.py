"""The block of MobileNetV2 and its descendants: expand, depthwise convolution, project.

M. Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018
(https://arxiv.org/abs/1801.04381, table 1 and figure 3).
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.convolution import convolution
from cvjax.nn.squeeze_excite import SqueezeExcite
from cvjax.nn.stochastic_depth import drop_branch


def divisible(channels: float) -> int:
    """The multiple of 8 nearest to a number of channels, but not less than 0.9 of it.

    So do all published networks of this kind with a width factor.
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """One block; the input is added where the shape stays.

    Attributes:
      features: channels of the output.
      expanded: channels in the middle; without a first convolution where the input has as many.
      kernel, stride: of the depthwise convolution.
      squeeze: channels inside squeeze-and-excitation; 0 for none.
      activation: after all but the last convolution, and in squeeze-and-excitation where that of
        `squeeze_activation` is None.
      squeeze_activation, gate: of squeeze-and-excitation.
      padding: "symmetric" or "same" (see `cvjax.nn.convolution`).
      momentum, epsilon: of the norms.
      drop_rate: of stochastic depth.
      dtype: of the computation; parameters and statistics are float32.
    """

    features: int
    expanded: int
    kernel: int
    stride: int
    squeeze: int
    activation: Callable[[jax.Array], jax.Array]
    squeeze_activation: Callable[[jax.Array], jax.Array] | None = None
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid
    padding: str = "symmetric"
    momentum: float = 0.99
    epsilon: float = 1e-3
    drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None) -> jax.Array:
        """Maps [b, h, w, c] to [b, ceil(h / stride), ceil(w / stride), features].

        `valid`, bool [b], says which rows take part in the batch statistics.
        """
        conv = partial(convolution, padding=self.padding, dtype=self.dtype)
        norm = partial(BatchNorm, self.momentum, self.epsilon, self.dtype)
        y = x
        if self.expanded != x.shape[-1]:
            y = conv(self.expanded, 1, name="expand_conv")(y)
            y = self.activation(norm(name="expand_norm")(y, train, valid))
        y = conv(
            self.expanded, self.kernel, self.stride, groups=self.expanded, name="depthwise_conv"
        )(y)
        y = self.activation(norm(name="depthwise_norm")(y, train, valid))
        if self.squeeze:
            activation = self.squeeze_activation or self.activation
            y = SqueezeExcite(self.squeeze, activation, self.gate, self.dtype, name="squeeze")(y)
        y = conv(self.features, 1, name="project_conv")(y)
        y = norm(name="project_norm")(y, train, valid)
        if self.stride > 1 or self.features != x.shape[-1]:
            return y
        return x + drop_branch(y, self.drop_rate, train)


def strides(blocks: Sequence[int]) -> dict[str, int]:
    """The stride of each stage, for a stem of stride 2 and the strides of the blocks after it.

    A stage ends where the next block strides: {"stage1": 2, "stage2": 4, ...}.
    """
    found = [2]
    for stride in blocks:
        if stride > 1:
            found.append(found[-1] * stride)
    return {f"stage{number}": stride for number, stride in enumerate(found, start=1)}


def maps(
    x: jax.Array, blocks: Sequence[InvertedResidual], train: bool, valid: jax.Array | None
) -> dict[str, jax.Array]:
    """The last map of each stage, from the stem's output."""
    stage, found = 1, {"stage1": x}
    for block in blocks:
        stage += block.stride > 1
        found[f"stage{stage}"] = x = block(x, train, valid)
    return found
