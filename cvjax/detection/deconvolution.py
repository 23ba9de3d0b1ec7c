"""The transposed convolution with stride 2, as a convolution with four outputs for each place."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from cvjax.errors import InputError
from cvjax.nn.fast_conv import fast_conv
from cvjax.nn.space_to_depth import depth_to_space


class Deconvolution(nn.Module):
    """Twice the height and width: [n, h, w, c] -> [n, 2 h, 2 w, features].

    It is torch's ConvTranspose2d with stride 2 and padding kernel / 2 - 1, whose weight [c,
    features, kernel, kernel] is our `kernel` [kernel, kernel, c, features]. XLA's own transposed
    convolution puts zeros between the pixels and takes several times as long on a CPU.

    Attributes:
      features: channels.
      kernel: height and width; even.
      kernel_init: of the kernel.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel: int = 2
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if self.kernel < 2 or self.kernel % 2:
            raise InputError(f"Deconvolution: kernel is {self.kernel}; it must be even")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See above."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        phases = _phases(kernel).astype(self.dtype)
        reach = phases.shape[0] // 2
        y = fast_conv(
            x.astype(self.dtype), phases, (1, 1), [(reach, reach)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return depth_to_space(y, 2) + bias.astype(self.dtype)


def _phases(kernel: jax.Array) -> jax.Array:
    """[k, k, c, f] -> [r, r, c, 4 f]: what each of the 2x2 pixels of a place sees around it.

    Pixel 2 i + a of the result gets x[i + d] times kernel[a - 2 d + k / 2 - 1], where that is a
    pixel of the kernel.
    """
    side = kernel.shape[0]
    reach = side // 4
    around = 2 * reach + 1

    def along(x: jax.Array, axis: int) -> jax.Array:
        rows = []
        for a in (0, 1):
            for d in range(-reach, reach + 1):
                k = a - 2 * d + side // 2 - 1
                row = jax.lax.index_in_dim(x, max(0, min(k, side - 1)), axis, keepdims=False)
                rows.append(row if 0 <= k < side else jnp.zeros_like(row))
        x = jnp.stack(rows, axis)
        return x.reshape(*x.shape[:axis], 2, around, *x.shape[axis + 1 :])

    x = along(along(kernel, 1), 0)  # [2, r, 2, r, c, f]
    x = x.transpose(1, 3, 4, 0, 2, 5)
    return x.reshape(around, around, kernel.shape[2], -1)
