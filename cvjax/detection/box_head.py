"""The box head: the class of each proposal, and how its box shall move.

R. Girshick: Fast R-CNN (https://arxiv.org/abs/1504.08083), section 2; its two layers on a pyramid
are those of T.-Y. Lin et al.: Feature Pyramid Networks (https://arxiv.org/abs/1612.03144), section
4.2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_positive
from cvjax.detection.coders import decode_deltas
from cvjax.detection.dense import Detections, select
from cvjax.detection.rpn import box_loss
from cvjax.detection.sampling import Samples
from cvjax.errors import InputError


class BoxHead(nn.Module):
    """Two fully connected layers, then logits and, for each class, deltas.

    Both have a row for the background, the first, as published weights have; of its deltas nothing
    is ever used. Class i of the labels is row i + 1.

    Attributes:
      num_classes: of objects.
      features: of the two layers.
      size: height and width of the features that it reads.
      weights: of the deltas, see `cvjax.detection.coders.encode_deltas`; these are those of all
        published detectors.
      candidates, score, iou, outputs: of the selection, see `cvjax.detection.dense.select`.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    features: int = 1024
    size: int = 7
    weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    candidates: int = 1000
    score: float = 0.05
    iou: float = 0.5
    outputs: int = 100
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, num_classes=1, features=1, size=1)
        if len(self.weights) != 4:
            raise InputError(f"BoxHead: weights is {self.weights}; it must be four numbers")
        check_positive(**{f"BoxHead: weights[{i}]": w for i, w in enumerate(self.weights)})
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """[p, size, size, c] -> "logits" [p, classes + 1] and "deltas" [p, classes + 1, 4].

        Both are float32.
        """
        # Channels before rows and columns: the order in which published weights read them.
        x = jnp.moveaxis(x, -1, 1).reshape(len(x), -1).astype(self.dtype)
        uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        for name in ("fc6", "fc7"):
            x = nn.relu(
                nn.Dense(self.features, kernel_init=uniform, dtype=self.dtype, name=name)(x)
            )
        rows = self.num_classes + 1
        logits = nn.Dense(
            rows, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype, name="cls_score"
        )(x)
        deltas = nn.Dense(
            4 * rows, kernel_init=nn.initializers.normal(0.001), dtype=self.dtype, name="bbox_pred"
        )(x)
        return {
            "logits": logits.astype(jnp.float32),
            "deltas": deltas.astype(jnp.float32).reshape(-1, rows, 4),
        }

    def losses(
        self, outputs: dict[str, jax.Array], samples: Samples, truth: dict[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Of one image: `classification` and `box`, each a sum and what to divide it by.

        The cross-entropy of the class, and the smooth L1 distance to the box of the truth, both
        over the number of samples. `outputs` are those of the samples.
        """
        label = jnp.where(samples.foreground, truth["box_label"][samples.index] + 1, 0)
        log_p = jax.nn.log_softmax(outputs["logits"])
        entropy = -jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]
        deltas = jnp.take_along_axis(outputs["deltas"], label[:, None, None], 1)[:, 0]
        count = jnp.sum(samples.valid)
        return {
            "classification": (jnp.sum(jnp.where(samples.valid, entropy, 0.0)), count),
            "box": (box_loss(deltas, samples, truth["boxes"], self.weights), count),
        }

    def detections(
        self,
        outputs: dict[str, jax.Array],
        proposals: jax.Array,
        valid: jax.Array,
        size: tuple[int, int],
    ) -> Detections:
        """The objects of one image: boxes [m, 4], scores [m], labels [m], detected [m].

        `outputs` are those of the proposals [p, 4], `valid` is bool [p].
        """
        boxes = decode_deltas(outputs["deltas"][:, 1:], proposals[:, None], self.weights)
        scores = jax.nn.softmax(outputs["logits"])[:, 1:]
        return select(
            boxes, jnp.where(valid[:, None], scores, 0.0), size=size, candidates=self.candidates,
            score=self.score, iou=self.iou, outputs=self.outputs,
        )  # fmt: skip
