"""The Swin transformer: attention within windows, which move from block to block.

Z. Liu, Y. Lin, Y. Cao, H. Hu, Y. Wei, Z. Zhang, S. Lin, B. Guo: Swin Transformer, ICCV 2021
(https://arxiv.org/abs/2103.14030, section 3; the sizes are in 3.3).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices, check_fractions
from cvjax.errors import InputError
from cvjax.nn.attention import attend
from cvjax.nn.convolution import pad_to_multiple, patchify
from cvjax.nn.dense import Dense
from cvjax.nn.gelu import gelu
from cvjax.nn.stochastic_depth import drop_branch, drop_rates

# Size: (channels of the first stage, blocks of each stage, heads of each stage).
SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


class WindowAttention(nn.Module):
    """Attention of the pixels of a window to each other, [b, windows, n, c] -> the same.

    Attributes:
      window: side of a window; n is its square.
      heads: each has c / heads channels.
      dtype: of the computation, softmax excepted; parameters are float32.
    """

    window: int
    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, visible: np.ndarray | None) -> jax.Array:
        """`visible`, bool [windows, n, n], is True where a query may see a key; None: anywhere."""
        channels = x.shape[-1]
        if channels % self.heads:
            raise InputError(f"Swin: {channels} channels do not divide into {self.heads} heads")
        init = nn.initializers.truncated_normal(0.02)
        dense = partial(Dense, kernel_init=init, dtype=self.dtype)
        table = self.param(
            "relative_position", init, ((2 * self.window - 1) ** 2, self.heads), jnp.float32
        )
        bias = jnp.moveaxis(table[_relative_positions(self.window)], -1, 0)  # [heads, n, n]

        size = channels // self.heads
        y = dense(3 * channels, name="query_key_value")(x)
        y = y.reshape(*x.shape[:3], 3, self.heads, size)
        query, key, value = y[..., 0, :, :], y[..., 1, :, :], y[..., 2, :, :]
        y = attend(query, key, value, None if visible is None else visible[:, None], bias)
        return dense(channels, name="output")(y.reshape(x.shape))


def _relative_positions(window: int) -> np.ndarray:
    """The row of the table for each (query, key), int [n, n]."""
    y, x = np.divmod(np.arange(window**2), window)
    rows = y[:, None] - y[None] + window - 1
    columns = x[:, None] - x[None] + window - 1
    return rows * (2 * window - 1) + columns


def _split(x: np.ndarray | jax.Array, window: int) -> np.ndarray | jax.Array:
    """Cuts [b, h, w, c] into windows, [b, windows, window ** 2, c]; the sides divide h and w."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c)
    return x.swapaxes(2, 3).reshape(b, (h // window) * (w // window), window**2, c)


def _join(x: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `_split`."""
    b, _, n, c = x.shape
    window = round(n**0.5)
    x = x.reshape(b, height // window, width // window, window, window, c)
    return x.swapaxes(2, 3).reshape(b, height, width, c)


def _visible(height: int, width: int, window: int, shifts: tuple[int, int]) -> np.ndarray | None:
    """Which pixels of a rolled map, in each window, were neighbours before; None: all.

    bool [windows, n, n]: section 3.2, figure 4.
    """
    if not any(shifts):
        return None
    regions = []
    for length, shift in zip((height, width), shifts, strict=True):
        region = np.zeros(length, int)
        if shift:
            region[-window:], region[-shift:] = 1, 2
        regions.append(region)
    region = _split((3 * regions[0][:, None] + regions[1])[None, :, :, None], window)[0, :, :, 0]
    return region[:, :, None] == region[:, None, :]


class Block(nn.Module):
    """Window attention, then a perceptron, each a residual branch, [b, h, w, c] -> the same.

    Attributes:
      window: side of the windows. A map is completed with zeros to a multiple of it, after the
        norm; these zeros are seen, as in the published networks.
      heads: of the attention.
      shifted: the windows are moved by half a window (but not along a side that one covers).
      drop_rate: of stochastic depth.
      dropout: of the output of attention, and of both layers of the perceptron.
      epsilon: of the norms.
      dtype: of the computation; parameters are float32.
    """

    window: int
    heads: int
    shifted: bool
    drop_rate: float = 0.0
    dropout: float = 0.0
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block."""
        channels = x.shape[-1]
        norm = partial(nn.LayerNorm, self.epsilon, dtype=self.dtype)
        init = nn.initializers.truncated_normal(0.02)
        dense = partial(Dense, kernel_init=init, dtype=self.dtype)

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout)(y, deterministic=not train)

        y = pad_to_multiple(norm(name="norm1")(x), self.window)
        height, width = y.shape[1:3]
        shifts = tuple(
            self.window // 2 if self.shifted and length > self.window else 0
            for length in (height, width)
        )
        y = jnp.roll(y, (-shifts[0], -shifts[1]), (1, 2))
        attention = WindowAttention(self.window, self.heads, self.dtype, name="attention")
        y = attention(_split(y, self.window), _visible(height, width, self.window, shifts))
        y = jnp.roll(_join(y, height, width), shifts, (1, 2))[:, : x.shape[1], : x.shape[2]]
        x = x + drop_branch(drop(y), self.drop_rate, train)
        y = dense(4 * channels, name="hidden")(norm(name="norm2")(x))
        y = dense(channels, name="output")(drop(gelu(y)))
        return x + drop_branch(drop(y), self.drop_rate, train)


class Swin(nn.Module):
    """A Swin transformer. Images of any size go in.

    `Swin("tiny")` is that of the paper;
    `Swin(width=16, blocks=(2, 2), heads=(2, 4), window=4)` a small one.

    Attributes:
      size: "tiny", "small", "base" or "large".
      num_classes: length of the logits.
      patch: side of a patch, in pixels.
      window: side of a window, in pixels of the map.
      width: channels of the first stage, in place of those of `size`; each later stage has twice
        as many.
      blocks, heads: of each stage, in place of those of `size`.
      epsilon: of the norms.
      stochastic_depth: the chance that the last block is left out for an example, in training;
        the paper has 0.2, 0.3 and 0.5 for the first three sizes.
      dropout: of the embedded patches and inside the blocks.
      dtype: of the computation; parameters and logits are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    size: str = "tiny"
    num_classes: int = 1000
    patch: int = 4
    window: int = 7
    width: int | None = None
    blocks: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    epsilon: float = 1e-5
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_choices(self, size=SIZES)
        check_at_least(self, num_classes=1, patch=1, window=1, width=1, blocks=1, heads=1)
        check_fractions(self, "stochastic_depth", "dropout")
        _, blocks, heads = self._numbers
        if len(blocks) != len(heads):
            raise InputError(
                f"Swin: blocks is {blocks!r} and heads {heads!r}; they must be of the same length"
            )
        super().__post_init__()

    @property
    def _numbers(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        given = self.width, self.blocks, self.heads
        return tuple(
            a if a is not None else b for a, b in zip(given, SIZES[self.size], strict=True)
        )

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map; a map has size ceil(size of image / stride)."""
        return {f"stage{i + 1}": self.patch * 2**i for i in range(len(self._numbers[1]))}

    def setup(self):
        """Names the layers; a stage's blocks are `stage1_0`, `stage1_1`, ..."""
        width, all_blocks, all_heads = self._numbers
        norm = partial(nn.LayerNorm, self.epsilon, dtype=self.dtype)
        init = nn.initializers.truncated_normal(0.02)
        self.patch_embedding = patchify(width, self.patch, dtype=self.dtype)
        self.patch_norm = norm()
        self.embedding_dropout = nn.Dropout(self.dropout)
        make_block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        rates = iter(drop_rates(self.stochastic_depth, sum(all_blocks)))
        for stage, name in enumerate(self.strides):
            if stage > 0:
                reduction = Dense(
                    width * 2**stage, use_bias=False, kernel_init=init, dtype=self.dtype
                )
                setattr(self, f"{name}_norm", norm())
                setattr(self, f"{name}_reduction", reduction)
            blocks = [
                make_block(
                    self.window, all_heads[stage], number % 2 == 1, next(rates), self.dropout,
                    self.epsilon, self.dtype,
                )
                for number in range(all_blocks[stage])
            ]  # fmt: skip
            setattr(self, name, blocks)
        self.norm = norm()
        self.head = nn.Dense(self.num_classes, kernel_init=init)

    def features(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Returns the output of each stage, {"stage1": [b, h / stride, w / stride, c], ...}.

        They are not normalized. Where a stride does not divide an image or a map, it is completed
        with zeros below and to the right.

        Args:
          x: images [b, h, w, c], normalized.
          train: dropout and stochastic depth (the stream "dropout").
        """
        x = self.patch_norm(self.patch_embedding(pad_to_multiple(x.astype(self.dtype), self.patch)))
        x = self.embedding_dropout(x, deterministic=not train)
        maps = {}
        for name in self.strides:
            if name != "stage1":
                x = getattr(self, f"{name}_norm")(_merge(x))
                x = getattr(self, f"{name}_reduction")(x)
            for block in getattr(self, name):
                x = block(x, train)
            maps[name] = x
        return maps

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        *_, last = self.features(x, train=train).values()
        return self.head(jnp.mean(self.norm(last), axis=(1, 2), dtype=jnp.float32))


def _merge(x: jax.Array) -> jax.Array:
    """2x2 pixels to one, [b, h, w, c] -> [b, ceil(h / 2), ceil(w / 2), 4 c], column by column."""
    x = pad_to_multiple(x, 2)
    parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return jnp.concatenate(parts, axis=-1)
