"""The mask head: for each box the shape in it, as a small grid that is then laid over the image.

K. He, G. Gkioxari, P. Dollar, R. Girshick: Mask R-CNN, ICCV 2017 (https://arxiv.org/abs/1703.06870),
section 3 and figure 4.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_fractions, check_positive
from cvjax.detection.deconvolution import Deconvolution
from cvjax.detection.dense import Detections
from cvjax.detection.losses import binary_cross_entropy
from cvjax.detection.sampling import Samples
from cvjax.errors import InputError
from cvjax.nn.convolution import convolution

_CHUNK = 16  # masks of the size of the image that are float32 at once


class MaskHead(nn.Module):
    """Convolutions, one of them transposed, and a mask of each class.

    The first mask is that of the background, as published weights have it, and never used; class i
    of the labels is mask i + 1.

    Attributes:
      num_classes: of objects.
      features: channels of all layers.
      depth: the number of 3x3 convolutions.
      size: height and width of the features that it reads; those of its masks are twice as large.
      detail: samples of the image itself along each side of a cell, which the head sees beside the
        features, see `cvjax.detection.rcnn.pixels_of`; 0, as published, for none. With 2 they are
        as fine as its masks.
      threshold: a pixel belongs to the object from this probability on.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    features: int = 256
    depth: int = 4
    size: int = 14
    detail: int = 0
    threshold: float = 0.5
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, num_classes=1, features=1, depth=0, size=1, detail=0)
        check_fractions(self, "threshold")
        check_positive(**{"MaskHead: threshold": self.threshold})
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[p, size, size, c] -> logits, float32 [p, 2 size, 2 size, classes + 1]."""
        for number in range(self.depth):
            conv = convolution(
                self.features, 3, use_bias=True, dtype=self.dtype, name=f"mask_fcn{number + 1}"
            )
            x = nn.relu(conv(x.astype(self.dtype)))
        init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
        x = nn.relu(Deconvolution(self.features, 2, init, dtype=self.dtype, name="conv5_mask")(x))
        logits = convolution(
            self.num_classes + 1, 1, use_bias=True, kernel_init=nn.initializers.normal(0.001),
            dtype=self.dtype, name="mask_fcn_logits",
        )  # fmt: skip
        return logits(x).astype(jnp.float32)

    def losses(
        self, outputs: jax.Array, samples: Samples, truth: dict[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Of one image: `mask`, a sum over the foreground and the number of that.

        The mean binary cross-entropy of the mask of the true class. `truth` has "masks", bool
        [n, h, w].

        Raises:
          InputError: it has none.
        """
        if "masks" not in truth:
            raise InputError("MaskHead: the batch has no masks; the data must give them")
        label = truth["box_label"][samples.index] + 1
        logits = jnp.take_along_axis(outputs, label[:, None, None, None], 3)[..., 0]
        target = crop_masks(truth["masks"], samples.index, samples.boxes, logits.shape[1])
        entropy = jnp.mean(binary_cross_entropy(logits, target >= 0.5), axis=(1, 2))
        foreground = samples.foreground
        return {"mask": (jnp.sum(jnp.where(foreground, entropy, 0.0)), jnp.sum(foreground))}

    def detections(
        self, outputs: jax.Array, found: Detections, size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """Of one image: "masks", bool [m, height, width]; False where nothing was detected."""
        label = found["labels"] + 1
        logits = jnp.take_along_axis(outputs, label[:, None, None, None], 3)[..., 0]
        masks = paste_masks(jax.nn.sigmoid(logits), found["boxes"], size, self.threshold)
        return {"masks": masks & found["detected"][:, None, None]}


def crop_masks(masks: jax.Array, index: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """How much of each cell of a grid over a box is covered: float32 [p, size, size] in 0..1.

    Exact: a pixel is the square from i to i + 1. What is outside of the image is not covered, nor
    is any cell of a box without area.

    Args:
      masks: bool [n, h, w].
      index: int [p], which of the masks.
      boxes: [p, 4], xyxy in pixels.
      size: cells along each side.
    """
    masks, boxes = jnp.asarray(masks, bool), jnp.asarray(boxes, jnp.float32)

    def along(start: jax.Array, end: jax.Array, length: int) -> jax.Array:
        """The share of each cell that lies in each pixel, [size, length]."""
        step = (end - start) / size
        low = (start + step * jnp.arange(size))[:, None]
        pixel = jnp.arange(length)
        both = jnp.minimum(low + step, pixel + 1) - jnp.maximum(low, pixel)
        return jnp.maximum(both, 0.0) / jnp.where(step > 0, step, 1.0)

    def of_box(index: jax.Array, box: jax.Array) -> jax.Array:
        rows = along(box[1], box[3], masks.shape[1])
        columns = along(box[0], box[2], masks.shape[2])
        mask = masks[index].astype(jnp.float32)
        return jnp.einsum("ay,yx,bx->ab", rows, mask, columns, precision="highest")

    return jax.lax.map(lambda one: of_box(*one), (index, boxes), batch_size=_CHUNK)


def paste_masks(
    masks: jax.Array, boxes: jax.Array, size: tuple[int, int], threshold: float
) -> jax.Array:
    """The pixels whose centre has at least this value in the grid over a box: bool [m, h, w].

    A value stands in the middle of its cell; between those they are interpolated bilinearly, and
    all around the grid stand zeros. Half a cell outside of the box, and where the box has no area,
    the value is 0.

    Args:
      masks: float32 [m, s, s].
      boxes: [m, 4], xyxy in pixels.
      size: height and width of the image.
      threshold: above 0.
    """
    cells = masks.shape[-1]

    def along(start: jax.Array, end: jax.Array, length: int) -> jax.Array:
        """What each value counts in each pixel, [length, s]."""
        step = (end - start) / cells
        place = (jnp.arange(length) + 0.5 - start) / jnp.where(step > 0, step, 1.0) - 0.5
        weight = jnp.maximum(1 - jnp.abs(place[:, None] - jnp.arange(cells)), 0.0)
        return jnp.where(step > 0, weight, 0.0)

    def of_box(mask: jax.Array, box: jax.Array) -> jax.Array:
        rows, columns = along(box[1], box[3], size[0]), along(box[0], box[2], size[1])
        value = jnp.einsum("ya,ab,xb->yx", rows, mask, columns, precision="highest")
        return value >= threshold

    boxes = jnp.asarray(boxes, jnp.float32)
    return jax.lax.map(lambda one: of_box(*one), (masks, boxes), batch_size=_CHUNK)
