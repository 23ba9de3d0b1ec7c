"""The maps of any backbone, as heads of segmenters and of several tasks read them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least
from cvjax.nn.space_to_depth import space_to_depth
from cvjax.nn.train_pass import accepted


def ordered_features(
    backbone: nn.Module, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
) -> list[jax.Array]:
    """The maps [b, h_i, w_i, c_i] of images [b, h, w, c] in the order of their strides.

    The finest comes first, and of equal strides the one named first. `valid`, bool [b], says which
    rows are real; a backbone whose `features` does not take it is not told.
    """
    maps = backbone.features(x, train=train, **accepted(backbone.features, valid=valid))
    return [maps[name] for name in sorted(backbone.strides, key=backbone.strides.get)]


class Patches(nn.Module):
    """A backbone that sees squares of pixels, stacked as channels, in place of pixels.

    Nothing of the image is lost, all strides are `patch` times as large, and the maps cost so much
    less. Zeros fill up the last squares of an image whose sides are no multiples of `patch`.

    Attributes:
      backbone: a module with `features` and `strides`.
      patch: height and width of a square.
    """

    backbone: nn.Module
    patch: int = 2

    def __post_init__(self):
        check_at_least(self, patch=1)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map."""
        return {name: self.patch * stride for name, stride in self.backbone.strides.items()}

    @nn.compact
    def features(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The maps of the backbone, by their names."""
        height, width = (-side % self.patch for side in x.shape[1:3])
        x = space_to_depth(jnp.pad(x, ((0, 0), (0, height), (0, width), (0, 0))), self.patch)
        features = self.backbone.features
        return features(x, train=train, **accepted(features, valid=valid))
