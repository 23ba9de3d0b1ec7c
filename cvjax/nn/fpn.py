"""The feature pyramid: maps of a backbone that all know what the coarsest one knows.

T.-Y. Lin, P. Dollar, R. Girshick, K. He, B. Hariharan, S. Belongie: Feature Pyramid Networks for
Object Detection, CVPR 2017 (https://arxiv.org/abs/1612.03144), section 3. The levels beyond the
backbone's are the subsampled last one (their section 4.1), or two strided convolutions (T.-Y. Lin
et al.: Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002, section 4).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices
from cvjax.errors import InputError, nearest
from cvjax.nn.convolution import convolution
from cvjax.nn.train_pass import accepted

EXTRAS = ("pool", "backbone", "pyramid")


def nearest_upsample(x: jax.Array, height: int, width: int) -> jax.Array:
    """[b, h, w, c] -> [b, height, width, c]: pixel i of the result is pixel floor(i h / height).

    As torch's `interpolate(mode="nearest")`. With sizes 2 -> 3 the rows are 0, 0, 1; rounding
    at the pixels' centres, as `jax.image.resize` does, would be another grid.
    """
    rows = jnp.arange(height) * x.shape[1] // height
    columns = jnp.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]


class FPN(nn.Module):
    """The pyramid over some maps of a backbone.

    Attributes:
      features: channels of every level.
      extra: where the levels beyond the backbone's come from: "pool" takes every second pixel of
        the last level; "backbone" convolves the backbone's last map (C5), "pyramid" that map's
        level (P5), with stride 2, and each further one the relu of the one before.
      extra_levels: how many of these there are.
      dtype: of the computation; parameters are float32.
    """

    features: int = 256
    extra: str = "pool"
    extra_levels: int = 0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_choices(self, extra=EXTRAS)
        check_at_least(self, features=1, extra_levels=0)
        super().__post_init__()

    def strides(self, strides: Sequence[int]) -> list[int]:
        """Pixels of the image for one of each level, given those of the maps."""
        return [*strides, *(strides[-1] * 2 ** (i + 1) for i in range(self.extra_levels))]

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Maps [b, h_i, w_i, c_i], finest first, to levels [b, h_i, w_i, features], finest first.

        Each extra level is half as large as the one before it, rounded up.
        """
        uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")

        def conv(kernel: int, stride: int, name: str) -> nn.Conv:
            return convolution(
                self.features,
                kernel,
                stride,
                use_bias=True,
                kernel_init=uniform,
                dtype=self.dtype,
                name=name,
            )

        top, levels = None, []
        for number in reversed(range(len(maps))):
            lateral = conv(1, 1, f"lateral{number + 1}")(maps[number].astype(self.dtype))
            top = lateral if top is None else lateral + nearest_upsample(top, *lateral.shape[1:3])
            levels.insert(0, conv(3, 1, f"output{number + 1}")(top))
        x = maps[-1].astype(self.dtype) if self.extra == "backbone" else levels[-1]
        for number in range(self.extra_levels):
            if self.extra == "pool":
                x = x[:, ::2, ::2]
            else:
                x = conv(3, 2, f"extra{number + 1}")(nn.relu(x) if number else x)
            levels.append(x)
        return levels


class Pyramid(nn.Module):
    """A backbone and the pyramid over some of its maps: an image at several resolutions.

    Attributes:
      backbone: a module with `features(x, *, train) -> {name: [b, h, w, c]}` and `strides`.
      fpn: the pyramid.
      stages: the names of the maps that are used; all of them when there are none.
    """

    backbone: nn.Module
    fpn: FPN
    stages: tuple[str, ...] = ()

    def __post_init__(self):
        for stage in self.stages:
            if stage not in self.backbone.strides:
                raise InputError(
                    f"Pyramid: the backbone has no map {stage!r}"
                    f"{nearest(stage, self.backbone.strides)}"
                )
        super().__post_init__()

    def names(self) -> list[str]:
        """The maps that are used, finest first."""
        strides = self.backbone.strides
        return sorted(self.stages or strides, key=strides.get)

    @property
    def strides(self) -> list[int]:
        """Pixels of the image for one of each level; a level is ceil(size / stride) large."""
        return self.fpn.strides([self.backbone.strides[name] for name in self.names()])

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> list[jax.Array]:
        """The levels [b, ceil(h / stride), ceil(w / stride), features] of images [b, h, w, c].

        `valid`, bool [b], says which rows are real; a backbone that does not take it is not told.
        """
        features = self.backbone.features
        maps = features(x, train=train, **accepted(features, valid=valid))
        return self.fpn([maps[name] for name in self.names()])
