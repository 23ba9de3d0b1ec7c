"""EfficientNet: one network, scaled in width, depth and resolution together.

M. Tan, Q. V. Le: EfficientNet, ICML 2019 (https://arxiv.org/abs/1905.11946): the blocks are its
table 1, the factors those of its authors' code
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet). The lite ones
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite) have no
squeeze-and-excitation, relu6 in place of swish, and do not scale the stem, the head and the depth
of the first and the last stage.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_choices, check_fractions, check_positive
from cvjax.errors import InputError
from cvjax.nn import inverted_residual
from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.convolution import PADDINGS, convolution
from cvjax.nn.inverted_residual import InvertedResidual, divisible
from cvjax.nn.stochastic_depth import drop_rates


class Size(NamedTuple):
    """A row of the table: factors, the resolution in pixels and the dropout it was trained with."""

    width: float
    depth: float
    resolution: int
    dropout: float


SIZES = {
    "b0": Size(1.0, 1.0, 224, 0.2),
    "b1": Size(1.0, 1.1, 240, 0.2),
    "b2": Size(1.1, 1.2, 260, 0.3),
    "b3": Size(1.2, 1.4, 300, 0.3),
    "b4": Size(1.4, 1.8, 380, 0.4),
    "b5": Size(1.6, 2.2, 456, 0.4),
    "b6": Size(1.8, 2.6, 528, 0.5),
    "b7": Size(2.0, 3.1, 600, 0.5),
    "lite0": Size(1.0, 1.0, 224, 0.2),
    "lite1": Size(1.0, 1.1, 240, 0.2),
    "lite2": Size(1.1, 1.2, 260, 0.3),
    "lite3": Size(1.2, 1.4, 280, 0.3),
    "lite4": Size(1.4, 1.8, 300, 0.3),
}
# Expansion, kernel, stride, channels, number of blocks: table 1, stages 2 to 8.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM, HEAD = 32, 1280  # channels


class EfficientNet(nn.Module):
    """An EfficientNet.

    `EfficientNet("b0")` is that of the paper; `EfficientNet("lite0", width=0.25, depth=0.5)` is a
    small one. A stage ends where the map is halved: "stage1" has stride 2, "stage5" stride 32.

    Attributes:
      size: "b0" to "b7" or "lite0" to "lite4". The images are to have SIZES[size].resolution
        pixels; lite ones see (x - 127) / 128 of bytes.
      num_classes: length of the logits.
      width, depth: factors in place of those of `size`.
      stages: rows (expansion, kernel, stride, channels, blocks) in place of STAGES; the factors
        apply to them too.
      padding: "same" for weights trained with TensorFlow (timm's tf_*, Hugging Face's, the
        lite ones), "symmetric" for those of torchvision and timm.
      epsilon: of the norms; torchvision and timm have 1e-5 (but B5 to B7 of torchvision 1e-3).
      momentum: of the running statistics: of the paper; a run of some hundred steps wants 0.9, else
        it ends with those that it began with.
      stochastic_depth: the chance that the last block is left out for an example, in training;
        the paper has 0.2.
      dropout: of the mean of the last map, before the head; the paper has SIZES[size].dropout.
      dtype: of the computation; parameters, statistics and logits are float32.
      remat: recompute the inside of each block in the backward pass: less memory, more time.
    """

    size: str = "b0"
    num_classes: int = 1000
    width: float | None = None
    depth: float | None = None
    stages: tuple[tuple[int, int, int, int, int], ...] | None = None
    padding: str = "same"
    epsilon: float = 1e-3
    momentum: float = 0.99
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_choices(self, size=SIZES, padding=PADDINGS)
        check_at_least(self, num_classes=1, epsilon=0)
        check_fractions(self, "stochastic_depth", "dropout", "momentum")
        for field in ("width", "depth"):
            value = getattr(self, field)
            if value is not None:
                check_positive(**{f"EfficientNet: {field}": value})
        if self.stages is not None and not (
            self.stages and all(len(row) == 5 and min(row) > 0 for row in self.stages)
        ):
            raise InputError(
                f"EfficientNet: stages is {self.stages!r}; it must be at least one row of five "
                "positive numbers: expansion, kernel, stride, channels, blocks"
            )
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map; a map has size ceil(size of image / stride)."""
        return inverted_residual.strides([stride for _, _, stride, *_ in self.stages or STAGES])

    def setup(self):
        """Names the layers; the blocks are `block_0`, `block_1`, ... through all stages."""
        lite = self.size.startswith("lite")
        width = SIZES[self.size].width if self.width is None else self.width
        depth = SIZES[self.size].depth if self.depth is None else self.depth
        self.activation = nn.relu6 if lite else nn.swish
        stages = self.stages or STAGES
        repeats = [math.ceil(number * depth) for *_, number in stages]
        if lite:
            repeats[0], repeats[-1] = stages[0][-1], stages[-1][-1]
        conv = partial(convolution, padding=self.padding, dtype=self.dtype)
        norm = partial(BatchNorm, self.momentum, self.epsilon, self.dtype)

        channels = STEM if lite else divisible(STEM * width)
        self.stem_conv, self.stem_norm = conv(channels, 3, 2), norm()
        rates = iter(drop_rates(self.stochastic_depth, sum(repeats)))
        make_block = (
            nn.remat(InvertedResidual, static_argnums=(2,)) if self.remat else InvertedResidual
        )
        blocks = []
        for (expansion, kernel, stride, features, _), number in zip(stages, repeats, strict=True):
            for i in range(number):
                blocks.append(
                    make_block(
                        features=divisible(features * width),
                        expanded=expansion * channels,
                        kernel=kernel,
                        stride=stride if i == 0 else 1,
                        squeeze=0 if lite else max(1, channels // 4),
                        activation=self.activation,
                        padding=self.padding,
                        momentum=self.momentum,
                        epsilon=self.epsilon,
                        drop_rate=next(rates),
                        dtype=self.dtype,
                    )
                )
                channels = divisible(features * width)
        self.block = blocks
        head = HEAD if lite else divisible(HEAD * width)
        self.head_conv, self.head_norm = conv(head, 1), norm()
        self.head_dropout = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes)

    def features(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the last map of each stage, {"stage1": [b, h / stride, w / stride, c], ...}.

        Args:
          x: images [b, h, w, c], normalized.
          train: normalize by this batch's statistics, and update their running average.
          valid: bool [b]: the statistics are those of these rows alone. At least one must be
            True, else they are NaN.
        """
        x = self.stem_conv(x.astype(self.dtype))
        x = self.activation(self.stem_norm(x, train, valid))
        return inverted_residual.maps(x, self.block, train, valid)

    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        *_, x = self.features(x, train=train, valid=valid).values()
        x = self.head_norm(self.head_conv(x), train, valid)
        x = jnp.mean(self.activation(x), axis=(1, 2), dtype=jnp.float32)
        return self.head(self.head_dropout(x, deterministic=not train))
