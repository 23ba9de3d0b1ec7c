"""The vision transformer: an image is a sentence of patches.

A. Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021 (https://arxiv.org/abs/2010.11929,
section 3.1, sizes in table 1); Ti and S are those of H. Touvron et al.: DeiT
(https://arxiv.org/abs/2012.12877, table 1). Register tokens: T. Darcet et al.
(https://arxiv.org/abs/2309.16588). Layer scale: H. Touvron et al.
(https://arxiv.org/abs/2103.17239, section 2). Mean pooling: L. Beyer et al.
(https://arxiv.org/abs/2205.01580), and before the norm H. Bao et al.: BEiT
(https://arxiv.org/abs/2106.08254).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices, check_fractions
from cvjax.errors import InputError
from cvjax.nn.attention import SelfAttention
from cvjax.nn.bicubic import resize_bicubic
from cvjax.nn.convolution import pad_to_multiple, patchify
from cvjax.nn.dense import Dense
from cvjax.nn.gelu import gelu
from cvjax.nn.stochastic_depth import drop_branch, drop_rates

# Size: (channels, blocks, heads).
SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


class Block(nn.Module):
    """Attention, then a perceptron, each a residual branch, [b, n, c] -> [b, n, c].

    Attributes:
      heads: of the attention.
      layer_scale: the scale of both branches at the beginning; None for no such parameters.
      dropout: of the output of attention, and of both layers of the perceptron.
      drop_rate: of stochastic depth.
      epsilon: of the norms.
      dtype: of the computation; parameters are float32.
    """

    heads: int
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_rate: float = 0.0
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block."""
        channels = x.shape[-1]
        norm = partial(nn.LayerNorm, self.epsilon, dtype=self.dtype)
        dense = partial(Dense, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout)(y, deterministic=not train)

        def add(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                y = y * self.param(name, init, (channels,)).astype(self.dtype)
            return x + drop_branch(y, self.drop_rate, train)

        y = SelfAttention(self.heads, dtype=self.dtype, name="attention")(norm(name="norm1")(x))
        x = add(x, drop(y), "layer_scale1")
        y = dense(4 * channels, name="hidden")(norm(name="norm2")(x))
        y = drop(gelu(y))
        return add(x, drop(dense(channels, name="output")(y)), "layer_scale2")


class ViT(nn.Module):
    """A vision transformer.

    `ViT("b")` is ViT-B/16; `ViT(patch=4, image_size=28, width=32, depth=2, heads=2)` one for
    digits. Images of any size go in: the position embeddings, a grid learned at `image_size`, are
    resampled to the grid of their patches.

    Attributes:
      size: "ti", "s", "b" or "l".
      num_classes: length of the logits.
      patch: side of a patch, in pixels.
      image_size: side of the images, in pixels, or (height, width), that the position embeddings
        are for; a multiple of `patch`.
      pooling: the head reads the "class" token; or the "mean" of the normalized patches, which then
        have no class token beside them; or the norm of the mean of the patches, "mean_norm", which
        keep the token (timm's `fc_norm`).
      registers: how many further tokens take part and are not read.
      class_has_position: whether a position is learned for the class token, too; it has none in
        timm's networks with registers.
      width, depth, heads: channels, blocks and heads in place of those of `size`.
      layer_scale: the scale of the residual branches at the beginning (DINOv2 has 1e-5); None for
        no such parameters.
      epsilon: of the norms: 1e-6 in the paper's code and in timm, 1e-12 in Hugging Face's.
      stochastic_depth: the chance that the last block is left out for an example, in training.
      dropout: of the embedded patches and inside the blocks (appendix B.1).
      dtype: of the computation; parameters and logits are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    size: str = "b"
    num_classes: int = 1000
    patch: int = 16
    image_size: int | tuple[int, int] = 224
    pooling: str = "class"
    registers: int = 0
    class_has_position: bool = True
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    layer_scale: float | None = None
    epsilon: float = 1e-6
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_choices(self, size=SIZES, pooling=("class", "mean", "mean_norm"))
        check_at_least(
            self, num_classes=1, patch=1, registers=0, width=1, depth=1, heads=1, image_size=1
        )
        check_fractions(self, "stochastic_depth", "dropout")
        if len(self._sides) != 2 or any(side % self.patch for side in self._sides):
            raise InputError(
                f"ViT: image_size is {self.image_size!r}; it must be a multiple of "
                f"patch={self.patch}, or two"
            )
        super().__post_init__()

    @property
    def _sides(self) -> tuple[int, int]:
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def _numbers(self) -> tuple[int, int, int]:
        """Channels, blocks, heads."""
        given = self.width, self.depth, self.heads
        return tuple(a or b for a, b in zip(given, SIZES[self.size], strict=True))

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map: `patch`, everywhere.

        A map has size ceil(size of image / patch). There are four stages of equal depth, or as
        many as there are blocks.
        """
        return {f"stage{i + 1}": self.patch for i in range(min(4, self._numbers[1]))}

    def setup(self):
        """Names the layers; the blocks are `block_0`, `block_1`, ..."""
        width, depth, heads = self._numbers
        small = nn.initializers.normal(0.02)
        grid = tuple(side // self.patch for side in self._sides)
        self.patch_embedding = patchify(width, self.patch, dtype=self.dtype)
        self.position = self.param("position", small, (*grid, width))
        if self.pooling != "mean":
            self.class_token = self.param("class_token", small, (width,))
            if self.class_has_position:
                self.class_position = self.param("class_position", small, (width,))
        if self.registers:
            self.register_tokens = self.param("register_tokens", small, (self.registers, width))
        self.embedding_dropout = nn.Dropout(self.dropout)
        make_block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        self.block = [
            make_block(heads, self.layer_scale, self.dropout, rate, self.epsilon, self.dtype)
            for rate in drop_rates(self.stochastic_depth, depth)
        ]
        norm = nn.LayerNorm(self.epsilon, dtype=self.dtype)
        if self.pooling == "mean_norm":  # not of the tokens: weights of one are not the other's
            self.mean_norm = norm
        else:
            self.norm = norm
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)

    def _embed(self, x: jax.Array, train: bool) -> tuple[jax.Array, tuple[int, int]]:
        """Tokens [b, n, c], those that are no patches first, and the grid of the patches."""
        x = self.patch_embedding(pad_to_multiple(x.astype(self.dtype), self.patch))
        batch, height, width, channels = x.shape
        x = x + resize_bicubic(self.position, height, width).astype(self.dtype)
        first = []
        if self.pooling != "mean":
            token = self.class_token
            first.append((token + self.class_position if self.class_has_position else token)[None])
        if self.registers:
            first.append(self.register_tokens)
        x = x.reshape(batch, height * width, channels)
        if first:
            first = jnp.concatenate(first).astype(self.dtype)
            first = jnp.broadcast_to(first, (batch, *first.shape))
            x = jnp.concatenate([first, x], axis=1)
        return self.embedding_dropout(x, deterministic=not train), (height, width)

    def _stages(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """The tokens after each stage."""
        stages, ends = [], len(self.strides)
        for number, block in enumerate(self.block, start=1):
            x = block(x, train)
            if number == len(self.block) * (len(stages) + 1) // ends:
                stages.append(x)
        return stages

    def features(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Returns the patches after each stage, {"stage1": [b, h / patch, w / patch, c], ...}.

        They are not normalized. Where the patches do not divide an image, it is completed with
        zeros below and to the right.

        Args:
          x: images [b, h, w, c], normalized.
          train: dropout and stochastic depth (the stream "dropout").
        """
        x, grid = self._embed(x, train)
        count = grid[0] * grid[1]
        return {
            name: tokens[:, -count:].reshape(x.shape[0], *grid, x.shape[-1])
            for name, tokens in zip(self.strides, self._stages(x, train), strict=True)
        }

    def encode(
        self, x: jax.Array, *, keep: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Returns the patches after the last block, [b, n, c], row by row.

        They are normalized, but for "mean_norm", which has no norm for them.

        Args:
          x: images [b, h, w, c], normalized.
          keep: the numbers of those patches, int32 [b, n], that are seen at all, besides the class
            token and registers; None is all, in their order.
          train: as for `features`.
        """
        x, grid = self._embed(x, train)
        count = grid[0] * grid[1]
        if keep is not None:
            kept = jnp.take_along_axis(x[:, -count:], keep[..., None], axis=1)
            x, count = jnp.concatenate([x[:, :-count], kept], axis=1), keep.shape[1]
        x = self._stages(x, train)[-1]
        return (x if self.pooling == "mean_norm" else self.norm(x))[:, -count:]

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        x, grid = self._embed(x, train)
        x, patches = self._stages(x, train)[-1], slice(-grid[0] * grid[1], None)
        if self.pooling == "mean_norm":
            return self.head(self.mean_norm(jnp.mean(x[:, patches], axis=1)).astype(jnp.float32))
        x = self.norm(x).astype(jnp.float32)
        return self.head(x[:, 0] if self.pooling == "class" else jnp.mean(x[:, patches], axis=1))
