"""MobileNetV3, found by architecture search for the processors of telephones.

A. Howard et al.: Searching for MobileNetV3, ICCV 2019 (https://arxiv.org/abs/1905.02244): the
blocks are its tables 1 and 2.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices, check_fractions, check_positive
from cvjax.errors import InputError
from cvjax.nn import inverted_residual
from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.convolution import PADDINGS, convolution
from cvjax.nn.inverted_residual import InvertedResidual, divisible
from cvjax.nn.stochastic_depth import drop_rates


class Row(NamedTuple):
    """A block: a row of the paper's tables."""

    kernel: int
    expanded: int
    features: int
    squeeze: bool
    hard_swish: bool  # else relu
    stride: int


LARGE = (
    Row(3, 16, 16, False, False, 1),
    Row(3, 64, 24, False, False, 2),
    Row(3, 72, 24, False, False, 1),
    Row(5, 72, 40, True, False, 2),
    Row(5, 120, 40, True, False, 1),
    Row(5, 120, 40, True, False, 1),
    Row(3, 240, 80, False, True, 2),
    Row(3, 200, 80, False, True, 1),
    Row(3, 184, 80, False, True, 1),
    Row(3, 184, 80, False, True, 1),
    Row(3, 480, 112, True, True, 1),
    Row(3, 672, 112, True, True, 1),
    Row(5, 672, 160, True, True, 2),
    Row(5, 960, 160, True, True, 1),
    Row(5, 960, 160, True, True, 1),
)
SMALL = (
    Row(3, 16, 16, True, False, 2),
    Row(3, 72, 24, False, False, 2),
    Row(3, 88, 24, False, False, 1),
    Row(5, 96, 40, True, True, 2),
    Row(5, 240, 40, True, True, 1),
    Row(5, 240, 40, True, True, 1),
    Row(5, 120, 48, True, True, 1),
    Row(5, 144, 48, True, True, 1),
    Row(5, 288, 96, True, True, 2),
    Row(5, 576, 96, True, True, 1),
    Row(5, 576, 96, True, True, 1),
)
# Size: (blocks, channels of the layer before the last).
SIZES = {"large": (LARGE, 1280), "small": (SMALL, 1024)}
STEM = 16  # channels


class MobileNetV3(nn.Module):
    """A MobileNetV3.

    `MobileNetV3("small")` is that of the paper; `MobileNetV3("small", width=0.25)` a smaller one.
    A stage ends where the map is halved: "stage1" has stride 2, "stage5" stride 32.

    Attributes:
      size: "large" or "small".
      num_classes: length of the logits.
      width: factor of all numbers of channels, which stay multiples of 8; the paper has also 0.75.
        As in the authors' code a block expands what comes in by the ratio that it has at width 1,
        and the layer before the last never becomes narrower (torchvision scales both).
      stem: channels of the first convolution, if not 16 times `width`: timm's narrow ones keep 16.
      blocks: rows in place of those of `size`.
      padding: "symmetric" as in torchvision, or "same" for weights trained with TensorFlow.
      epsilon: of the norms; timm's own weights (without tf_) have 1e-5.
      momentum: of the running statistics: of the paper; a run of some hundred steps wants 0.9, else
        it ends with those that it began with.
      stochastic_depth: the chance that the last block is left out for an example, in training.
      dropout: before the head; the paper has 0.2.
      dtype: of the computation; parameters, statistics and logits are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    size: str = "large"
    num_classes: int = 1000
    width: float = 1.0
    stem: int | None = None
    blocks: tuple[Row, ...] | None = None
    padding: str = "symmetric"
    epsilon: float = 1e-3
    momentum: float = 0.99
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_choices(self, size=SIZES, padding=PADDINGS)
        check_at_least(self, num_classes=1, stem=1, epsilon=0)
        check_fractions(self, "stochastic_depth", "dropout", "momentum")
        check_positive(**{"MobileNetV3: width": self.width})
        if self.blocks is not None and not self.blocks:
            raise InputError("MobileNetV3: blocks is empty; it must name at least one")
        super().__post_init__()

    @property
    def rows(self) -> tuple[Row, ...]:
        """The blocks, before the width factor."""
        return tuple(Row(*row) for row in self.blocks or SIZES[self.size][0])

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map; a map has size ceil(size of image / stride)."""
        return inverted_residual.strides([row.stride for row in self.rows])

    def setup(self):
        """Names the layers; the blocks are `block_0`, `block_1`, ... through all stages."""
        rows = self.rows
        conv = partial(convolution, padding=self.padding, dtype=self.dtype)
        norm = partial(BatchNorm, self.momentum, self.epsilon, self.dtype)
        stem = self.stem or divisible(STEM * self.width)
        self.stem_conv, self.stem_norm = conv(stem, 3, 2), norm()
        make_block = (
            nn.remat(InvertedResidual, static_argnums=(2,)) if self.remat else InvertedResidual
        )
        rates = drop_rates(self.stochastic_depth, len(rows))
        before = [STEM, *(row.features for row in rows)]  # channels that come in, at width 1
        entering = [stem, *(divisible(row.features * self.width) for row in rows)]
        expanded = [
            divisible(now * row.expanded / channels)
            for now, channels, row in zip(entering, before, rows, strict=False)
        ]
        self.block = [
            make_block(
                features=divisible(row.features * self.width),
                expanded=inner,
                kernel=row.kernel,
                stride=row.stride,
                squeeze=row.squeeze and divisible(inner // 4),
                activation=nn.hard_swish if row.hard_swish else nn.relu,
                squeeze_activation=nn.relu,
                gate=nn.hard_sigmoid,
                padding=self.padding,
                momentum=self.momentum,
                epsilon=self.epsilon,
                drop_rate=rate,
                dtype=self.dtype,
            )
            for row, inner, rate in zip(rows, expanded, rates, strict=True)
        ]
        self.head_conv = conv(6 * divisible(rows[-1].features * self.width), 1)
        self.head_norm = norm()
        self.head_hidden = nn.Dense(divisible(SIZES[self.size][1] * max(1, self.width)))
        self.head_dropout = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes)

    def features(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the last map of each stage, {"stage1": [b, h / stride, w / stride, c], ...}.

        Args:
          x: images [b, h, w, c], normalized.
          train: normalize by this batch's statistics, and update their running average.
          valid: bool [b]: the statistics are those of these rows alone. At least one must be
            True, else they are NaN.
        """
        x = self.stem_conv(x.astype(self.dtype))
        x = nn.hard_swish(self.stem_norm(x, train, valid))
        return inverted_residual.maps(x, self.block, train, valid)

    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        *_, x = self.features(x, train=train, valid=valid).values()
        x = self.head_norm(self.head_conv(x), train, valid)
        x = jnp.mean(nn.hard_swish(x), axis=(1, 2), dtype=jnp.float32)
        x = nn.hard_swish(self.head_hidden(x))
        return self.head(self.head_dropout(x, deterministic=not train))
