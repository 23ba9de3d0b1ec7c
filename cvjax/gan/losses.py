"""What the two players of a GAN pay, and the penalties on the gradient of the discriminator.

Each loss has, of logits [b], `real(logit)` and `fake(logit)`, whose sum the discriminator pays, and
`generator(logit)`, what the generator pays for its images; all [b].
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class NonSaturating:
    """Cross-entropy; the generator maximizes log D (I. Goodfellow et al., arXiv:1406.2661)."""

    def real(self, logit: jax.Array) -> jax.Array:
        """-log D."""
        return jax.nn.softplus(-logit)

    def fake(self, logit: jax.Array) -> jax.Array:
        """-log(1 - D)."""
        return jax.nn.softplus(logit)

    def generator(self, logit: jax.Array) -> jax.Array:
        """-log D."""
        return jax.nn.softplus(-logit)


@dataclass(frozen=True)
class Hinge:
    """J. Lim, J. Ye, https://arxiv.org/abs/1705.02894."""

    def real(self, logit: jax.Array) -> jax.Array:
        """max(0, 1 - logit)."""
        return jax.nn.relu(1 - logit)

    def fake(self, logit: jax.Array) -> jax.Array:
        """max(0, 1 + logit)."""
        return jax.nn.relu(1 + logit)

    def generator(self, logit: jax.Array) -> jax.Array:
        """-logit."""
        return -logit


@dataclass(frozen=True)
class LeastSquares:
    """LSGAN: real ones are 1, fakes 0 (X. Mao et al., https://arxiv.org/abs/1611.04076, eq. 9)."""

    def real(self, logit: jax.Array) -> jax.Array:
        """(logit - 1)^2 / 2."""
        return (logit - 1) ** 2 / 2

    def fake(self, logit: jax.Array) -> jax.Array:
        """logit^2 / 2."""
        return logit**2 / 2

    def generator(self, logit: jax.Array) -> jax.Array:
        """(logit - 1)^2 / 2."""
        return (logit - 1) ** 2 / 2


@dataclass(frozen=True)
class Wasserstein:
    """M. Arjovsky et al., https://arxiv.org/abs/1701.07875; the critic must be kept smooth."""

    def real(self, logit: jax.Array) -> jax.Array:
        """-logit."""
        return -logit

    def fake(self, logit: jax.Array) -> jax.Array:
        """The logit."""
        return logit

    def generator(self, logit: jax.Array) -> jax.Array:
        """-logit."""
        return -logit


Loss = NonSaturating | Hinge | LeastSquares | Wasserstein
Critic = Callable[[jax.Array], jax.Array]


def gradient_penalty(critic: Critic, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """(|grad critic| - 1)^2 at a random point between each pair of images [b, ...]; returns [b].

    I. Gulrajani et al., https://arxiv.org/abs/1704.00028, equation 3. `critic` maps [b, ...] to
    [b], each row by itself. Where the gradient is 0 its norm has the gradient 0.
    """
    mix = jax.random.uniform(rng, (len(real),) + (1,) * (real.ndim - 1))
    square = r1_penalty(critic, mix * real + (1 - mix) * fake)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return (jnp.where(square > 0, norm, 0.0) - 1) ** 2


def r1_penalty(critic: Critic, image: jax.Array) -> jax.Array:
    """|grad critic|^2 at each image [b, ...]; returns [b].

    R1 is half of its mean over real images (L. Mescheder et al., arXiv:1801.04406, equation 9).
    """
    gradient = jax.grad(lambda x: jnp.sum(critic(x)))(image)
    return jnp.sum(gradient**2, axis=range(1, image.ndim))
