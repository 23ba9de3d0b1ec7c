"""The small residual network of CIFAR-10 speed records.

After D. Page, How to Train Your ResNet (https://myrtle.ai/learn/how-to-train-your-resnet), part 4
for the network, part 8 for whitening and CELU. The first convolution may be fixed to whiten
patches: see `cvjax.classification.whitening`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least
from cvjax.errors import InputError
from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.fast_conv import fast_conv
from cvjax.nn.pooling import max_pool


class ResNet9(nn.Module):
    """A whitening 3x3 convolution, a 1x1 one, and three stages that each halve the map.

    The first and the last stage have a residual branch of two convolutions. Each convolution is
    followed by batch normalization without a learned scale and by CELU.

    Attributes:
      num_classes: length of the logits.
      width: channels before the first stage; its stages have 2, 4 and 8 times as many.
      head_scale: factor of the logits.
      dtype: of the computation; parameters, statistics and logits are float32.
    """

    num_classes: int = 10
    width: int = 64
    head_scale: float = 1 / 16
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, num_classes=1, width=1)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map; a map has size floor(size of image / stride)."""
        return {"stage1": 2, "stage2": 4, "stage3": 8}

    @nn.compact
    def _maps(
        self, x: jax.Array, *, train: bool, valid: jax.Array | None, logits: bool
    ) -> dict[str, jax.Array] | jax.Array:
        convolution = partial(
            nn.Conv, use_bias=False, dtype=self.dtype, conv_general_dilated=fast_conv
        )

        def block(x: jax.Array, features: int, kernel: int, name: str) -> jax.Array:
            x = convolution(features, (kernel, kernel), name=f"{name}_conv")(x)
            norm = BatchNorm(0.8, use_scale=False, dtype=self.dtype, name=f"{name}_norm")
            return nn.celu(norm(x, train, valid), alpha=0.3)

        if min(x.shape[1:3]) < 8:
            raise InputError(
                f"ResNet9: images are {x.shape[1]} x {x.shape[2]}; they must be at least 8 x 8"
            )
        x = convolution(2 * 9 * x.shape[-1], (3, 3), name="whitening")(x.astype(self.dtype))
        x = block(x, self.width, 1, "stem")
        maps = {}
        for number, name in enumerate(self.strides, start=1):
            x = block(x, self.width * 2**number, 3, name)
            x = max_pool(x, (2, 2), (2, 2), ((0, 0), (0, 0)))
            if number != 2:
                branch = block(x, x.shape[-1], 3, f"{name}_branch1")
                x = x + block(branch, x.shape[-1], 3, f"{name}_branch2")
            maps[name] = x
        if not logits:
            return maps
        x = jnp.max(x, axis=(1, 2)).astype(jnp.float32)
        return self.head_scale * nn.Dense(self.num_classes, use_bias=False, name="head")(x)

    def features(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the output of each stage, {"stage1": [b, h / 2, w / 2, 2 width], ...}.

        Args:
          x: images [b, h, w, c], normalized, at least 8 x 8.
          train: normalize by this batch's statistics, and update their running average.
          valid: bool [b]: the statistics are those of these rows alone. At least one must be
            True, else they are NaN.
        """
        return self._maps(x, train=train, valid=valid, logits=False)

    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        return self._maps(x, train=train, valid=valid, logits=True)
