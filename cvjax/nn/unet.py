"""The U-Net of diffusion models (Ho et al. 2020; Dhariwal and Nichol 2021)."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from cvjax.errors import InputError
from cvjax.nn.attention import SelfAttention
from cvjax.nn.embeddings import TimeAndClassEmbedding


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the condition scales and shifts between them. Begins as identity."""

    channels: int
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool = False) -> jax.Array:
        """Maps x [batch, height, width, any] and condition [batch, features] to `channels`."""
        h = nn.silu(_norm(x.shape[-1], self.dtype)(x))
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(h)
        condition = nn.Dense(2 * self.channels, dtype=self.dtype)(nn.silu(condition))
        scale, shift = jnp.split(condition[:, None, None, :], 2, axis=-1)
        h = nn.silu(_norm(self.channels, self.dtype)(h) * (1 + scale) + shift)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype)(x)
        return x + h


class UNet(nn.Module):
    """Predicts an array like its input, given a time and a class.

    Attributes:
      width: channels at the first level; level i has `width * multipliers[i]`.
      multipliers: one for each level; between levels the map is halved.
      blocks: residual blocks in each level, on the way down and on the way up; each of these
        sees the map of its counterpart.
      attention: heights of the maps that get self-attention, say (7,).
      heads: of the attention.
      patch: the picture is first cut into patches of this size, whose pixels become channels.
      num_classes: 0 for none; class `num_classes` is the null class.
      dropout: in the residual blocks, while training.
      dtype: of the computation, say "bfloat16"; parameters and output are float32.
      remat: recompute the blocks in the backward pass instead of keeping their activations.
    """

    width: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    heads: int = 4
    patch: int = 1
    num_classes: int = 0
    dropout: float = 0.0
    dtype: jnp.dtype | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, label: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Maps x [batch, height, width, channels], t [batch] in [0, 1], label int [batch].

        Returns float32 of the shape of x. Raises InputError when patches and halvings do not
        divide the height and the width.
        """
        batch, height, width, channels = x.shape
        divisor = self.patch * 2 ** (len(self.multipliers) - 1)
        if height % divisor or width % divisor:
            raise InputError(
                f"the U-Net cannot halve {height} x {width} pixels {len(self.multipliers) - 1} "
                f"times after patches of {self.patch}: both sides must be multiples of {divisor}; "
                "pad or resize the images, or change network.patch or network.multipliers"
            )
        block = nn.remat(ResidualBlock, static_argnums=(3,)) if self.remat else ResidualBlock
        condition = TimeAndClassEmbedding(4 * self.width, self.num_classes, self.dtype)(t, label)

        def level(x: jax.Array, features: int) -> jax.Array:
            x = block(features, self.dropout, self.dtype)(x, condition, train)
            if x.shape[1] in self.attention:
                x = SelfAttention(self.heads, _groups(features), self.dtype)(x)
            return x

        h = nn.Conv(self.width, (3, 3), dtype=self.dtype)(space_to_depth(x, self.patch))
        skips = []
        for i, multiplier in enumerate(self.multipliers):
            features = self.width * multiplier
            if i:
                h = nn.Conv(features, (3, 3), (2, 2), padding=1, dtype=self.dtype)(h)
            for _ in range(self.blocks):
                h = level(h, features)
                skips.append(h)
        h = level(h, h.shape[-1])
        for i, multiplier in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.blocks):
                h = level(jnp.concatenate([h, skips.pop()], axis=-1), self.width * multiplier)
            if i:
                # Channels first to what the next level needs: the map is still small here.
                h = nn.Dense(self.width * self.multipliers[i - 1], dtype=self.dtype)(h)
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
        h = nn.silu(_norm(h.shape[-1], self.dtype)(h))
        h = nn.Conv(
            channels * self.patch**2, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros
        )(h)
        return depth_to_space(h, self.patch).astype(jnp.float32)


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
    """[b, h, w, c] -> [b, h / size, w / size, size * size * c]; the patch's row comes first."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // size, w // size, size * size * c)


def depth_to_space(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, size, size, c // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * size, w * size, c // size**2)


def _groups(channels: int) -> int:
    return math.gcd(channels, 8)


def _norm(channels: int, dtype: jnp.dtype | None) -> nn.GroupNorm:
    return nn.GroupNorm(_groups(channels), dtype=dtype)
