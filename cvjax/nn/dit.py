"""The diffusion transformer: a noisy image, a time and a class or caption to an image.

W. Peebles, S. Xie: Scalable Diffusion Models with Transformers
(https://arxiv.org/abs/2212.09748), figure 3 (adaLN-Zero), sizes in table 1. Captions by
cross-attention after self-attention, as in J. Chen et al.: PixArt-alpha
(https://arxiv.org/abs/2310.00426), section 2.3. The blocks begin as the identity and the network as
zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices
from cvjax.errors import InputError
from cvjax.nn.attention import CrossAttention, SelfAttention
from cvjax.nn.convolution import patchify
from cvjax.nn.dense import Dense
from cvjax.nn.embeddings import ClassEmbedding, TimeEmbedding
from cvjax.nn.space_to_depth import depth_to_space

# Size: (channels, blocks, heads).
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
SINUSOIDS = 256  # of the time


def positions(height: int, width: int, channels: int) -> np.ndarray:
    """Sinusoids of the place in a grid, float32 [height, width, channels], a multiple of 4.

    The first half of the channels is of the column, the second of the row; of each, first the sines
    then the cosines, with wavelengths from 2 pi to 2 pi * 10,000 places.
    """
    frequencies = 10_000.0 ** -(np.arange(channels // 4) / (channels // 4))
    rows, columns = (
        np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        for angles in (np.arange(side)[:, None] * frequencies for side in (height, width))
    )
    shape = (height, width, channels // 2)
    both = np.broadcast_to(columns[None], shape), np.broadcast_to(rows[:, None], shape)
    return np.concatenate(both, axis=-1).astype(np.float32)


class Block(nn.Module):
    """Attention, then a perceptron; the condition sets shift, scale and gate of both (adaLN-Zero).

    Attributes:
      heads: of the attention.
      dtype: of the computation; parameters are float32.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array, words: jax.Array | None = None
    ) -> jax.Array:
        """Keeps the shape of x, [b, n, c]; the condition is [b, c], the words are [b, m, d]."""
        channels, zeros = x.shape[-1], nn.initializers.zeros
        xavier = nn.initializers.xavier_uniform()
        set_all = nn.Dense(6 * channels, kernel_init=zeros, dtype=self.dtype, name="modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            set_all(condition)[:, None], 6, axis=-1
        )
        y = modulate(_norm(x, self.dtype), shift1, scale1)
        x = x + gate1 * SelfAttention(self.heads, dtype=self.dtype, name="attention")(y)
        if words is not None:
            attend = CrossAttention(self.heads, zero_init=True, dtype=self.dtype, name="words")
            x = x + attend(x, words)
        y = modulate(_norm(x, self.dtype), shift2, scale2)
        y = Dense(4 * channels, kernel_init=xavier, dtype=self.dtype, name="hidden")(y)
        y = Dense(channels, kernel_init=xavier, dtype=self.dtype, name="output")(nn.gelu(y))
        return x + gate2 * y


class DiT(nn.Module):
    """Predicts an image from a noisy one, its time, and its class or caption.

    `DiT("b", patch=2)` is DiT-B/2. Any height and width that are multiples of `patch` fit.

    Attributes:
      size: "s", "b", "l" or "xl".
      num_classes: classes without the null one; label `num_classes` means that none is given.
      patch: side of a patch, in pixels.
      width, depth, heads: channels, blocks and heads in place of those of `size`.
      text: a module that makes (a vector, one for each word) of captions, in place of classes:
        `cvjax.nn.text_encoder.TextEncoder`.
      out_channels: None for as many as the input has.
      dtype: of the computation; parameters and the output are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    size: str = "s"
    num_classes: int = 10
    patch: int = 2
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    text: nn.Module | None = None
    out_channels: int | None = None
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_choices(self, size=SIZES)
        check_at_least(self, num_classes=0, patch=1, width=1, depth=1, heads=1, out_channels=1)
        if self._numbers[0] % 4:
            raise InputError(f"DiT: width is {self._numbers[0]}; it must be a multiple of 4")
        super().__post_init__()

    @property
    def _numbers(self) -> tuple[int, int, int]:
        """Channels, blocks, heads."""
        given = self.width, self.depth, self.heads
        return tuple(a or b for a, b in zip(given, SIZES[self.size], strict=True))

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        """Maps images [b, h, w, c] to float32 images of the same size.

        Args:
          x: noisy images, about unit variance.
          t: float32 [b] in [0, 1].
          label: int32 [b] in 0..num_classes, or with `text` the tokens of captions.
        """
        height, width, in_channels = x.shape[1:]
        if height % self.patch or width % self.patch:
            raise InputError(
                f"DiT: images are {height} x {width}, patch is {self.patch}; height and width must "
                f"be multiples of {self.patch}"
            )
        channels, depth, heads = self._numbers
        grid = height // self.patch, width // self.patch
        condition = TimeEmbedding(channels, self.dtype, SINUSOIDS, name="time")(t)
        words = None
        if self.text is None:
            embed = ClassEmbedding(self.num_classes, channels, self.dtype, name="class")
            condition = condition + embed(label)
        else:
            vector, words = self.text(label)
            condition = condition + nn.Dense(channels, dtype=self.dtype, name="caption")(vector)
        condition = nn.silu(condition)

        x = patchify(channels, self.patch, dtype=self.dtype, name="stem")(x.astype(self.dtype))
        x = x + positions(*grid, channels).astype(self.dtype)
        x = x.reshape(len(x), grid[0] * grid[1], channels)
        make_block = nn.remat(Block) if self.remat else Block
        for number in range(depth):
            x = make_block(heads, self.dtype, name=f"block_{number}")(x, condition, words)

        zeros = nn.initializers.zeros
        last = nn.Dense(2 * channels, kernel_init=zeros, dtype=self.dtype, name="modulation")
        shift, scale = jnp.split(last(condition)[:, None], 2, axis=-1)
        x = modulate(_norm(x, self.dtype), shift, scale)
        outputs = self.patch**2 * (self.out_channels or in_channels)
        x = Dense(outputs, kernel_init=zeros, dtype=self.dtype, name="head")(x)
        return depth_to_space(x.reshape(len(x), *grid, outputs), self.patch).astype(jnp.float32)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer normalization, after the norm: x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def _norm(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return nn.LayerNorm(1e-6, use_bias=False, use_scale=False, dtype=dtype)(x)
