"""RetinaNet: at each place of a pyramid, anchors; for each anchor, a class and a box.

T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar: Focal Loss for Dense Object Detection, ICCV 2017
(https://arxiv.org/abs/1708.02002).
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.detection.anchors import grid_anchors
from cvjax.detection.boxes import iou
from cvjax.detection.coders import decode_deltas, encode_deltas
from cvjax.detection.dense import (
    Detections,
    Tower,
    check_normalizer,
    flatten,
    level_sizes,
    normalize,
    output_layer,
    select,
)
from cvjax.detection.losses import sigmoid_focal


class RetinaNetHead(nn.Module):
    """Two towers, for classes and for boxes, the same at all levels.

    Attributes:
      num_classes: length of the logits.
      anchors: how many there are at one place.
      features, depth, groups: of the towers (`cvjax.detection.dense.Tower`).
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    anchors: int = 9
    features: int = 256
    depth: int = 4
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """Levels [b, h_i, w_i, c] -> "logits" [b, a, classes] and "deltas" [b, a, 4], float32."""
        towers = [
            Tower(self.features, self.depth, self.groups, self.dtype, name=f"{name}_tower")
            for name in ("class", "box")
        ]
        classes = output_layer(
            self.anchors * self.num_classes, prior=True, dtype=self.dtype, name="logits"
        )
        deltas = output_layer(self.anchors * 4, dtype=self.dtype, name="deltas")
        return {
            "logits": flatten([classes(towers[0](x)) for x in levels], self.num_classes),
            "deltas": flatten([deltas(towers[1](x)) for x in levels], 4),
        }


class RetinaNet(nn.Module):
    """The detector.

    Attributes:
      encoder: a module with `__call__(x, *, train, valid) -> levels` and `strides`, for example
        `cvjax.nn.fpn.Pyramid`.
      head: levels to "logits" and "deltas" of all anchors, as `RetinaNetHead`, with
        len(ratios) * octaves anchors.
      scale: side of the smallest square anchor, in strides of its level.
      octaves: how many sizes of anchors there are within a factor of two.
      ratios: height / width of the anchors.
      offset: of the anchors' centres, in strides: 0.5 is the middle of a cell; torchvision has 0.
      rounded: the anchors' corners are whole pixels around their centres, and so were the sides of
        the square ones before they got their ratio, as in torchvision.
      positive, negative: an anchor is positive from this IoU on, negative below that.
      normalizer: of the losses, see `cvjax.detection.dense.normalize`.
      candidates, score, iou, outputs: of the selection, see `cvjax.detection.dense.select`.
    """

    encoder: nn.Module
    head: nn.Module
    scale: float = 4.0
    octaves: int = 3
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    offset: float = 0.5
    rounded: bool = False
    positive: float = 0.5
    negative: float = 0.4
    normalizer: str = "image"
    candidates: int = 1000
    score: float = 0.05
    iou: float = 0.5
    outputs: int = 100

    def __post_init__(self):
        check_normalizer("RetinaNet", self.normalizer)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns logits [b, a, classes] and deltas [b, a, 4] of images [b, h, w, c]."""
        return self.head(self.encoder(x, train=train, valid=valid))

    def anchors(self, size: tuple[int, int]) -> jax.Array:
        """The anchors of an image of some height and width, [a, 4]."""
        strides = self.encoder.strides
        levels = []
        for (height, width), stride in zip(level_sizes(size, strides), strides, strict=True):
            sides = [self.scale * stride * 2 ** (i / self.octaves) for i in range(self.octaves)]
            if self.rounded:
                sides = [math.floor(side) for side in sides]
            levels.append(
                grid_anchors(
                    height,
                    width,
                    stride,
                    sides,
                    self.ratios,
                    offset=self.offset,
                    rounded=self.rounded,
                )
            )
        return jnp.concatenate(levels)

    def losses(
        self, outputs: dict[str, jax.Array], truth: dict[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """`classification`, the focal loss, and `box`, the L1 loss of the steps from the anchors.

        `truth` is "boxes" [b, n, 4], "box_label" int [b, n], "box_valid" bool [b, n] and "valid"
        bool [b]; what is not valid is finite.
        """
        anchors = self.anchors(size)

        def of_image(logits, deltas, boxes, labels, valid):
            matched, is_positive, is_negative = match(
                boxes, valid, anchors, self.positive, self.negative
            )
            target = jax.nn.one_hot(labels[matched], logits.shape[-1]) * is_positive[:, None]
            focal = sigmoid_focal(logits, target)
            counts = (is_positive | is_negative)[:, None]
            # An anchor that has no box is its own: its step is zero, and its gradient finite.
            boxes = jnp.where(is_positive[:, None], boxes[matched], anchors)
            steps = jnp.abs(deltas - encode_deltas(boxes, anchors))
            return (
                jnp.sum(jnp.where(counts, focal, 0.0)),
                jnp.sum(jnp.where(is_positive[:, None], steps, 0.0)),
                jnp.sum(is_positive),
            )

        classification, box, positives = jax.vmap(of_image)(
            outputs["logits"], outputs["deltas"], truth["boxes"], truth["box_label"],
            truth["box_valid"],
        )  # fmt: skip
        return {
            name: normalize(sums, positives, truth["valid"], self.normalizer)
            for name, sums in {"classification": classification, "box": box}.items()
        }

    def detections(self, outputs: dict[str, jax.Array], size: tuple[int, int]) -> Detections:
        """The objects that are found: boxes, scores, labels, detected, [b, outputs, ...]."""
        anchors = self.anchors(size)

        def of_image(logits: jax.Array, deltas: jax.Array) -> Detections:
            return select(
                decode_deltas(deltas, anchors), jax.nn.sigmoid(logits), size=size,
                candidates=self.candidates, score=self.score, iou=self.iou, outputs=self.outputs,
            )  # fmt: skip

        return jax.vmap(of_image)(outputs["logits"], outputs["deltas"])


def match(
    boxes: jax.Array,
    valid: jax.Array,
    anchors: jax.Array,
    positive: float,
    negative: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which box each anchor shall find: the one with the largest IoU.

    An anchor is positive from the IoU `positive` on, and also when no other anchor overlaps some
    box more than it does (S. Ren et al., https://arxiv.org/abs/1506.01497, section 3.1.2), negative
    below `negative`, else it counts nowhere.

    Args:
      boxes: [n, 4], n >= 1.
      valid: bool [n]; a row that is not valid must be finite.
      anchors: [a, 4].
      positive, negative: thresholds of the IoU.

    Returns:
      matched: int32 [a], rows of `boxes`; is_positive: bool [a]; is_negative: bool [a].
    """
    overlaps = jnp.where(valid[:, None], iou(boxes, anchors), -1.0)
    matched, best = jnp.argmax(overlaps, axis=0), jnp.max(overlaps, axis=0)
    best_of_box = jnp.max(overlaps, axis=1, keepdims=True)
    is_best = jnp.any((overlaps == best_of_box) & (best_of_box > 0), axis=0)
    is_positive = (best >= positive) | is_best
    return matched.astype(jnp.int32), is_positive, (best < negative) & ~is_positive
