"""Convolutional encoders, and decoders of convolutions and depth-to-space."""

import flax.linen as nn
import jax

from cvjax.checks import check_at_least
from cvjax.errors import InputError
from cvjax.nn.fast_conv import fast_conv
from cvjax.nn.silu import silu
from cvjax.nn.space_to_depth import depth_to_space


class Encoder(nn.Module):
    """Images [b, h, w, c] to [b, outputs]; h and w are halved once for each width."""

    outputs: int
    widths: tuple[int, ...] = (32, 64)
    hidden: int = 256

    def __post_init__(self):
        check_at_least(self, outputs=1, hidden=1)
        if self.widths:  # without any it is a multilayer perceptron
            check_at_least(self, widths=1)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float [b, outputs], in training too: so that it serves as a classifier."""
        for width in self.widths:
            x = silu(nn.Conv(width, (4, 4), strides=2)(x))
        x = silu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.outputs)(x)


class Decoder(nn.Module):
    """Vectors [b, d] to images of `shape`; each width doubles h and w.

    Doubling is a convolution and depth-to-space: transposed convolutions are slow on a CPU.
    """

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (64, 32)
    hidden: int = 256

    def __post_init__(self):
        check_at_least(self, shape=1, widths=1, hidden=1)
        if len(self.shape) != 3:
            raise InputError(
                f"Decoder: shape is {self.shape}; it must be (height, width, channels)"
            )
        super().__post_init__()

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
        x = silu(nn.Dense(self.hidden)(z))
        x = silu(nn.Dense(height // scale * (width // scale) * self.widths[0])(x))
        x = x.reshape(len(z), height // scale, width // scale, self.widths[0])
        for size in (*self.widths[1:], None):
            x = nn.Conv(4 * (size or channels), (3, 3), conv_general_dilated=fast_conv)(x)
            x = depth_to_space(x, 2)
            x = x if size is None else silu(x)
        return x


class GridEncoder(nn.Module):
    """Images [b, h, w, c] to grids [b, h', w', channels]; h and w are halved for each width."""

    channels: int
    widths: tuple[int, ...] = (32, 64)

    def __post_init__(self):
        check_at_least(self, channels=1)
        if self.widths:
            check_at_least(self, widths=1)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float [b, h / 2^n, w / 2^n, channels], of any range."""
        for width in self.widths:
            x = silu(nn.Conv(width, (4, 4), strides=2)(x))
        x = Residual()(x)
        return nn.Conv(self.channels, (1, 1))(silu(x))


class GridDecoder(nn.Module):
    """Grids [b, h', w', d] to images [b, 2^n h', 2^n w', channels]; each width doubles the size."""

    channels: int
    widths: tuple[int, ...] = (64, 32)

    def __post_init__(self):
        check_at_least(self, channels=1, widths=1)
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns float images, of any range."""
        x = Residual()(nn.Conv(self.widths[0], (3, 3))(z))
        for width in self.widths:
            x = depth_to_space(nn.Conv(4 * width, (3, 3))(silu(x)), 2)
        last = nn.Conv(self.channels, (3, 3), conv_general_dilated=fast_conv, name="last")
        return last(silu(x))


class Residual(nn.Module):
    """A 3 x 3 and a 1 x 1 convolution beside the identity (arXiv:1711.00937, section 4.1)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] to the same."""
        y = nn.Conv(x.shape[-1], (3, 3))(silu(x))
        return x + nn.Conv(x.shape[-1], (1, 1))(silu(y))
