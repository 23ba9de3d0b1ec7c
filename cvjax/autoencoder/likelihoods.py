"""What a decoder's outputs say of an image: log p(x | z), in nats.

Each likelihood has `channels(c)`, the number of outputs that it needs for images of c channels,
`log_prob(outputs [..., h, w, channels], image [..., h, w, c]) -> [...]`, summed over pixels and
channels, and `mean(outputs) -> [..., h, w, c]`, the expected image in [0, 1].
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least, check_positive

_PIXELS = (-3, -2, -1)


@dataclass(frozen=True)
class Bernoulli:
    """Each value is the probability of a white pixel; outputs are logits.

    For an image between black and white this is the expectation of log p(b | z) over binary images
    b that are drawn with the image as their mean: -(cross-entropy).
    """

    def channels(self, c: int) -> int:
        """One logit for each value."""
        return c

    def log_prob(self, outputs: jax.Array, image: jax.Array) -> jax.Array:
        """x log p + (1 - x) log(1 - p) with p = sigmoid(outputs), summed."""
        return jnp.sum(image * outputs - jax.nn.softplus(outputs), axis=_PIXELS)

    def mean(self, outputs: jax.Array) -> jax.Array:
        """The probabilities."""
        return jax.nn.sigmoid(outputs)


@dataclass(frozen=True)
class Gaussian:
    """A normal density of one standard deviation, in units of the image; outputs are means."""

    std: float = 0.1

    def __post_init__(self):
        check_positive(**{"Gaussian: std": self.std})

    def channels(self, c: int) -> int:
        """One mean for each value."""
        return c

    def log_prob(self, outputs: jax.Array, image: jax.Array) -> jax.Array:
        """A density, not a probability: it may be positive."""
        scaled = (image - outputs) / self.std
        constant = jnp.log(self.std * jnp.sqrt(2 * jnp.pi))
        return jnp.sum(-0.5 * scaled**2 - constant, axis=_PIXELS)

    def mean(self, outputs: jax.Array) -> jax.Array:
        """The means, clipped to [0, 1]."""
        return jnp.clip(outputs, 0.0, 1.0)


@dataclass(frozen=True)
class DiscretizedLogistic:
    """The logistic mass of each of `levels` equal intervals; outputs are means and log-scales.

    Means and images are in [0, 1], level i is i / (levels - 1); the first and the last interval
    reach to infinity, so that the probabilities sum to 1 (T. Salimans et al.,
    https://arxiv.org/abs/1701.05517, equation 2, with one component).
    """

    levels: int = 256
    min_log_scale: float = -7.0

    def __post_init__(self):
        check_at_least(self, levels=2, min_log_scale=-80)  # where exp(-log_scale) is still finite

    def channels(self, c: int) -> int:
        """A mean and a log-scale for each value."""
        return 2 * c

    def log_prob(self, outputs: jax.Array, image: jax.Array) -> jax.Array:
        """The log of the sum of sigmoid differences, exact where both ends saturate."""
        mean, log_scale = jnp.split(outputs, 2, axis=-1)
        # Between 0 and 1 there are levels - 1 steps; the image is put on its level.
        level = jnp.round(image * (self.levels - 1))
        log_scale = jnp.maximum(log_scale, self.min_log_scale)
        inverse, step = jnp.exp(-log_scale), 1 / (self.levels - 1)
        upper = ((level + 0.5) * step - mean) * inverse
        lower = ((level - 0.5) * step - mean) * inverse
        # log(s(u) - s(l)) = log s(u) + log s(-l) + log(1 - exp(l - u)), which loses nothing.
        # Of a width u - l that is next to nothing, log(1 - exp(-w)) = log w - w / 2.
        width = step * inverse
        of_width = jnp.where(
            width > 1e-3,
            jnp.log(-jnp.expm1(-jnp.maximum(width, 1e-3))),
            jnp.log(step) - log_scale - width / 2,
        )
        first, last = jax.nn.log_sigmoid(upper), jax.nn.log_sigmoid(-lower)
        between = first + last + of_width
        value = jnp.where(level <= 0, first, jnp.where(level >= self.levels - 1, last, between))
        return jnp.sum(value, axis=_PIXELS)

    def mean(self, outputs: jax.Array) -> jax.Array:
        """The location of each logistic, clipped to [0, 1]."""
        return jnp.clip(jnp.split(outputs, 2, axis=-1)[0], 0.0, 1.0)


Likelihood = Bernoulli | Gaussian | DiscretizedLogistic
