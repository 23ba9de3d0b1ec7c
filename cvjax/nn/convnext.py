"""ConvNeXt: a convolutional network with the proportions of a Swin transformer.

Z. Liu, H. Mao, C.-Y. Wu, C. Feichtenhofer, T. Darrell, S. Xie: A ConvNet for the 2020s, CVPR 2022
(https://arxiv.org/abs/2201.03545, section 3 and appendix A; the sizes are at its end).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices, check_fractions
from cvjax.errors import InputError
from cvjax.nn.convolution import convolution, pad_to_multiple, patchify
from cvjax.nn.dense import Dense
from cvjax.nn.gelu import gelu
from cvjax.nn.stochastic_depth import drop_branch, drop_rates

# Size: (blocks, channels) of each stage.
SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}


class Block(nn.Module):
    """x + scale * perceptron(norm(depthwise 7x7 convolution of x)), [b, h, w, c] -> the same.

    Attributes:
      layer_scale: the scale at the beginning, of each channel; None for no such parameter.
      drop_rate: of stochastic depth.
      epsilon: of the norm.
      dtype: of the computation; parameters are float32.
    """

    layer_scale: float | None = 1e-6
    drop_rate: float = 0.0
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block."""
        channels = x.shape[-1]
        init = nn.initializers.truncated_normal(0.02)
        dense = partial(Dense, kernel_init=init, dtype=self.dtype)
        y = convolution(
            channels, 7, groups=channels, use_bias=True, kernel_init=init, dtype=self.dtype,
            name="depthwise_conv",
        )(x)  # fmt: skip
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(y)
        y = gelu(dense(4 * channels, name="hidden")(y))
        y = dense(channels, name="output")(y)
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param("layer_scale", init, (channels,)).astype(self.dtype)
        return x + drop_branch(y, self.drop_rate, train)


class ConvNeXt(nn.Module):
    """A ConvNeXt.

    `ConvNeXt("tiny")` is that of the paper; `ConvNeXt(blocks=(1, 1), channels=(8, 16))` a small
    one.

    Attributes:
      size: "tiny", "small", "base", "large" or "xlarge".
      num_classes: length of the logits.
      blocks, channels: of each stage, in place of those of `size`; both or none.
      layer_scale: the scale of each residual branch at the beginning; None for no such parameter.
      epsilon: of the norms.
      stochastic_depth: the chance that the last block is left out for an example, in training;
        the paper has 0.1, 0.4, 0.5, 0.5 for the first four sizes.
      dropout: of the mean of the last map, before the head.
      dtype: of the computation; parameters and logits are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    size: str = "tiny"
    num_classes: int = 1000
    blocks: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    layer_scale: float | None = 1e-6
    epsilon: float = 1e-6
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_choices(self, size=SIZES)
        check_at_least(self, num_classes=1, blocks=1, channels=1)
        check_fractions(self, "stochastic_depth", "dropout")
        if len(self.blocks or ()) != len(self.channels or ()):
            raise InputError(
                f"ConvNeXt: blocks is {self.blocks!r} and channels {self.channels!r}; they must be "
                "of the same length, or both None"
            )
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map; a map has size ceil(size of image / stride)."""
        stages = len(self.blocks or SIZES[self.size][0])
        return {f"stage{i + 1}": 4 * 2**i for i in range(stages)}

    def setup(self):
        """Names the layers; a stage's blocks are `stage1_0`, `stage1_1`, ..."""
        all_blocks, all_channels = SIZES[self.size]
        all_blocks, all_channels = self.blocks or all_blocks, self.channels or all_channels
        norm = partial(nn.LayerNorm, self.epsilon, dtype=self.dtype)
        self.stem_conv, self.stem_norm = patchify(all_channels[0], 4, dtype=self.dtype), norm()
        make_block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        rates = iter(drop_rates(self.stochastic_depth, sum(all_blocks)))
        for name, blocks, channels in zip(self.strides, all_blocks, all_channels, strict=True):
            if name != "stage1":
                setattr(self, f"{name}_norm", norm())
                setattr(self, f"{name}_conv", patchify(channels, 2, dtype=self.dtype))
            made = [
                make_block(self.layer_scale, next(rates), self.epsilon, self.dtype)
                for _ in range(blocks)
            ]
            setattr(self, name, made)
        self.head_norm = nn.LayerNorm(self.epsilon)
        self.head_dropout = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.truncated_normal(0.02))

    def features(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Returns the output of each stage, {"stage1": [b, h / stride, w / stride, c], ...}.

        Where a stride does not divide an image or a map, it is completed with zeros below and to
        the right.

        Args:
          x: images [b, h, w, c], normalized.
          train: leave out blocks by chance (the stream "dropout").
        """
        x = self.stem_norm(self.stem_conv(pad_to_multiple(x.astype(self.dtype), 4)))
        maps = {}
        for name in self.strides:
            if name != "stage1":
                x = pad_to_multiple(getattr(self, f"{name}_norm")(x), 2)
                x = getattr(self, f"{name}_conv")(x)
            for block in getattr(self, name):
                x = block(x, train)
            maps[name] = x
        return maps

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        *_, last = self.features(x, train=train).values()
        x = self.head_norm(jnp.mean(last, axis=(1, 2), dtype=jnp.float32))
        return self.head(self.head_dropout(x, deterministic=not train))
