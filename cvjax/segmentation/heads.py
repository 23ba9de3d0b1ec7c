"""Heads of segmentation networks: maps of any backbone -> the scores of the classes at each pixel.

A head is called as `head(maps, size, train=..., valid=...)`, where `maps` are the backbone's
features, [b, h_i, w_i, c_i], in the order of their strides, the finest first; `size` is the height
and width of the image; it returns logits, float32 [b, height, width, classes]. Maps are fitted to
each other by their sizes, so that images of any, also odd, size will do. Rows that are not
`valid`, bool [b], take no part in the statistics of BatchNorm; at least one must be.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_fractions
from cvjax.errors import InputError
from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.bilinear import resize_bilinear
from cvjax.nn.dense import Dense
from cvjax.nn.fast_conv import fast_conv
from cvjax.nn.space_to_depth import depth_to_space

Maps = Sequence[jax.Array]


class ConvNormRelu(nn.Module):
    """A convolution without bias, BatchNorm, ReLU; keeps height and width.

    Attributes:
      features: channels of the output.
      kernel: height and width of the kernel, odd.
      dilation: pixels from one tap of the kernel to the next ("atrous" where above 1).
      dtype: of the computation; parameters and statistics are float32.
    """

    features: int
    kernel: int = 3
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None) -> jax.Array:
        """Maps [b, h, w, c] to [b, h, w, features]."""
        x = nn.Conv(
            self.features, (self.kernel, self.kernel), kernel_dilation=self.dilation,
            use_bias=False, dtype=self.dtype, conv_general_dilated=fast_conv, name="conv",
        )(x)  # fmt: skip
        norm = BatchNorm(dtype=self.dtype, name="norm")
        return nn.relu(norm(x, train, valid))


class FCN(nn.Module):
    """The fully convolutional network: a linear score at each of the last maps, added up.

    J. Long, E. Shelhamer, T. Darrell: Fully Convolutional Networks for Semantic Segmentation
    (https://arxiv.org/abs/1411.4038), section 4.2. With maps of strides 8, 16 and 32 it is the
    FCN-8s, with one map the FCN-32s.

    Attributes:
      num_classes: length of the logits.
      maps: how many maps are used, counted from the coarsest.
      subpixel: see `Classifier`.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    maps: int = 3
    subpixel: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        maps: Maps,
        size: tuple[int, int],
        *,
        train: bool = False,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits, float32 [b, *size, num_classes]."""
        _check(self, maps)
        coarsest, *finer = reversed(maps[-self.maps :])
        channels = self.subpixel**2 * self.num_classes
        score = Dense(channels, dtype=self.dtype, name="score0")(coarsest)
        for number, x in enumerate(finer, start=1):
            score = resize_bilinear(score, *x.shape[1:3])
            score += Dense(channels, dtype=self.dtype, name=f"score{number}")(x)
        return to_pixels(score, size, self.subpixel)


class UNet(nn.Module):
    """The expanding path of the U-Net: enlarge, join the next finer map, convolve twice.

    O. Ronneberger, P. Fischer, T. Brox: U-Net (https://arxiv.org/abs/1505.04597), section 2, with
    padded convolutions, BatchNorm, and bilinear interpolation in place of the up-convolution.

    Attributes:
      num_classes: length of the logits.
      features: channels of each level, the coarsest first: one for each map but the coarsest.
      subpixel: see `Classifier`.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    features: tuple[int, ...] = (256, 128, 64)
    subpixel: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        maps: Maps,
        size: tuple[int, int],
        *,
        train: bool = False,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits, float32 [b, *size, num_classes]."""
        _check(self, maps)
        x, *finer = reversed(maps)
        if len(self.features) != len(finer):
            raise InputError(
                f"UNet: features is {self.features!r}, but the backbone has {len(maps)} maps: "
                f"there must be {len(finer)}, one for each map but the coarsest"
            )
        for level, (features, skip) in enumerate(zip(self.features, finer, strict=True)):
            x = jnp.concatenate([resize_bilinear(x, *skip.shape[1:3]), skip], axis=-1)
            for number in range(2):
                name = f"level{level}_{number}"
                x = ConvNormRelu(features, dtype=self.dtype, name=name)(x, train, valid)
        return Classifier(self.num_classes, self.subpixel, self.dtype, name="classifier")(x, size)


class DeepLabV3Plus(nn.Module):
    """Atrous spatial pyramid pooling of the coarsest map, then one finer map for the outlines.

    L.-C. Chen et al.: Encoder-Decoder with Atrous Separable Convolution
    (https://arxiv.org/abs/1802.02611), sections 3.1 and 3.2, figure 2, with dense convolutions. The
    `rates` of the paper are for a coarsest map of stride 16; those for a stride of 32 are half.

    Attributes:
      num_classes: length of the logits.
      features: channels of the pyramid and of the decoder.
      rates: dilations of the 3x3 convolutions of the pyramid.
      outline: which map shows the outlines, 0 being the finest; the paper's has stride 4.
      outline_features: its channels, few, so that it does not drown the pyramid.
      dropout: share of the pyramid's channels left out in training, as in the published models.
      subpixel: see `Classifier`.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    features: int = 256
    rates: tuple[int, ...] = (6, 12, 18)
    outline: int = 0
    outline_features: int = 48
    dropout: float = 0.1
    subpixel: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        maps: Maps,
        size: tuple[int, int],
        *,
        train: bool = False,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits, float32 [b, *size, num_classes]. Training needs the rng "dropout"."""
        _check(self, maps)
        if not 0 <= self.outline < len(maps):
            raise InputError(
                f"DeepLabV3Plus: outline is {self.outline}; the maps are 0..{len(maps) - 1}"
            )

        def convolve(x: jax.Array, features: int, name: str, kernel: int = 3, rate: int = 1):
            layer = ConvNormRelu(features, kernel, rate, self.dtype, name=name)
            return layer(x, train, valid)

        x, outline = maps[-1], maps[self.outline]
        branches = [convolve(x, self.features, "aspp_1x1", kernel=1)]
        for number, rate in enumerate(self.rates):
            branches.append(convolve(x, self.features, f"aspp_atrous{number}", rate=rate))
        # One value for the whole image; the mean in float32, as in the backbones.
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        pooled = convolve(pooled, self.features, "aspp_image", kernel=1)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = convolve(jnp.concatenate(branches, axis=-1), self.features, "aspp_join", kernel=1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)

        outline = convolve(outline, self.outline_features, "outline", kernel=1)
        x = jnp.concatenate([resize_bilinear(x, *outline.shape[1:3]), outline], axis=-1)
        x = convolve(convolve(x, self.features, "decoder0"), self.features, "decoder1")
        return Classifier(self.num_classes, self.subpixel, self.dtype, name="classifier")(x, size)


class SegFormer(nn.Module):
    """The all-MLP decoder: each map to the same channels and the finest size, joined by one layer.

    E. Xie et al.: SegFormer (https://arxiv.org/abs/2105.15203), section 3.2, equation 4, with the
    BatchNorm, ReLU and dropout of the published models.

    Attributes:
      num_classes: length of the logits.
      features: channels of each map after its linear layer, and of the joined map.
      dropout: share of the joined map's values left out in training.
      subpixel: see `Classifier`.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    features: int = 256
    dropout: float = 0.1
    subpixel: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        maps: Maps,
        size: tuple[int, int],
        *,
        train: bool = False,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits, float32 [b, *size, num_classes]. Training needs the rng "dropout"."""
        _check(self, maps)
        finest = maps[0].shape[1:3]
        equal = [
            resize_bilinear(Dense(self.features, dtype=self.dtype, name=f"linear{i}")(x), *finest)
            for i, x in enumerate(maps)
        ]
        x = jnp.concatenate(equal, axis=-1)
        x = ConvNormRelu(self.features, 1, dtype=self.dtype, name="join")(x, train, valid)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Classifier(self.num_classes, self.subpixel, self.dtype, name="classifier")(x, size)


class Classifier(nn.Module):
    """The last layer of a head: a linear score of each class, then `to_pixels`.

    Attributes:
      num_classes: length of the logits.
      subpixel: each place of the map scores a square of `subpixel` x `subpixel` pixels, each with
        weights of its own, before what is still missing is interpolated: with the stride of the
        map, nothing is, and thin things stay thin.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    subpixel: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Maps [b, h, w, c] to float32 [b, *size, num_classes]."""
        score = Dense(self.subpixel**2 * self.num_classes, dtype=self.dtype, name="score")(x)
        return to_pixels(score, size, self.subpixel)


def to_pixels(score: jax.Array, size: tuple[int, int], subpixel: int = 1) -> jax.Array:
    """Scores [b, h, w, subpixel^2 * k] of a map -> logits of the image, float32 [b, *size, k].

    The channels of a place become a square of pixels (W. Shi et al., https://arxiv.org/abs/
    1609.05158, equation 4), of which a map that was rounded up has too many at the right and the
    bottom; the rest of the way is interpolated. Raises InputError where there would be whole places
    too many.
    """
    score = depth_to_space(score.astype(jnp.float32), subpixel)
    if any(side >= wanted + subpixel for side, wanted in zip(score.shape[1:3], size, strict=True)):
        raise InputError(
            f"subpixel is {subpixel}, of a map that is {score.shape[1] // subpixel} x "
            f"{score.shape[2] // subpixel} where the image is {size[0]} x {size[1]}; it can be at "
            "most the stride of the map"
        )
    return resize_bilinear(score[:, : size[0], : size[1]], *size)


def _check(head: nn.Module, maps: Maps) -> None:
    """Raises InputError for a head that cannot be."""
    fields = ("num_classes", "features", "subpixel", "maps", "outline_features")
    check_at_least(head, **{field: 1 for field in fields if hasattr(head, field)})
    if getattr(head, "rates", ()):  # there may be none
        check_at_least(head, rates=1)
    if hasattr(head, "dropout"):
        check_fractions(head, "dropout")
    if getattr(head, "maps", 1) > len(maps):
        raise InputError(
            f"{type(head).__name__}: maps is {head.maps}; the backbone has only {len(maps)}"
        )
