"""Generator and discriminator in the manner of DCGAN, with or without classes."""

import flax.linen as nn
import jax

from cvjax.errors import InputError


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift are looked up by class (H. de Vries, arXiv:1707.00683).

    Its statistics are those of the last batch: `GAN.sample` takes them anew for the parameters with
    which it draws. `num_classes` 0 is one scale and shift for all.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array, *, train: bool = False) -> jax.Array:
        """x [b, h, w, c], label int32 [b]."""
        x = nn.BatchNorm(not train, momentum=0.0, use_bias=False, use_scale=False)(x)
        size = (max(self.num_classes, 1), x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, size)
        shift = self.param("shift", nn.initializers.zeros, size)
        label = label if self.num_classes else 0 * label
        return x * scale[label][:, None, None] + shift[label][:, None, None]


class Generator(nn.Module):
    """Latents [b, d] and labels [b] to images of `shape` in [0, 1].

    A. Radford et al., https://arxiv.org/abs/1511.06434, with a convolution and depth-to-space in
    place of each transposed convolution, which is slow on a CPU. Each width doubles the size.
    """

    shape: tuple[int, int, int] = (28, 28, 1)
    widths: tuple[int, ...] = (96, 48)
    num_classes: int = 10

    @nn.compact
    def __call__(self, z: jax.Array, label: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 [b, *shape]."""
        height, width, channels = self.shape
        scale = 2 ** len(self.widths)
        if height % scale or width % scale:
            raise InputError(
                f"Generator: {height} x {width} images; {len(self.widths)} widths need multiples "
                f"of {scale}"
            )
        x = nn.Dense(height // scale * (width // scale) * self.widths[0])(z)
        x = x.reshape(len(z), height // scale, width // scale, self.widths[0])
        for size in (*self.widths[1:], self.widths[-1] // 2):
            x = nn.relu(ConditionalBatchNorm(self.num_classes)(x, label, train=train))
            x = nn.Conv(4 * size, (3, 3))(x)
            b, h, w, _ = x.shape
            x = x.reshape(b, h, w, 2, 2, size).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, size)
        x = nn.relu(ConditionalBatchNorm(self.num_classes)(x, label, train=train))
        return nn.sigmoid(nn.Conv(channels, (3, 3))(x))


class Discriminator(nn.Module):
    """Images [b, h, w, c] and labels [b] to logits [b]; no row sees another.

    The class enters by projection (T. Miyato, M. Koyama, https://arxiv.org/abs/1802.05637): the
    logit is w h + v_label h with the features h. Spectral normalization (T. Miyato et al.,
    https://arxiv.org/abs/1802.05957) divides the matrix of every layer, w and v too, by its
    largest singular value, one power iteration for each training pass.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    num_classes: int = 10
    spectral_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 [b]."""

        def layer(module: nn.Module, x: jax.Array) -> jax.Array:
            if self.spectral_norm:
                return nn.SpectralNorm(module)(x, update_stats=train)
            return module(x)

        x = 2 * x - 1
        for width in self.widths:
            x = nn.leaky_relu(layer(nn.Conv(width, (4, 4), strides=2), x), 0.2)
        x = x.reshape(len(x), -1)
        logit = layer(nn.Dense(1), x)[:, 0]
        if self.num_classes:
            of_classes = layer(nn.Dense(self.num_classes, use_bias=False), x)
            logit += (of_classes * jax.nn.one_hot(label, self.num_classes)).sum(-1)
        return logit
