"""RetinaNet: at each place of a pyramid, anchors; for each anchor, a class and a box.

T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar: Focal Loss for Dense Object Detection, ICCV 2017
(https://arxiv.org/abs/1708.02002).
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_fractions
from cvjax.detection.anchors import grid_anchors
from cvjax.detection.assigners import Assignment, max_iou
from cvjax.detection.coders import decode_deltas, encode_deltas
from cvjax.detection.dense import (
    Detections,
    Tower,
    check_anchors,
    flatten,
    level_sizes,
    output_layer,
    select,
)
from cvjax.detection.losses import check_normalizer, normalized, sigmoid_focal


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

    def __post_init__(self):
        check_at_least(self, num_classes=1, anchors=1)
        super().__post_init__()

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
      positive, negative: an anchor is positive from this IoU on (or if no other anchor overlaps
        some box more), negative below that, and counts nowhere between.
      assign: another rule for that, called as `cvjax.detection.assigners.atss`: with the anchors,
        boxes, valid and the number of anchors of each level.
      normalizer: of the losses, see `cvjax.detection.losses.normalized`.
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
    assign: Callable[..., Assignment] | None = None
    normalizer: str = "image"
    candidates: int = 1000
    score: float = 0.05
    iou: float = 0.5
    outputs: int = 100

    def __post_init__(self):
        check_at_least(self, octaves=1)
        check_fractions(self, "positive", "negative")
        check_normalizer(self.normalizer)
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

        Raises:
          InputError: the head has another number of anchors.
        """
        anchors = self._anchors_of(outputs["logits"], size)
        places = [h * w for h, w in level_sizes(size, self.encoder.strides)]
        sizes = [count * len(self.ratios) * self.octaves for count in places]

        def assign(boxes: jax.Array, valid: jax.Array) -> Assignment:
            if self.assign is not None:
                return self.assign(anchors, boxes, valid, sizes)
            return max_iou(
                anchors, boxes, valid,
                foreground=self.positive, background=self.negative, low_quality=True,
            )  # fmt: skip

        def of_image(logits, deltas, boxes, labels, valid):
            assigned = assign(boxes, valid)
            positive = assigned.foreground[:, None]
            target = jax.nn.one_hot(labels[assigned.index], logits.shape[-1]) * positive
            # An anchor that has no box is its own: its step is zero, and its gradient finite.
            boxes = jnp.where(positive, boxes[assigned.index], anchors)
            steps = jnp.abs(deltas - encode_deltas(boxes, anchors))
            return sigmoid_focal(logits, target), steps, assigned

        focal, steps, assigned = jax.vmap(of_image)(
            outputs["logits"], outputs["deltas"], truth["boxes"], truth["box_label"],
            truth["box_valid"],
        )  # fmt: skip
        positive = assigned.foreground
        return {
            name: normalized(
                losses, weights[..., None], positive, truth["valid"], by=self.normalizer
            )
            for name, losses, weights in (
                ("classification", focal, assigned.weight), ("box", steps, positive)
            )
        }  # fmt: skip

    def detections(self, outputs: dict[str, jax.Array], size: tuple[int, int]) -> Detections:
        """The objects that are found: boxes, scores, labels, detected, [b, outputs, ...]."""
        anchors = self._anchors_of(outputs["logits"], size)

        def of_image(logits: jax.Array, deltas: jax.Array) -> Detections:
            return select(
                decode_deltas(deltas, anchors), jax.nn.sigmoid(logits), size=size,
                candidates=self.candidates, score=self.score, iou=self.iou, outputs=self.outputs,
            )  # fmt: skip

        return jax.vmap(of_image)(outputs["logits"], outputs["deltas"])

    def _anchors_of(self, logits: jax.Array, size: tuple[int, int]) -> jax.Array:
        anchors = self.anchors(size)
        check_anchors("RetinaNet", logits, len(anchors), len(self.ratios) * self.octaves)
        return anchors
