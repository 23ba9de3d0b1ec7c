"""What one-stage detectors share: the towers of their heads, and the last choice."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_between, check_count
from cvjax.detection.boxes import clip
from cvjax.detection.nms import nms
from cvjax.errors import InputError
from cvjax.nn.convolution import convolution
from cvjax.nn.fast_conv import fast_conv
from cvjax.nn.group_norm import GroupNorm

Detections = dict[str, jax.Array]
PRIOR = 0.01  # of an object at a place, before anything is learned: Lin et al. 2017, section 3.3


class Tower(nn.Module):
    """Several 3x3 convolutions, each with a norm and a ReLU; [b, h, w, c] -> [b, h, w, features].

    Attributes:
      features: channels.
      depth: the number of convolutions.
      groups: of the group norm after each (Y. Wu, K. He, https://arxiv.org/abs/1803.08494); 0 for
        no norm, as in the first RetinaNet, which hardly learns from scratch.
      dtype: of the computation; parameters are float32.
    """

    features: int
    depth: int = 4
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, features=1, depth=0, groups=0)
        if self.groups and self.features % self.groups:
            raise InputError(
                f"Tower: features is {self.features}; it must be a multiple of groups={self.groups}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps height and width."""
        init = nn.initializers.normal(0.01) if self.groups == 0 else None
        for number in range(self.depth):
            x = convolution(
                self.features, 3, use_bias=True, kernel_init=init, dtype=self.dtype,
                name=f"conv{number + 1}",
            )(x)  # fmt: skip
            if self.groups:
                x = GroupNorm(self.groups, dtype=self.dtype, name=f"norm{number + 1}")(x)
            x = nn.relu(x)
        return x


def output_layer(
    features: int, *, prior: bool = False, dtype: DTypeLike = jnp.float32, name: str | None = None
) -> nn.Conv:
    """The last 3x3 convolution of a head; with `prior` its sigmoid begins at 0.01."""
    bias = float(-np.log((1 - PRIOR) / PRIOR)) if prior else 0.0
    return nn.Conv(
        features, (3, 3), padding=1, dtype=dtype, name=name, conv_general_dilated=fast_conv,
        kernel_init=nn.initializers.normal(0.01), bias_init=nn.initializers.constant(bias),
    )  # fmt: skip


def flatten(maps: Sequence[jax.Array], channels: int) -> jax.Array:
    """Maps [b, h_i, w_i, a_i * channels] -> float32 [b, sum of h_i w_i a_i, channels].

    The order is that of levels, rows, columns, and what stands at one place.
    """
    flat = [x.astype(jnp.float32).reshape(x.shape[0], -1, channels) for x in maps]
    return jnp.concatenate(flat, axis=1)


def check_anchors(model: str, logits: jax.Array, anchors: int, per_place: int) -> None:
    """Raises InputError unless a head has said something, [b, a, ...], of each of the anchors."""
    if logits.shape[1] != anchors:
        raise InputError(
            f"{model}: the head gives {logits.shape[1]} logits for {anchors} anchors; it needs "
            f"anchors={per_place}, one for each size and ratio at a place"
        )


def level_sizes(size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width of each level of an image of some height and width."""
    return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]


def select(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    candidates: int,
    score: float,
    iou: float,
    outputs: int,
    size: tuple[int, int],
) -> dict[str, jax.Array]:
    """Detections of one image: the best that no better one of the same class overlaps.

    Args:
      boxes: [a, 4], or [a, k, 4] with one for each class, of any place; they are clipped to the
        image.
      scores: [a, k], of each class, in [0, 1].
      candidates: so many of the a * k scores, the highest, are looked at.
      score: what is not above it is no detection.
      iou: a detection with more overlap with a better one of its class is suppressed.
      outputs: rows of the result.
      size: height and width of the image.

    Returns:
      boxes [outputs, 4], scores [outputs], labels int32 [outputs], detected bool [outputs], the
      best first, of equal ones that with the lower index; zeros where nothing was detected.
    """
    check_count(1, candidates=candidates)
    check_between(0, 1, score=score, iou=iou)
    boxes, classes = jnp.asarray(boxes), scores.shape[-1]
    best, index = jax.lax.top_k(scores.reshape(-1), min(candidates, scores.size))
    labels = (index % classes).astype(jnp.int32)
    found = boxes[index // classes] if boxes.ndim == 2 else boxes.reshape(-1, 4)[index]
    found = clip(found, *size)
    good = (best > score) & jnp.all(found[:, 2:] > found[:, :2], axis=-1)
    kept = nms(found, best, labels, good, iou_threshold=iou, max_outputs=outputs)
    rows = kept.index
    return {
        "boxes": jnp.where(kept.valid[:, None], found[rows], 0.0),
        "scores": kept.scores,
        "labels": jnp.where(kept.valid, labels[rows], 0),
        "detected": kept.valid,
    }
