"""A convolutional encoder, and a decoder of convolutions and depth-to-space."""

import flax.linen as nn
import jax

from cvjax.errors import InputError


class Encoder(nn.Module):
    """Images [b, h, w, c] to [b, outputs]; h and w are halved once for each width."""

    outputs: int
    widths: tuple[int, ...] = (32, 64)
    hidden: int = 256

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float [b, outputs]."""
        for width in self.widths:
            x = nn.silu(nn.Conv(width, (4, 4), strides=2)(x))
        x = nn.silu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.outputs)(x)


class Decoder(nn.Module):
    """Vectors [b, d] to images of `shape`; each width doubles h and w.

    Doubling is a convolution and depth-to-space: transposed convolutions are slow on a CPU.
    """

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (64, 32)
    hidden: int = 256

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns float [b, *shape], of any range."""
        height, width, channels = self.shape
        scale = 2 ** len(self.widths)
        if height % scale or width % scale:
            raise InputError(
                f"Decoder: {height} x {width} images; {len(self.widths)} widths need multiples of "
                f"{scale}"
            )
        x = nn.silu(nn.Dense(self.hidden)(z))
        x = nn.silu(nn.Dense(height // scale * (width // scale) * self.widths[0])(x))
        x = x.reshape(len(z), height // scale, width // scale, self.widths[0])
        for size in (*self.widths[1:], None):
            x = depth_to_space(nn.Conv(4 * (size or channels), (3, 3))(x))
            x = x if size is None else nn.silu(x)
        return x


def depth_to_space(x: jax.Array) -> jax.Array:
    """[b, h, w, 4 c] to [b, 2 h, 2 w, c]: each pixel's channels become a square of 2 x 2."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c // 4)
