"""A segmentation network: any backbone and a head."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.nn.unet import space_to_depth


class Segmenter(nn.Module):
    """The maps of a backbone, read by a head.

    Attributes:
      backbone: a module with `features(x, *, train) -> {name: [b, h, w, c]}` and `strides`,
        {name: pixels of the image for one of the map}. If `features` also takes `valid` it is told
        which rows are real.
      head: see `cvjax.segmentation.heads`.
      patch: the backbone sees squares of `patch` x `patch` pixels, stacked as channels: all strides
        are `patch` times as large and nothing of the image is lost. Zeros fill up the last squares.
    """

    backbone: nn.Module
    head: nn.Module
    patch: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits, float32 [b, h, w, classes], of images [b, h, w, c], normalized.

        Args:
          x: the images, of any height and width.
          train: normalize by this batch's statistics; dropout draws from the stream "dropout".
          valid: bool [b]: the statistics are those of these rows; at least one must be True.
        """
        strides = self.backbone.strides
        takes_valid = "valid" in inspect.signature(self.backbone.features).parameters
        size, missing = x.shape[1:3], [(0, -side % self.patch) for side in x.shape[1:3]]
        x = space_to_depth(jnp.pad(x, [(0, 0), *missing, (0, 0)]), self.patch)
        maps = self.backbone.features(x, train=train, **({"valid": valid} if takes_valid else {}))
        in_order = [maps[name] for name in sorted(strides, key=strides.get)]
        return self.head(in_order, size, train=train, valid=valid)
