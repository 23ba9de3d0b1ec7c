"""The region proposal network: boxes in which there is something, whatever it is.

S. Ren, K. He, R. Girshick, J. Sun: Faster R-CNN, NeurIPS 2015 (https://arxiv.org/abs/1506.01497),
section 3; at all levels of a pyramid, T.-Y. Lin et al.: Feature Pyramid Networks
(https://arxiv.org/abs/1612.03144), section 4.1.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_fractions
from cvjax.detection.anchors import grid_anchors
from cvjax.detection.assigners import max_iou
from cvjax.detection.boxes import clip
from cvjax.detection.coders import decode_deltas, encode_deltas
from cvjax.detection.dense import check_anchors, flatten, level_sizes
from cvjax.detection.losses import binary_cross_entropy, smooth_l1
from cvjax.detection.nms import nms
from cvjax.detection.sampling import Samples, sample
from cvjax.nn.convolution import convolution

SMOOTH = 1 / 9  # beta of the smooth L1 loss, as in Detectron and torchvision


class RPNHead(nn.Module):
    """Convolutions and two outputs, the same at all levels.

    Attributes:
      anchors: how many there are at one place.
      features, depth: of the 3x3 convolutions.
      dtype: of the computation; parameters are float32.
    """

    anchors: int = 3
    features: int = 256
    depth: int = 1
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, anchors=1, features=1, depth=0)
        super().__post_init__()

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """Levels [b, h_i, w_i, c] -> "logits" [b, a], of an object, and "deltas" [b, a, 4].

        Both are float32.
        """

        def conv(features: int, kernel: int, name: str) -> nn.Conv:
            init = nn.initializers.normal(0.01)
            return convolution(
                features, kernel, use_bias=True, kernel_init=init, dtype=self.dtype, name=name
            )

        layers = [conv(self.features, 3, f"conv{i + 1}") for i in range(self.depth)]
        logits, deltas = conv(self.anchors, 1, "cls_logits"), conv(4 * self.anchors, 1, "bbox_pred")
        maps = []
        for x in levels:
            x = x.astype(self.dtype)
            for layer in layers:
                x = nn.relu(layer(x))
            maps.append(x)
        return {
            "logits": flatten([logits(x) for x in maps], 1)[..., 0],
            "deltas": flatten([deltas(x) for x in maps], 4),
        }


class RPN(nn.Module):
    """Anchors, what is said of them, and the proposals that come of it.

    Attributes:
      head: levels to "logits" and "deltas" of all anchors, as `RPNHead`, with len(ratios) anchors.
      scale: side of the square anchor, in strides of its level.
      ratios: height / width of the anchors.
      offset: of the anchors' centres, in strides: 0.5 is the middle of a cell; torchvision has 0.
      rounded: the anchors' corners are whole pixels around their centres, as in torchvision.
      positive, negative: an anchor is positive from this IoU on, or when it is the best of some
        truth; negative below that.
      samples, fraction: the loss is that of so many anchors of an image, of which at most this
        share is positive.
      candidates: so many anchors of each level, those with the highest logits, become boxes.
      iou: a box with more overlap with a better one of the same level is dropped.
      min_size: pixels; a box that is narrower or lower, within the image, is dropped.
      proposals: rows of the result.
    """

    head: nn.Module
    scale: float = 8.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    offset: float = 0.5
    rounded: bool = False
    positive: float = 0.7
    negative: float = 0.3
    samples: int = 256
    fraction: float = 0.5
    candidates: int = 1000
    iou: float = 0.7
    min_size: float = 1e-3
    proposals: int = 1000

    def __post_init__(self):
        check_at_least(self, samples=1, candidates=1, proposals=1)
        check_fractions(self, "positive", "negative", "fraction", "iou")
        super().__post_init__()

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """What the head says of the levels [b, h_i, w_i, c]."""
        return self.head(levels)

    def anchors(self, size: tuple[int, int], strides: Sequence[int]) -> list[jax.Array]:
        """Those of each level, [a_i, 4], for an image of some height and width."""
        return [
            grid_anchors(
                height, width, stride, (self.scale * stride,), self.ratios,
                offset=self.offset, rounded=self.rounded,
            )
            for (height, width), stride in zip(level_sizes(size, strides), strides, strict=True)
        ]  # fmt: skip

    def propose(
        self, outputs: dict[str, jax.Array], size: tuple[int, int], strides: Sequence[int]
    ) -> tuple[jax.Array, jax.Array]:
        """Boxes float32 [b, p, 4], the best first, and bool [b, p], False for those of padding.

        They have no gradient and lie in the image; padding is 0.

        Raises:
          InputError: the head has another number of anchors.
        """
        levels = self.anchors(size, strides)
        check_anchors("RPN", outputs["logits"], sum(map(len, levels)), len(self.ratios))

        def of_image(logits: jax.Array, deltas: jax.Array) -> tuple[jax.Array, jax.Array]:
            start, boxes, scores, level = 0, [], [], []
            for number, anchors in enumerate(levels):
                one = slice(start, start + len(anchors))
                best, rows = jax.lax.top_k(logits[one], min(self.candidates, len(anchors)))
                boxes.append(decode_deltas(deltas[one][rows], anchors[rows]))
                scores.append(best)
                level.append(jnp.full(len(rows), number))
                start += len(anchors)
            boxes = clip(jnp.concatenate(boxes), *size)
            fits = jnp.all(boxes[:, 2:] - boxes[:, :2] >= self.min_size, -1)
            kept = nms(
                boxes, jnp.concatenate(scores), jnp.concatenate(level), fits,
                iou_threshold=self.iou, max_outputs=self.proposals,
            )  # fmt: skip
            return jnp.where(kept.valid[:, None], boxes[kept.index], 0.0), kept.valid

        outputs = jax.lax.stop_gradient(outputs)
        return jax.vmap(of_image)(outputs["logits"], outputs["deltas"])

    def sample(
        self,
        rng: jax.Array,
        truth: dict[str, jax.Array],
        size: tuple[int, int],
        strides: Sequence[int],
    ) -> Samples:
        """The anchors of which the loss is taken, [b, samples, ...]."""
        anchors = jnp.concatenate(self.anchors(size, strides))

        def of_image(rng: jax.Array, boxes: jax.Array, valid: jax.Array) -> Samples:
            assignment = max_iou(
                anchors, boxes, valid, foreground=self.positive, background=self.negative,
                low_quality=True,
            )  # fmt: skip
            return sample(rng, anchors, assignment, count=self.samples, fraction=self.fraction)

        boxes, valid = truth["boxes"], truth["box_valid"]
        return jax.vmap(of_image)(jax.random.split(rng, len(boxes)), boxes, valid)

    def losses(
        self, outputs: dict[str, jax.Array], samples: Samples, truth: dict[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Of one image: `rpn_objectness` and `rpn_box`, each a sum and what to divide it by.

        Equation 1 of the paper, but for the weights of the two: both are divided by the number of
        samples. `outputs` are those of all anchors, [a] and [a, 4]; `truth` is that of the image.
        """
        logits, deltas = (outputs[name][samples.rows] for name in ("logits", "deltas"))
        count = jnp.sum(samples.valid)
        is_object = binary_cross_entropy(logits, samples.foreground)
        steps = box_loss(deltas, samples, truth["boxes"])
        return {
            "rpn_objectness": (jnp.sum(jnp.where(samples.valid, is_object, 0.0)), count),
            "rpn_box": (steps, count),
        }


def box_loss(
    deltas: jax.Array, samples: Samples, truth: jax.Array, weights: Sequence[float] = (1, 1, 1, 1)
) -> jax.Array:
    """The smooth L1 distance of deltas [s, 4] to the truth [n, 4]; the sum over the foreground."""
    foreground = samples.foreground[:, None]
    # A sample that has no object is its own: its step is zero, and its gradient finite.
    boxes = jnp.where(foreground, truth[samples.index], samples.boxes)
    away = smooth_l1(deltas, encode_deltas(boxes, samples.boxes, weights), beta=SMOOTH)
    return jnp.sum(jnp.where(foreground, away, 0.0))
