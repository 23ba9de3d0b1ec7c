"""A segmentation network: any backbone and a head."""

import flax.linen as nn
import jax

from cvjax.nn.features import ordered_features


class Segmenter(nn.Module):
    """The maps of a backbone, read by a head.

    Attributes:
      backbone: a module with `features(x, *, train) -> {name: [b, h, w, c]}` and `strides`,
        {name: pixels of the image for one of the map}. If `features` also takes `valid` it is told
        which rows are real.
      head: see `cvjax.segmentation.heads`.
    """

    backbone: nn.Module
    head: nn.Module

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
        maps = ordered_features(self.backbone, x, train=train, valid=valid)
        return self.head(maps, x.shape[1:3], train=train, valid=valid)
