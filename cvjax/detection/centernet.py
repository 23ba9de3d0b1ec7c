"""CenterNet: an object is a peak of its class's heat map, with a size beside it.

X. Zhou, D. Wang, P. Kraehenbuehl: Objects as Points (https://arxiv.org/abs/1904.07850). The spread
of a peak is that of H. Law, J. Deng: CornerNet (https://arxiv.org/abs/1808.01244), section 3.2.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.detection.boxes import clip
from cvjax.detection.dense import (
    Detections,
    Tower,
    check_normalizer,
    level_sizes,
    normalize,
    output_layer,
    select,
)


class CenterNetHead(nn.Module):
    """A tower on the finest level, and what stands at each of its places.

    Attributes:
      num_classes: the number of heat maps.
      features, depth, groups: of the tower (`cvjax.detection.dense.Tower`).
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    features: int = 64
    depth: int = 1
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """Levels, finest first -> maps of the finest, float32.

        "heat" [b, h, w, classes], logits; "size" [b, h, w, 2], width and height, and "offset"
        [b, h, w, 2], x and y of the centre from the corner of its cell, all in strides.
        """
        x = Tower(self.features, self.depth, self.groups, self.dtype, name="tower")(levels[0])
        maps = {
            "heat": output_layer(self.num_classes, prior=True, dtype=self.dtype, name="heat")(x),
            "size": output_layer(2, dtype=self.dtype, name="size")(x),
            "offset": output_layer(2, dtype=self.dtype, name="offset")(x),
        }
        return {name: value.astype(jnp.float32) for name, value in maps.items()}


class CenterNet(nn.Module):
    """The detector.

    Attributes:
      encoder: a module with `__call__(x, *, train, valid) -> levels` and `strides`, for example
        `cvjax.nn.fpn.Pyramid`.
      head: the levels to "heat", "size" and "offset" of the first, as `CenterNetHead`.
      overlap: a box whose corners are both moved within the spread of a peak has still this IoU
        with the true one.
      normalizer: of the losses, see `cvjax.detection.dense.normalize`; positives are objects.
      candidates, score, outputs: of the selection, see `cvjax.detection.dense.select`.
    """

    encoder: nn.Module
    head: nn.Module
    overlap: float = 0.7
    normalizer: str = "batch"
    candidates: int = 100
    score: float = 0.05
    outputs: int = 100

    def __post_init__(self):
        check_normalizer("CenterNet", self.normalizer)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns what the head says of images [b, h, w, c]."""
        return self.head(self.encoder(x, train=train, valid=valid))

    def losses(
        self, outputs: dict[str, jax.Array], truth: dict[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """`heat` (equation 1), `offset` (2) and `size` (3); the paper weights the last with 0.1.

        `truth` is "boxes" [b, n, 4], "box_label" int [b, n], "box_valid" bool [b, n] and "valid"
        bool [b]; what is not valid is finite. Boxes count as far as they lie in the image.
        """
        stride = self.encoder.strides[0]
        ((height, width),) = level_sizes(size, [stride])

        def of_image(outputs, boxes, labels, valid):
            centres, sides = centres_of(boxes, size, stride)
            x, y = jnp.floor(centres).astype(jnp.int32).T
            target = heat_map(
                centres, sides, labels, valid, height, width, outputs["heat"].shape[-1],
                self.overlap,
            )  # fmt: skip
            offset = jnp.abs(outputs["offset"][y, x] - (centres - jnp.floor(centres)))
            extent = jnp.abs(outputs["size"][y, x] - sides)
            return (
                jnp.sum(heat_loss(outputs["heat"], target)),
                jnp.sum(jnp.where(valid[:, None], offset, 0.0)),
                jnp.sum(jnp.where(valid[:, None], extent, 0.0)),
                jnp.sum(valid),
            )

        *sums, objects = jax.vmap(of_image)(
            outputs, truth["boxes"], truth["box_label"], truth["box_valid"]
        )
        return {
            name: normalize(one, objects, truth["valid"], self.normalizer)
            for name, one in zip(("heat", "offset", "size"), sums, strict=True)
        }

    def detections(self, outputs: dict[str, jax.Array], size: tuple[int, int]) -> Detections:
        """The objects that are found: boxes, scores, labels, detected, [b, outputs, ...].

        They are the places of which no neighbour is hotter; no box suppresses another.
        """
        stride = self.encoder.strides[0]

        def of_image(outputs: dict[str, jax.Array]) -> Detections:
            heat = outputs["heat"]
            around = nn.max_pool(heat[None], (3, 3), padding="SAME")[0]
            scores = jnp.where(heat == around, jax.nn.sigmoid(heat), 0.0)
            y, x = jnp.mgrid[: heat.shape[0], : heat.shape[1]]
            centres = jnp.stack([x, y], axis=-1) + outputs["offset"]
            half = outputs["size"] / 2
            boxes = stride * jnp.concatenate([centres - half, centres + half], axis=-1)
            return select(
                boxes.reshape(-1, 4), scores.reshape(-1, heat.shape[-1]), size=size, iou=1.0,
                candidates=self.candidates, score=self.score, outputs=self.outputs,
            )  # fmt: skip

        return jax.vmap(of_image)(outputs)


def centres_of(boxes: jax.Array, size: tuple[int, int], stride: int) -> tuple[jax.Array, jax.Array]:
    """Centres, x and y, and sides, width and height, of boxes [n, 4] in an image: [n, 2], strides.

    The centres lie inside of the map.
    """
    boxes = clip(boxes, *size)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / stride
    return centres, (boxes[:, 2:] - boxes[:, :2]) / stride


def heat_map(
    centres: jax.Array,
    sides: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    height: int,
    width: int,
    classes: int,
    overlap: float,
) -> jax.Array:
    """The true heat, [height, width, classes]: 1 in the cell of each centre, Gaussian around it.

    Where objects of a class overlap, the hotter counts. The standard deviation is a third of
    `radius`, and at least a sixth of a cell.

    Args:
      centres, sides: [n, 2], x and y, in cells.
      labels: int [n]; valid: bool [n].
      height, width, classes: of the map.
      overlap: see `CenterNet`.
    """
    y, x = jnp.mgrid[:height, :width]
    cell = jnp.floor(centres)
    squares = (x - cell[:, :1, None]) ** 2 + (y - cell[:, 1:, None]) ** 2
    sigma = jnp.maximum(radius(sides, overlap) / 3, 1 / 6)[:, None, None]
    heat = jnp.where(valid[:, None, None], jnp.exp(-squares / (2 * sigma**2)), 0.0)
    of_class = labels[:, None] == jnp.arange(classes)
    return jnp.max(heat[..., None] * of_class[:, None, None], axis=0, initial=0.0)


def radius(sides: jax.Array, overlap: float) -> jax.Array:
    """How far both corners of a box, width and height [n, 2], may move: [n].

    The smallest of three: both corners move outwards, both inwards, or both the same way, all by r
    along both axes, until the IoU is `overlap`. Each is the smaller positive root of a quadratic.
    """
    w, h = sides.T
    area, total = w * h, w + h
    # Outwards: w h / ((w + 2 r)(h + 2 r)) = o.
    outwards = (-total + jnp.sqrt(total**2 + 4 * area * (1 / overlap - 1))) / 4
    # Inwards: (w - 2 r)(h - 2 r) / (w h) = o.
    inwards = (total - jnp.sqrt(jnp.maximum(total**2 - 4 * area * (1 - overlap), 0.0))) / 4
    # Together: i / (2 w h - i) = o with i = (w - r)(h - r).
    rest = area * (1 - 2 * overlap / (1 + overlap))
    together = (total - jnp.sqrt(jnp.maximum(total**2 - 4 * rest, 0.0))) / 2
    return jnp.minimum(jnp.minimum(outwards, inwards), together)


def heat_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The focal loss of equation 1 with alpha = 2 and beta = 4, of each place and class.

    From logarithms: right and with finite gradients for any finite logit.
    """
    hot, cold = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = -jnp.exp(2 * cold) * hot
    negative = -((1 - target) ** 4) * jnp.exp(2 * hot) * cold
    return jnp.where(target == 1, positive, negative)
