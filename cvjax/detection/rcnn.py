"""R-CNN with two stages: proposals first, then what the heads see in each of them.

With no further head it is Faster R-CNN (S. Ren et al., https://arxiv.org/abs/1506.01497), with a
mask or keypoint head Mask R-CNN (K. He et al., https://arxiv.org/abs/1703.06870):

    RCNN(encoder, RPN(RPNHead()), BoxHead(80))
    RCNN(encoder, RPN(RPNHead()), BoxHead(80), {"mask": MaskHead(80)})
    RCNN(encoder, RPN(RPNHead()), BoxHead(1), {"keypoints": KeypointHead(17)})
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least, check_fractions
from cvjax.detection.assigners import max_iou
from cvjax.detection.dense import Detections
from cvjax.detection.losses import check_normalizer, normalized
from cvjax.detection.roi_align import fpn_levels, roi_align
from cvjax.detection.sampling import Samples, foreground_rows, sample
from cvjax.nn.space_to_depth import space_to_depth

Outputs = dict[str, Any]


@dataclass(frozen=True)
class PyramidPool:
    """The features of boxes, each from the level of a pyramid that goes with its size.

    Attributes:
      levels: how many are used, the finest first; None for all. Published detectors use four, and
        the fifth for proposals alone.
      canonical_size, canonical_level: a box with sides of so many pixels is read from the level
        with the stride 2^canonical_level.
      samples, aligned: see `cvjax.detection.roi_align.roi_align`; torchvision has aligned=False.
    """

    levels: int | None = 4
    canonical_size: float = 224.0
    canonical_level: int = 4
    samples: int | None = 2
    aligned: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, levels=1, canonical_size=1, samples=1)

    def __call__(
        self, levels: Sequence[jax.Array], boxes: jax.Array, strides: Sequence[int], size: int
    ) -> jax.Array:
        """Levels [b, h_i, w_i, c], boxes [b, r, 4] in pixels -> [b, r, size, size, c]."""
        levels, strides = levels[: self.levels], strides[: self.levels]
        lowest, highest = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
        chosen = fpn_levels(
            boxes, lowest, highest, size=self.canonical_size, level=self.canonical_level
        )
        return roi_align(
            levels, boxes, chosen, strides=strides, output_size=(size, size),
            samples=self.samples, aligned=self.aligned,
        )  # fmt: skip


def pixels_of(x: jax.Array, boxes: jax.Array, size: int, detail: int) -> jax.Array:
    """What a head with `detail` sees beside the features: the image in the boxes, cell by cell.

    The finest level has long lost where exactly an edge is; PointRend (A. Kirillov et al.,
    https://arxiv.org/abs/1912.08193, section 3.3) gives its points fine-grained features for that.

    Args:
      x: images [b, h, w, c].
      boxes: [b, r, 4], xyxy in pixels.
      size: cells along each side of a box.
      detail: bilinear samples along each side of a cell.

    Returns:
      [b, r, size, size, detail^2 c], the samples of a cell as its channels, row by row.
    """
    side = size * detail
    seen = roi_align([x], boxes, strides=[1], output_size=(side, side), samples=1)
    cells = space_to_depth(seen.reshape(-1, side, side, x.shape[-1]), detail)
    return cells.reshape(*boxes.shape[:2], *cells.shape[1:])


class RCNN(nn.Module):
    """The detector.

    A head is a module that maps features [p, size, size, c] of p boxes to arrays [p, ...], with a
    field or property `size`, perhaps one `detail` (see `pixels_of`), and two functions of one
    image: `losses(outputs, samples, truth) -> {name: (sum, count)}`, of
    `cvjax.detection.sampling.Samples` and the truth of that image, and `detections(outputs, found,
    size) -> {name: [m, ...]}`, of what the box head has found in an image of that height and
    width. Whatever a batch has in the fields that the task knows is in the truth.

    Attributes:
      encoder: a module with `__call__(x, *, train, valid) -> levels` and `strides`, for example
        `cvjax.nn.fpn.Pyramid`.
      rpn: where to look, for example `cvjax.detection.rpn.RPN`.
      box_head: which class, and where exactly: `cvjax.detection.box_head.BoxHead`.
      heads: what else is to be said of an object, by name, for example
        `cvjax.detection.mask_head.MaskHead`. In training they see the samples that have an object;
        else what the box head has found.
      pool: the features of boxes: called as `PyramidPool`.
      samples, fraction: the box head is trained on so many boxes of an image, of which at most
        this share has an object.
      overlap: a proposal has an object from this IoU on.
      normalizer: of all losses, see `cvjax.detection.losses.normalized`.
    """

    encoder: nn.Module
    rpn: nn.Module
    box_head: nn.Module
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    pool: PyramidPool = PyramidPool()
    samples: int = 512
    fraction: float = 0.25
    overlap: float = 0.5
    normalizer: str = "batch"

    def __post_init__(self):
        check_at_least(self, samples=1)
        check_fractions(self, "fraction", "overlap")
        check_normalizer(self.normalizer)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool = False,
        valid: jax.Array | None = None,
        truth: dict[str, jax.Array] | None = None,
    ) -> Outputs:
        """What `losses` needs, where there is a truth, else what `detections` needs.

        The images are [b, h, w, c]. With a truth (see `losses`) the heads see boxes that are drawn
        at random, from the stream "sample", from the proposals and the true boxes.
        """
        size, strides = x.shape[1:3], self.encoder.strides
        levels = self.encoder(x, train=train, valid=valid)
        rpn = self.rpn(levels)
        boxes, is_box = self.rpn.propose(rpn, size, strides)

        def see(head: nn.Module, boxes: jax.Array) -> Any:
            features = self.pool(levels, boxes, strides, head.size)
            if detail := getattr(head, "detail", 0):
                pixels = pixels_of(x, boxes, head.size, detail).astype(features.dtype)
                features = jnp.concatenate([features, pixels], axis=-1)
            outputs = head(features.reshape(-1, *features.shape[2:]))
            return jax.tree.map(lambda y: y.reshape(*boxes.shape[:2], *y.shape[1:]), outputs)

        if truth is None:
            found = jax.vmap(lambda *one: self.box_head.detections(*one, size))(
                see(self.box_head, boxes), boxes, is_box
            )
            heads = {name: see(head, found["boxes"]) for name, head in self.heads.items()}
            return {"found": found, "heads": heads}
        first, second = jax.random.split(self.make_rng("sample"))
        samples = self._sample(second, boxes, is_box, truth)
        most = foreground_rows(self.samples, self.fraction)
        foreground = jax.tree.map(lambda x: x[:, :most], samples)
        return {
            "rpn": rpn,
            "anchors": self.rpn.sample(first, truth, size, strides),
            "box": see(self.box_head, samples.boxes),
            "samples": samples,
            "heads": {name: see(head, foreground.boxes) for name, head in self.heads.items()},
            "foreground": foreground,
        }

    def losses(
        self, outputs: Outputs, truth: dict[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """Those of the proposals, of the box head and of the heads.

        `truth` is "boxes" [b, n, 4], "box_label" int [b, n], "box_valid" bool [b, n] and "valid"
        bool [b], and what the heads ask for; what is not valid is finite.
        """
        parts = [
            (self.rpn, outputs["rpn"], outputs["anchors"]),
            (self.box_head, outputs["box"], outputs["samples"]),
            *((self.heads[k], v, outputs["foreground"]) for k, v in outputs["heads"].items()),
        ]
        losses = {}
        for part, said, samples in parts:
            for name, (sums, counts) in jax.vmap(part.losses)(said, samples, truth).items():
                losses[name] = normalized(
                    sums, jnp.ones(()), counts, truth["valid"], by=self.normalizer
                )
        return losses

    def detections(self, outputs: Outputs, size: tuple[int, int]) -> Detections:
        """The objects that are found: boxes, scores, labels, detected, [b, outputs, ...].

        And of each what the heads say of it.
        """

        def of_image(found: Detections, heads: dict[str, Any]) -> Detections:
            more = {}
            for name, said in heads.items():
                more |= self.heads[name].detections(said, found, size)
            return {**found, **more}

        return jax.vmap(of_image)(outputs["found"], outputs["heads"])

    def _sample(
        self, rng: jax.Array, boxes: jax.Array, is_box: jax.Array, truth: dict[str, jax.Array]
    ) -> Samples:
        """Of the proposals and, so that there are good ones from the start, the true boxes."""

        def of_image(rng, boxes, is_box, true, is_true):
            boxes, is_box = jnp.concatenate([boxes, true]), jnp.concatenate([is_box, is_true])
            assignment = max_iou(
                boxes, true, is_true, foreground=self.overlap, background=self.overlap,
                low_quality=False,
            )  # fmt: skip
            assignment = assignment._replace(weight=assignment.weight * is_box)
            return sample(rng, boxes, assignment, count=self.samples, fraction=self.fraction)

        return jax.vmap(of_image)(
            jax.random.split(rng, len(boxes)), boxes, is_box, truth["boxes"], truth["box_valid"]
        )
