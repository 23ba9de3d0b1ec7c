"""Generator and discriminator in the manner of DCGAN, with or without classes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least, check_choices
from cvjax.errors import InputError
from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.fast_conv import fast_conv
from cvjax.nn.space_to_depth import depth_to_space


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift are looked up by class (H. de Vries, arXiv:1707.00683).

    Its statistics are those of the last batch: `GAN.sample` takes them anew for the parameters with
    which it draws. `num_classes` 0 is one scale and shift for all.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array, *, train: bool = False) -> jax.Array:
        """x [b, h, w, c], label int32 [b]."""
        x = BatchNorm(momentum=0.0, use_bias=False, use_scale=False)(x, train)
        size = (max(self.num_classes, 1), x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, size)
        shift = self.param("shift", nn.initializers.zeros, size)
        label = label if self.num_classes else 0 * label
        return x * scale[label][:, None, None] + shift[label][:, None, None]


# Far shorter than the latents, which a generator told the class too loudly learns to ignore.
_SMALL = nn.initializers.normal(0.1)


class Generator(nn.Module):
    """Latents [b, d] and labels [b] to images of `shape` in [0, 1].

    A. Radford et al., https://arxiv.org/abs/1511.06434, with a convolution and depth-to-space in
    place of each transposed convolution, which is slow on a CPU. Each width doubles the size. The
    class enters beside the latents, as a learned vector as long, and in every norm.
    """

    shape: tuple[int, int, int] = (28, 28, 1)
    widths: tuple[int, ...] = (96, 48)
    num_classes: int = 10

    def __post_init__(self):
        check_at_least(self, shape=1, widths=1, num_classes=0)
        if len(self.shape) != 3:
            raise InputError(
                f"Generator: shape is {self.shape}; it must be (height, width, channels)"
            )
        super().__post_init__()

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
        if self.num_classes:
            z = jnp.concatenate(
                [z, nn.Embed(self.num_classes, z.shape[-1], embedding_init=_SMALL)(label)], axis=-1
            )
        x = nn.Dense(height // scale * (width // scale) * self.widths[0])(z)
        x = x.reshape(len(z), height // scale, width // scale, self.widths[0])
        for size in (*self.widths[1:], max(self.widths[-1] // 2, 1)):
            x = nn.relu(ConditionalBatchNorm(self.num_classes)(x, label, train=train))
            x = depth_to_space(nn.Conv(4 * size, (3, 3))(x), 2)
        x = nn.relu(ConditionalBatchNorm(self.num_classes)(x, label, train=train))
        return nn.sigmoid(nn.Conv(channels, (3, 3), conv_general_dilated=fast_conv)(x))


class Discriminator(nn.Module):
    """Images [b, h, w, c] and labels [b] to logits [b]; no row sees another.

    With `conditioning` "projection" the class enters so (T. Miyato, M. Koyama, arXiv:1802.05637):
    the logit is w h + v_label h with the features h. With "auxiliary" it is not told, and has to
    name it (A. Odena et al., https://arxiv.org/abs/1610.09585): a second head gives logits
    [b, num_classes] beside those of real or not.

    Spectral normalization (T. Miyato et al., https://arxiv.org/abs/1802.05957) divides the matrix
    of every layer, those of the heads too, by its largest singular value, one power iteration for
    each training pass.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    num_classes: int = 10
    spectral_norm: bool = True
    conditioning: str = "projection"

    def __post_init__(self):
        check_choices(self, conditioning=("projection", "auxiliary"))
        check_at_least(self, widths=1, num_classes=0)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, label: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Returns float32 [b], with an auxiliary head also the logits of the classes."""
        if label is None and self.num_classes and self.conditioning == "projection":
            raise InputError(f"Discriminator: num_classes is {self.num_classes}, but there are no "
                             "labels; it must be 0")  # fmt: skip
        layer = partial(_normalized if self.spectral_norm else _plain, train=train)
        x = 2 * x - 1
        for width in self.widths:
            x = nn.leaky_relu(layer(nn.Conv(width, (4, 4), strides=2), x), 0.2)
        x = x.reshape(len(x), -1)
        logit = layer(nn.Dense(1), x)[:, 0]
        if not self.num_classes:
            return logit
        auxiliary = self.conditioning == "auxiliary"
        of_classes = layer(nn.Dense(self.num_classes, use_bias=auxiliary), x)
        if auxiliary:
            return logit, of_classes
        return logit + jnp.sum(of_classes * jax.nn.one_hot(label, self.num_classes), axis=-1)


class PatchDiscriminator(nn.Module):
    """Images [b, h, w, c] to a logit for each of many patches, [b, h', w'].

    P. Isola et al., https://arxiv.org/abs/1611.07004, section 3.2.2: each width but the last halves
    the map; with 4 widths a logit sees 70 x 70 pixels. In place of BatchNorm, which lets rows see
    each other, there is spectral normalization. Labels are not looked at.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    spectral_norm: bool = True

    def __post_init__(self):
        if self.widths:  # without any each pixel has a logit
            check_at_least(self, widths=1)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, label: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """`x` in [0, 1]. Returns float32 [b, h', w']."""
        layer = partial(_normalized if self.spectral_norm else _plain, train=train)
        x = 2 * x - 1
        for number, width in enumerate(self.widths, start=1):
            stride = 1 if number == len(self.widths) else 2
            x = nn.leaky_relu(layer(nn.Conv(width, (4, 4), strides=stride), x), 0.2)
        return layer(nn.Conv(1, (4, 4)), x)[..., 0]


def _plain(module: nn.Module, x: jax.Array, *, train: bool) -> jax.Array:
    return module(x)


def _normalized(module: nn.Module, x: jax.Array, *, train: bool) -> jax.Array:
    return nn.SpectralNorm(module)(x, update_stats=train)
