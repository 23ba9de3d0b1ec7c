"""FCOS: at each place of a pyramid, a class, the distances to a box's sides, and its centerness.

Z. Tian, C. Shen, H. Chen, T. He: FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019
(https://arxiv.org/abs/1904.01355), with the sampling near centres, the generalized IoU and the
centerness beside the boxes of its later version (https://arxiv.org/abs/2006.09214).
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices, check_positive
from cvjax.detection import assigners
from cvjax.detection.anchors import grid_points
from cvjax.detection.coders import MAX_LOG_SCALE, decode_distances, encode_distances
from cvjax.detection.dense import (
    Detections,
    Tower,
    flatten,
    level_sizes,
    output_layer,
    select,
)
from cvjax.detection.losses import (
    binary_cross_entropy,
    centerness,
    check_normalizer,
    giou_loss,
    normalized,
    sigmoid_focal,
)

DISTANCES = ("exp", "relu")


class FCOSHead(nn.Module):
    """Two towers, for classes and for boxes, the same at all levels but for a scale at each.

    Attributes:
      num_classes: length of the logits.
      features, depth, groups: of the towers (`cvjax.detection.dense.Tower`).
      scales: the distances of each level have a factor of their own; torchvision's have none.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    features: int = 256
    depth: int = 4
    groups: int = 32
    scales: bool = True
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, num_classes=1)
        super().__post_init__()

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """Levels [b, h_i, w_i, c] -> arrays of all p places, float32.

        "logits" [b, p, classes]; "distances" [b, p, 4], left, up, right and down, of which
        `boxes_of` makes boxes; and "centerness" [b, p, 1], a logit.
        """
        towers = [
            Tower(self.features, self.depth, self.groups, self.dtype, name=f"{name}_tower")
            for name in ("class", "box")
        ]
        classes = output_layer(self.num_classes, prior=True, dtype=self.dtype, name="logits")
        distances = output_layer(4, dtype=self.dtype, name="distances")
        centerness = output_layer(1, dtype=self.dtype, name="centerness")
        outputs = {"logits": [], "distances": [], "centerness": []}
        for number, x in enumerate(levels, start=1):
            scale = self.param(f"scale{number}", nn.initializers.ones, ()) if self.scales else 1.0
            box = towers[1](x)
            outputs["logits"].append(classes(towers[0](x)))
            outputs["distances"].append(scale * distances(box).astype(jnp.float32))
            outputs["centerness"].append(centerness(box))
        channels = {"logits": self.num_classes, "distances": 4, "centerness": 1}
        return {name: flatten(maps, channels[name]) for name, maps in outputs.items()}


class FCOS(nn.Module):
    """The detector.

    Attributes:
      encoder: a module with `__call__(x, *, train, valid) -> levels` and `strides`, for example
        `cvjax.nn.fpn.Pyramid`.
      head: levels to "logits", "distances" and "centerness" of all places, as `FCOSHead`.
      reach: a level with stride s is for boxes whose farthest side, seen from the place, is
        from reach * s / 2 to reach * s pixels away; the first level is also for smaller ones
        and the last for larger ones. The paper has 8.
      offset: of the places, in strides: 0.5 is the middle of a cell; torchvision has 0.
      distances: what the head says of them in strides, "exp": their logarithm, as in the first
        paper, or "relu": themselves, and 0 where it is negative, as in the later and torchvision.
      radius: only places this near to the box's centre, in strides along both axes, are positive.
      normalizer: of the losses, see `cvjax.detection.losses.normalized`.
      candidates, score, iou, outputs: of the selection, see `cvjax.detection.dense.select`.
    """

    encoder: nn.Module
    head: nn.Module
    reach: float = 8.0
    offset: float = 0.5
    distances: str = "exp"
    radius: float = 1.5
    normalizer: str = "batch"
    candidates: int = 1000
    score: float = 0.05
    iou: float = 0.6
    outputs: int = 100

    def __post_init__(self):
        check_at_least(self, reach=0)
        check_positive(**{"FCOS: radius": self.radius})
        check_normalizer(self.normalizer)
        check_choices(self, distances=DISTANCES)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns what the head says of images [b, h, w, c]."""
        return self.head(self.encoder(x, train=train, valid=valid))

    def places(self, size: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All places of an image of some height and width.

        Returns:
          Their centres, x and y in pixels [p, 2]; their strides [p, 1]; and the least and the
          largest distance to the farthest side that is theirs, in pixels [p, 2].
        """
        strides = self.encoder.strides
        points, steps, ranges = [], [], []
        for number, (height, width) in enumerate(level_sizes(size, strides)):
            stride = strides[number]
            low = self.reach * strides[number - 1] if number else 0.0
            high = self.reach * stride if number + 1 < len(strides) else math.inf
            points.append(grid_points(height, width, stride, offset=self.offset))
            steps.append(np.full((height * width, 1), stride))
            ranges.append(np.full((height * width, 2), (low, high)))
        return tuple(jnp.concatenate(one).astype(jnp.float32) for one in (points, steps, ranges))

    def losses(
        self, outputs: dict[str, jax.Array], truth: dict[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """`classification` (focal), `box` (1 - generalized IoU) and `centerness` (cross-entropy).

        `truth` is "boxes" [b, n, 4], "box_label" int [b, n], "box_valid" bool [b, n] and "valid"
        bool [b]; what is not valid is finite.
        """
        points, strides, ranges = self.places(size)

        def of_image(outputs, boxes, labels, valid):
            assigned = assigners.fcos(
                points, boxes, valid, ranges, strides[:, 0], radius=self.radius
            )
            positive, logits = assigned.foreground[:, None], outputs["logits"]
            target = jax.nn.one_hot(labels[assigned.index], logits.shape[-1]) * positive
            # A place without a box has one of its own, so that its gradient is finite.
            own = jnp.concatenate([points - strides, points + strides], axis=-1)
            boxes = jnp.where(positive, boxes[assigned.index], own)
            found = boxes_of(outputs["distances"], points, strides, self.distances)
            found = jnp.where(positive, found, own)
            center = centerness(encode_distances(boxes, points))
            losses = {
                "classification": sigmoid_focal(logits, target),
                "box": giou_loss(found, boxes)[:, None],
                "centerness": binary_cross_entropy(outputs["centerness"], center[:, None]),
            }
            return losses, assigned

        losses, assigned = jax.vmap(of_image)(
            outputs, truth["boxes"], truth["box_label"], truth["box_valid"]
        )
        positive = assigned.foreground
        return {
            name: normalized(
                one, (assigned.weight if name == "classification" else positive)[..., None],
                positive, truth["valid"], by=self.normalizer,
            )
            for name, one in losses.items()
        }  # fmt: skip

    def detections(self, outputs: dict[str, jax.Array], size: tuple[int, int]) -> Detections:
        """The objects that are found: boxes, scores, labels, detected, [b, outputs, ...].

        The score is the geometric mean of the class's probability and the centerness.
        """
        points, strides, _ = self.places(size)

        def of_image(outputs: dict[str, jax.Array]) -> Detections:
            probability = jax.nn.sigmoid(outputs["logits"]) * jax.nn.sigmoid(outputs["centerness"])
            return select(
                boxes_of(outputs["distances"], points, strides, self.distances),
                jnp.sqrt(probability), size=size, candidates=self.candidates, score=self.score,
                iou=self.iou, outputs=self.outputs,
            )  # fmt: skip

        return jax.vmap(of_image)(outputs)


def boxes_of(
    distances: jax.Array, points: jax.Array, strides: jax.Array, form: str = "exp"
) -> jax.Array:
    """Boxes [p, 4] from what is said of their distances [p, 4]; `form` is that of `FCOS`.

    The exponential is at most 1000 / 16, as that of deltas: exp(100) is no number.
    """
    if form == "exp":
        distances = jnp.exp(jnp.minimum(distances, MAX_LOG_SCALE))
    else:
        distances = nn.relu(distances)
    return decode_distances(distances, points, strides)
