"""The U-Net of diffusion models: an image, a time and a class or caption to an image.

J. Ho et al.: Denoising Diffusion Probabilistic Models (https://arxiv.org/abs/2006.11239), appendix
B, with the adaptive group normalization of P. Dhariwal, A. Nichol: Diffusion Models Beat GANs on
Image Synthesis (https://arxiv.org/abs/2105.05233), section 3. The blocks begin as the identity
and the network as zero.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least
from cvjax.errors import InputError
from cvjax.nn.attention import CrossAttention, SelfAttention
from cvjax.nn.dense import Dense
from cvjax.nn.embeddings import ClassEmbedding, TimeEmbedding
from cvjax.nn.fast_conv import fast_conv
from cvjax.nn.group_norm import GroupNorm
from cvjax.nn.silu import silu
from cvjax.nn.space_to_depth import depth_to_space, space_to_depth

GROUPS = 8  # of channels, each normalized together: at most so many
GROUP_SIZE = 4  # and at least so large: a channel alone would lose its mean


def _sum(x: jax.Array, y: jax.Array, rescale: bool) -> jax.Array:
    return (x + y) * 2**-0.5 if rescale else x + y


def _norm(x: jax.Array, dtype: DTypeLike, name: str) -> jax.Array:
    groups = math.gcd(GROUPS, max(1, x.shape[-1] // GROUP_SIZE), x.shape[-1])
    return GroupNorm(groups, dtype=dtype, name=name)(x)


class Block(nn.Module):
    """A residual block: norm, SiLU, conv, norm, scale and shift, SiLU, conv.

    Attributes:
      features: channels of the output.
      dtype: of the computation; parameters are float32.
      rescale: divide the sum by the square root of 2.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    rescale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] to [b, h, w, features]; the condition is [b, d]."""
        y = silu(_norm(x, self.dtype, "norm1"))
        y = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv1")(y)
        # FiLM (E. Perez et al., https://arxiv.org/abs/1709.07871): the condition sets each
        # channel's scale and shift.
        film = nn.Dense(2 * self.features, dtype=self.dtype, name="scale_shift")(condition)
        scale, shift = jnp.split(film[:, None, None, :], 2, axis=-1)
        y = silu(_norm(y, self.dtype, "norm2") * (1 + scale) + shift)
        zeros = nn.initializers.zeros
        y = nn.Conv(self.features, (3, 3), kernel_init=zeros, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name="shortcut")(x)
        return _sum(x, y, self.rescale)


class AttentionBlock(nn.Module):
    """A residual block in which every place of a map [b, h, w, c] looks at every other.

    Where there are words, [b, m, d], every place then looks at these, in a second residual block.

    Attributes:
      head_features: channels of one head.
      dtype: of the computation; parameters are float32.
      rescale: divide each sum by the square root of 2.
    """

    head_features: int
    dtype: DTypeLike = jnp.float32
    rescale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, words: jax.Array | None = None) -> jax.Array:
        """Keeps the shape."""
        channels, flat = x.shape[-1], (len(x), x.shape[1] * x.shape[2], x.shape[-1])
        heads = max(1, channels // self.head_features)
        tokens = _norm(x, self.dtype, "norm").reshape(flat)
        y = SelfAttention(heads, zero_init=True, dtype=self.dtype, name="attention")(tokens)
        x = _sum(x, y.reshape(x.shape), self.rescale)
        if words is None:
            return x
        tokens = _norm(x, self.dtype, "words_norm").reshape(flat)
        y = CrossAttention(heads, zero_init=True, dtype=self.dtype, name="words")(tokens, words)
        return _sum(x, y.reshape(x.shape), self.rescale)


class UNet(nn.Module):
    """Predicts an image from a noisy one, its time and its class.

    On the way down each level has `blocks` residual blocks and halves the map (an odd size is
    rounded up); on the way up each block is shown what its counterpart on the way down made.
    Any height and width that are multiples of `patch` fit. With `rescale` it is in the manner of
    DDPM++, with `anti_alias` and `residual_input` too of NCSN++ (Y. Song et al.,
    https://arxiv.org/abs/2011.13456, appendix H.1; for large images with `skip_output`, too).

    Attributes:
      num_classes: classes without the null one; label `num_classes` means that none is given.
      width: channels of the finest level.
      multipliers: channels of each level, the finest first, as multiples of `width`.
      blocks: residual blocks of each level, in each direction.
      attention: levels (0 is the finest) with self-attention after every residual block; in the
        middle of the network there is one if the coarsest level is among them.
      head_features: channels of one head of attention.
      patch: work on squares of `patch` x `patch` pixels, stacked as channels, instead of on
        pixels: with 2 the maps are half as high and wide and the network costs a quarter.
      embedding: length of the embedding of time and class; None for 4 * width.
      text: a module that makes (a vector, one for each word) of captions, in place of classes:
        `cvjax.nn.text_encoder.TextEncoder`. The vector joins the embedding of the time; where there
        is self-attention, each place also looks at the words.
      out_channels: None for as many as the input has.
      rescale: divide the sum of a residual branch and what it is added to by the square root of 2,
        so that the variance does not grow with the depth.
      anti_alias: halve and double maps with the filter (1, 3, 3, 1) instead of leaving out and
        repeating pixels (R. Zhang, https://arxiv.org/abs/1904.11486).
      residual_input: the image has a way down of its own beside the blocks: halved and convolved
        it is added to the map of each level, and their sum goes on, on both ways.
      skip_output: every level of the way up gives an image, and the result is the sum of all,
        doubled (T. Karras et al., https://arxiv.org/abs/1912.04958, figure 7b).
      dtype: of the computation; parameters and the output are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    num_classes: int = 10
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    head_features: int = 32
    patch: int = 1
    embedding: int | None = None
    text: nn.Module | None = None
    out_channels: int | None = None
    rescale: bool = False
    anti_alias: bool = False
    residual_input: bool = False
    skip_output: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_at_least(
            self, num_classes=0, width=1, multipliers=1, blocks=1, head_features=1, patch=1,
            embedding=2, out_channels=1,
        )  # fmt: skip
        if not set(self.attention) <= set(range(len(self.multipliers))):
            raise InputError(
                f"UNet: attention is {self.attention!r}; its levels must be in "
                f"0..{len(self.multipliers) - 1}"
            )
        for level in self.attention:
            channels = self.width * self.multipliers[level]
            if channels % max(1, channels // self.head_features):
                raise InputError(
                    f"UNet: head_features is {self.head_features}; it must divide the {channels} "
                    f"channels at level {level} (width * multipliers[{level}])"
                )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        """Maps images [b, h, w, c] to float32 images of the same size.

        Args:
          x: noisy images, about unit variance.
          t: float32 [b] in [0, 1].
          label: int32 [b] in 0..num_classes, or with `text` the tokens of captions.
        """
        height, width, channels = x.shape[1:]
        if height % self.patch or width % self.patch:
            raise InputError(
                f"UNet: images are {height} x {width}, patch is {self.patch}; height and width "
                f"must be multiples of {self.patch}"
            )
        embedding = self.embedding or 4 * self.width
        condition = TimeEmbedding(embedding, self.dtype, name="time")(t)
        words = None
        if self.text is None:
            embed = ClassEmbedding(self.num_classes, embedding, self.dtype, name="class")
            condition += embed(label)
        else:
            vector, words = self.text(label)
            condition += nn.Dense(embedding, dtype=self.dtype, name="caption")(vector)
        condition = silu(condition)
        make_block = nn.remat(Block) if self.remat else Block
        make_attention = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        features = [self.width * multiplier for multiplier in self.multipliers]
        levels = range(len(features))
        coarsest = levels[-1]

        def block(x: jax.Array, level: int, name: str) -> jax.Array:
            return make_block(features[level], self.dtype, self.rescale, name=name)(x, condition)

        def attention(x: jax.Array, level: int, name: str) -> jax.Array:
            if level not in self.attention:
                return x
            settings = self.head_features, self.dtype, self.rescale
            return make_attention(*settings, name=f"{name}_attention")(x, words)

        def halve(x: jax.Array, level: int, name: str) -> jax.Array:
            x = _resized(x, -(-x.shape[1] // 2), -(-x.shape[2] // 2)) if self.anti_alias else x
            return nn.Conv(
                features[level], (3, 3), strides=1 if self.anti_alias else 2, padding=1,
                dtype=self.dtype, name=name,
            )(x)  # fmt: skip

        def double(x: jax.Array, height: int, width: int) -> jax.Array:
            if self.anti_alias:
                return _resized(x, height, width)
            return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]

        beside = space_to_depth(x, self.patch).astype(self.dtype)
        x = nn.Conv(features[0], (3, 3), dtype=self.dtype, name="stem")(beside)
        skips = []
        for level in levels:
            if level > 0:
                x = halve(x, level, f"down{level}_halve")
            if level > 0 and self.residual_input:
                beside = halve(beside, level, f"down{level}_beside")
                x = beside = _sum(beside, x, self.rescale)
            for number in range(self.blocks):
                name = f"down{level}_{number}"
                x = attention(block(x, level, name), level, name)
                skips.append(x)

        x = block(x, coarsest, "middle_0")
        x = block(attention(x, coarsest, "middle"), coarsest, "middle_1")

        outputs, image = self.patch**2 * (self.out_channels or channels), None
        for level in reversed(levels):
            if level < coarsest:
                x = double(x, *skips[-1].shape[1:3])
                x = nn.Conv(features[level], (3, 3), dtype=self.dtype, name=f"up{level}_double")(x)
            for number in range(self.blocks):
                name = f"up{level}_{number}"
                x = block(jnp.concatenate([x, skips.pop()], axis=-1), level, name)
                x = attention(x, level, name)
            if level == 0 or self.skip_output:
                name = "head" if level == 0 else f"up{level}_head"
                y = silu(_norm(x, self.dtype, f"{name}_norm"))
                y = nn.Conv(
                    outputs, (3, 3), kernel_init=nn.initializers.zeros, dtype=self.dtype, name=name,
                    conv_general_dilated=fast_conv,
                )(y)  # fmt: skip
                image = y if image is None else y + double(image, *y.shape[1:3])
        return depth_to_space(image, self.patch).astype(jnp.float32)


def _resized(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear with a filter: to a half it is (1, 3, 3, 1) / 8, to the double (1, 3, 3, 1) / 4."""
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "linear")
