"""The keypoint head: for each box and each point of it a heat map, which is one-hot in truth.

K. He, G. Gkioxari, P. Dollar, R. Girshick: Mask R-CNN, ICCV 2017 (https://arxiv.org/abs/1703.06870),
section 5; where a point lies in its map and what it is read from are the rules of its code,
Detectron.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least
from cvjax.detection.deconvolution import Deconvolution
from cvjax.detection.dense import Detections
from cvjax.detection.sampling import Samples
from cvjax.errors import InputError
from cvjax.nn.bicubic import cubic_weight
from cvjax.nn.bilinear import resize_bilinear
from cvjax.nn.convolution import convolution


class KeypointHead(nn.Module):
    """Convolutions, one of them transposed, and twice the size by bilinear interpolation.

    Attributes:
      keypoints: of an object.
      features: channels of the convolutions.
      depth: the number of 3x3 convolutions.
      size: height and width of the features that it reads; its maps are four times as large.
      detail: samples of the image itself along each side of a cell, which the head sees beside the
        features, see `cvjax.detection.rcnn.pixels_of`; 0, as published, for none.
      dtype: of the computation; parameters are float32.
    """

    keypoints: int = 17
    features: int = 512
    depth: int = 8
    size: int = 14
    detail: int = 0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, keypoints=1, features=1, depth=0, size=1, detail=0)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[p, size, size, c] -> logits, float32 [p, 4 size, 4 size, keypoints]."""
        for number in range(self.depth):
            conv = convolution(
                self.features, 3, use_bias=True, dtype=self.dtype, name=f"conv_fcn{number + 1}"
            )
            x = nn.relu(conv(x.astype(self.dtype)))
        init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
        x = Deconvolution(self.keypoints, 4, init, dtype=self.dtype, name="kps_score_lowres")(x)
        x = x.astype(jnp.float32)
        return resize_bilinear(x, 2 * x.shape[1], 2 * x.shape[2])

    def losses(
        self, outputs: jax.Array, samples: Samples, truth: dict[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Of one image: `keypoints`, a sum over points of the foreground and the number of these.

        The cross-entropy over all places of the map. What counts are the points that are visible or
        hidden, not those that were not annotated, within the box. `truth` has "keypoints", float32
        [n, k, 3], x, y in pixels and visibility.

        Raises:
          InputError: it has none, or another number of them.
        """
        count = truth["keypoints"].shape[-2] if "keypoints" in truth else "no"
        if count != self.keypoints:
            raise InputError(f"KeypointHead: keypoints={self.keypoints}, the batch has {count}")
        side = outputs.shape[1]
        place, counts = heat_map_place(truth["keypoints"][samples.index], samples.boxes, side)
        counts &= samples.foreground[:, None]
        log_p = jax.nn.log_softmax(_flat(outputs))
        entropy = -jnp.take_along_axis(log_p, place[..., None], 2)[..., 0]
        return {"keypoints": (jnp.sum(jnp.where(counts, entropy, 0.0)), jnp.sum(counts))}

    def detections(
        self, outputs: jax.Array, found: Detections, size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """Of one image: "keypoints", float32 [m, k, 3]; 0 where nothing was detected.

        x, y in pixels, and the probability of the most probable place of the map.
        """
        points = peaks(outputs, found["boxes"], size)
        sure = jnp.max(jax.nn.softmax(_flat(outputs)), -1)
        points = jnp.concatenate([points, sure[..., None]], -1)
        return {"keypoints": jnp.where(found["detected"][:, None, None], points, 0.0)}


def _flat(maps: jax.Array) -> jax.Array:
    """[p, h, w, k] -> [p, k, h * w]."""
    return jnp.moveaxis(maps, -1, 1).reshape(len(maps), maps.shape[-1], -1)


def heat_map_place(
    keypoints: jax.Array, boxes: jax.Array, side: int
) -> tuple[jax.Array, jax.Array]:
    """Which of side * side places each point has, row by row: int32 [p, k]; and bool, if it has.

    The box is cut into cells; a point is in the one that contains it. A point on the right or lower
    border is in the last one. Beside the box it has none, nor if its visibility is 0.

    Args:
      keypoints: [p, k, 3], x, y and visibility.
      boxes: [p, 4].
      side: of the map.
    """
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    extent = high - low
    points = keypoints[..., :2]
    cell = jnp.floor((points - low) * side / jnp.where(extent > 0, extent, 1.0))
    cell = jnp.where(points == high, side - 1, cell)
    inside = jnp.all((cell >= 0) & (cell < side) & (extent > 0), -1) & (keypoints[..., 2] > 0)
    cell = jnp.where(inside[..., None], cell, 0).astype(jnp.int32)
    return cell[..., 1] * side + cell[..., 0], inside


def peaks(maps: jax.Array, boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Where the maps [m, s, s, k] over boxes [m, 4] are highest: float32 [m, k, 2], x, y in pixels.

    A map is interpolated to one value for each pixel of the box, whose sides are first rounded up,
    and at least 1; the middle of the highest pixel, of equal ones the upper left, is the point, in
    the proportions of the true box. The kernel is that of `cvjax.nn.bicubic`.

    Args:
      maps: float32.
      boxes: xyxy in pixels, in the image.
      size: height and width of the image.
    """
    cells = maps.shape[1]

    def along(extent: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights [length, s], which pixels there are [length], and their number."""
        count = jnp.ceil(jnp.maximum(extent, 1.0))
        pixel = jnp.arange(length)
        place = (pixel + 0.5) * cells / count - 0.5
        first = jnp.floor(place)
        weights = jnp.zeros((length, cells))
        for tap in (-1, 0, 1, 2):
            weight = cubic_weight(jnp.abs(place - first - tap))
            index = jnp.clip(first + tap, 0, cells - 1)
            weights += jnp.where(jnp.arange(cells) == index[:, None], weight[:, None], 0.0)
        return weights, pixel < count, count

    def of_box(maps: jax.Array, box: jax.Array) -> jax.Array:
        extent = jnp.maximum(box[2:] - box[:2], 1.0)
        rows, is_row, high = along(extent[1], size[0])
        columns, is_column, wide = along(extent[0], size[1])
        values = jnp.einsum("ya,xb,abk->kyx", rows, columns, maps, precision="highest")
        values = jnp.where(is_row[:, None] & is_column, values, -jnp.inf)
        best = jnp.argmax(values.reshape(len(values), -1), -1)
        pixel = jnp.stack([best % size[1], best // size[1]], -1)
        return box[:2] + (pixel + 0.5) * extent / jnp.stack([wide, high])

    boxes = jnp.asarray(boxes, jnp.float32)
    return jax.lax.map(lambda one: of_box(*one), (maps, boxes))
