"""Residual networks for classification, and as backbones.

K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition, CVPR 2016
(https://arxiv.org/abs/1512.03385): the sizes are their table 1, the stem for small images their
section 4.2. This is version 1.5, as in torchvision: a bottleneck strides in its 3x3 convolution,
not in its first 1x1. The last norm of each block starts with scale zero, so that a block begins
as the identity (P. Goyal et al.: Accurate, Large Minibatch SGD, https://arxiv.org/abs/1706.02677).

Relatives are a matter of fields: ResNeXt (S. Xie et al., https://arxiv.org/abs/1611.05431) has
groups, a wide ResNet (S. Zagoruyko, N. Komodakis, https://arxiv.org/abs/1605.07146) more channels
in the 3x3 convolutions of its bottlenecks, and the variant D (T. He et al.: Bag of Tricks,
https://arxiv.org/abs/1812.01187, figure 2) a stem of three 3x3 convolutions and shortcuts that
average before they stride:

    ResNet(50, groups=32, base_width=4)     ResNeXt-50 32x4d
    ResNet(101, groups=32, base_width=8)    ResNeXt-101 32x8d
    ResNet(50, base_width=128)              Wide ResNet-50-2
    ResNet(50, variant="d")                 ResNet-50-D
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices, check_fractions
from cvjax.errors import InputError
from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.convolution import convolution
from cvjax.nn.pooling import max_pool
from cvjax.nn.stochastic_depth import drop_branch, drop_rates

# depth: (kind of block, number of blocks in each stage), table 1 of the paper.
SIZES = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
STEM_STRIDES = {"imagenet": 4, "cifar": 1}
EXPANSION = 4  # of the channels, at the end of a bottleneck


class Block(nn.Module):
    """One residual block: relu(shortcut(x) + residual(x)).

    Attributes:
      features: channels of the 3x3 convolution; a bottleneck returns `EXPANSION` times as many.
      stride: of the whole block.
      bottleneck: 1x1, 3x3, 1x1 convolutions instead of 3x3, 3x3.
      groups, base_width: the 3x3 convolution of a bottleneck has `groups` groups, together
        features * base_width / 64 * groups channels.
      average_shortcut: a shortcut that strides takes the mean of 2x2 pixels (variant D).
      drop_rate: of stochastic depth.
      epsilon: of the norms.
      dtype: of the computation; parameters and statistics are float32.
    """

    features: int
    stride: int
    bottleneck: bool
    groups: int = 1
    base_width: int = 64
    average_shortcut: bool = False
    drop_rate: float = 0.0
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None) -> jax.Array:
        """Maps [b, h, w, c] to [b, ceil(h / stride), ceil(w / stride), channels].

        `valid`, bool [b], says which rows take part in the batch statistics.
        """
        if self.bottleneck:
            channels = EXPANSION * self.features
            inner = self.features * self.base_width // 64 * self.groups
            convolutions = (inner, 1, 1), (inner, 3, self.stride), (channels, 1, 1)
        else:
            channels = self.features
            convolutions = (channels, 3, self.stride), (channels, 3, 1)
        norm = partial(BatchNorm, epsilon=self.epsilon, dtype=self.dtype)

        y = x
        for number, (features, kernel, stride) in enumerate(convolutions, start=1):
            is_last = number == len(convolutions)
            scale_init = nn.initializers.zeros if is_last else nn.initializers.ones
            groups = self.groups if kernel == 3 else 1
            y = convolution(
                features, kernel, stride, groups=groups, dtype=self.dtype, name=f"conv{number}"
            )(y)
            y = norm(scale_init=scale_init, name=f"norm{number}")(y, train, valid)
            y = y if is_last else nn.relu(y)
        if self.stride > 1 or x.shape[-1] != channels:
            stride = self.stride
            if self.average_shortcut and stride > 1:
                x, stride = _halve(x), 1
            x = convolution(channels, 1, stride, dtype=self.dtype, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x, train, valid)
        return nn.relu(x + drop_branch(y, self.drop_rate, train))


def _halve(x: jax.Array) -> jax.Array:
    """The means of 2x2 pixels; at an odd border, of those that are there."""
    padding = tuple((0, length % 2) for length in x.shape[1:3])
    return nn.avg_pool(x, (2, 2), strides=(2, 2), padding=padding, count_include_pad=False)


class ResNet(nn.Module):
    """A residual network.

    `ResNet(50)` is that of the paper; `ResNet(stem="cifar", width=16, stage_sizes=(1, 1, 1))` is
    one for digits. Only what is used has parameters: initialized through `features` it has no
    head.

    Attributes:
      depth: 18, 34, 50, 101 or 152, as in the paper.
      num_classes: length of the logits.
      stem: "imagenet" is a 7x7 convolution and a max-pool, stride 4; "cifar" is a 3x3 convolution,
        stride 1, for images of some 32 pixels.
      width: channels of the stem and the first stage; each later stage has twice as many.
      stage_sizes: the number of blocks in each stage, in place of those of `depth`.
      block: "basic" or "bottleneck", in place of that of `depth`.
      variant: "b" is version 1.5; "d" has three 3x3 convolutions in place of the 7x7 one (the first
        two with half the channels) and averages in its shortcuts.
      groups, base_width: a bottleneck's 3x3 convolution in the stage with `width` channels has
        `groups` groups of width * base_width / 64 channels.
      stochastic_depth: the chance that the last block is left out for an example, in training.
      dropout: of the mean of the last map, before the head.
      epsilon: of the norms.
      dtype: of the computation; parameters, statistics and logits are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    depth: int = 18
    num_classes: int = 1000
    stem: str = "imagenet"
    width: int = 64
    stage_sizes: tuple[int, ...] | None = None
    block: str | None = None
    variant: str = "b"
    groups: int = 1
    base_width: int = 64
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_choices(
            self, depth=SIZES, stem=STEM_STRIDES, block=(None, "basic", "bottleneck"),
            variant=("b", "d"),
        )  # fmt: skip
        check_at_least(
            self, width=1, groups=1, base_width=1, num_classes=1, stage_sizes=1, epsilon=0
        )
        check_fractions(self, "stochastic_depth", "dropout")
        basic = (self.block or SIZES[self.depth][0]) == "basic"
        if basic and (self.groups, self.base_width) != (1, 64):
            raise InputError(
                f"ResNet: groups is {self.groups} and base_width {self.base_width}, but only "
                "bottlenecks have them; set block='bottleneck'"
            )
        # Else a convolution has no channels.
        if not basic and self.width * self.base_width < 64:
            raise InputError(
                f"ResNet: width is {self.width} and base_width {self.base_width}; their product "
                "must be at least 64"
            )
        if self.variant == "d" and self.stem == "imagenet":
            check_at_least(self, width=2)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map; a map has size ceil(size of image / stride)."""
        stages = len(self.stage_sizes or SIZES[self.depth][1])
        return {f"stage{i + 1}": STEM_STRIDES[self.stem] * 2**i for i in range(stages)}

    def setup(self):
        """Names the layers; a stage's blocks are `stage1_0`, `stage1_1`, ..."""
        kind, sizes = SIZES[self.depth]
        kind, sizes = self.block or kind, self.stage_sizes or sizes
        conv = partial(convolution, dtype=self.dtype)
        norm = partial(BatchNorm, epsilon=self.epsilon, dtype=self.dtype)
        if self.stem == "cifar":
            self.stem_conv = conv(self.width, 3)
        elif self.variant == "b":
            self.stem_conv = conv(self.width, 7, 2)
        else:
            self.stem_conv1, self.stem_norm1 = conv(self.width // 2, 3, 2), norm()
            self.stem_conv2, self.stem_norm2 = conv(self.width // 2, 3), norm()
            self.stem_conv = conv(self.width, 3)
        self.stem_norm = norm()
        rates = iter(drop_rates(self.stochastic_depth, sum(sizes)))
        make_block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for stage, (name, size) in enumerate(zip(self.strides, sizes, strict=True)):
            blocks = [
                make_block(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and number == 0 else 1,
                    bottleneck=kind == "bottleneck",
                    groups=self.groups,
                    base_width=self.base_width,
                    average_shortcut=self.variant == "d",
                    drop_rate=next(rates),
                    epsilon=self.epsilon,
                    dtype=self.dtype,
                )
                for number in range(size)
            ]
            setattr(self, name, blocks)
        self.head_dropout = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes)

    def features(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the output of each stage, {"stage1": [b, h / stride, w / stride, c], ...}.

        Args:
          x: images [b, h, w, c], normalized.
          train: normalize by this batch's statistics, and update their running average.
          valid: bool [b]: the statistics are those of these rows alone. At least one must be
            True, else they are NaN.
        """
        x = x.astype(self.dtype)
        deep = self.variant == "d" and self.stem == "imagenet"
        for number in ("1", "2", "") if deep else ("",):
            x = getattr(self, f"stem_conv{number}")(x)
            norm = getattr(self, f"stem_norm{number}")
            x = nn.relu(norm(x, train, valid))
        if self.stem == "imagenet":
            x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        maps = {}
        for name in self.strides:
            for block in getattr(self, name):
                x = block(x, train, valid)
            maps[name] = x
        return maps

    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        *_, last = self.features(x, train=train, valid=valid).values()
        # The mean and the head in float32: cheap, and the logits keep their precision.
        x = jnp.mean(last, axis=(1, 2), dtype=jnp.float32)
        return self.head(self.head_dropout(x, deterministic=not train))
