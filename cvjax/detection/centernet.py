"""CenterNet: an object is a peak of its class's heat map, with a size beside it.

X. Zhou, D. Wang, P. Kraehenbuehl: Objects as Points (https://arxiv.org/abs/1904.07850).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_fractions
from cvjax.detection.boxes import clip
from cvjax.detection.dense import Detections, Tower, level_sizes, output_layer, select
from cvjax.detection.heatmaps import centre_heatmap
from cvjax.detection.losses import check_normalizer, normalized


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

    def __post_init__(self):
        check_at_least(self, num_classes=1)
        super().__post_init__()

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
        with the true one (`cvjax.detection.heatmaps.gaussian_radius`).
      normalizer: of the losses, see `cvjax.detection.losses.normalized`; what is counted are the
        cells with a centre. Of two in one cell the first is learned.
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
        check_normalizer(self.normalizer)
        check_fractions(self, "overlap")
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

        y, x = jnp.mgrid[:height, :width]
        cell = jnp.stack([x, y], axis=-1).reshape(-1, 2)

        def of_image(outputs, boxes, labels, valid):
            boxes = clip(boxes, *size)
            target, owned = centre_heatmap(
                boxes, labels, valid, height=height, width=width, stride=stride,
                num_classes=outputs["heat"].shape[-1], min_overlap=self.overlap,
            )  # fmt: skip
            low, high = jnp.split(boxes[owned.index] / stride, 2, axis=-1)
            offset = jnp.abs(outputs["offset"].reshape(-1, 2) - ((low + high) / 2 - cell))
            extent = jnp.abs(outputs["size"].reshape(-1, 2) - (high - low))
            return heat_loss(outputs["heat"], target), offset, extent, owned.foreground

        heat, offset, extent, centres = jax.vmap(of_image)(
            outputs, truth["boxes"], truth["box_label"], truth["box_valid"]
        )
        at_centres = centres[..., None]
        return {
            name: normalized(losses, weights, centres, truth["valid"], by=self.normalizer)
            for name, losses, weights in (
                ("heat", heat, 1.0), ("offset", offset, at_centres), ("size", extent, at_centres)
            )
        }  # fmt: skip

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


def heat_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The focal loss of equation 1 with alpha = 2 and beta = 4, of each place and class.

    From logarithms: right and with finite gradients for any finite logit.
    """
    hot, cold = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = -jnp.exp(2 * cold) * hot
    negative = -((1 - target) ** 4) * jnp.exp(2 * hot) * cold
    return jnp.where(target == 1, positive, negative)
