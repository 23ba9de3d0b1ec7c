"""A network whose input, output and target have unit variance at every level of noise."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.checks import check_positive
from cvjax.diffusion.process import Process, like
from cvjax.errors import InputError


class Preconditioned(nn.Module):
    """D(x) = c_skip x + c_out F(c_in x, c_noise): predicts x_0, whatever the network F knows.

    T. Karras et al., https://arxiv.org/abs/2206.00364, equation 7 and table 1, for any process:
    x_t / alpha = x_0 + s eps is their noisy image, s = sigma / alpha their sigma. F starts at zero,
    so that D starts as the best linear guess. With the weighting `losses.edm` the loss of F is 1.

    Attributes:
      network: F, `__call__(x, t, condition)`; instead of t it is given c_noise = ln(s) / 4.
      process: that of the task, with prediction "x0".
      sigma_data: the standard deviation of the images in [-1, 1], over all pixels.
    """

    network: nn.Module
    process: Process
    sigma_data: float = 0.5

    def __post_init__(self):
        check_positive(**{"Preconditioned: sigma_data": self.sigma_data})
        if self.process.prediction != "x0":
            raise InputError(
                f"Preconditioned: prediction is {self.process.prediction!r}; a preconditioned "
                "network predicts 'x0'"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
        """Maps x_t [b, h, w, c], t [b] and what the network takes besides to x_0, [b, h, w, c]."""
        alpha = self.process.alpha(t)
        c_skip, c_out, c_in, c_noise = coefficients(self.process.sigma(t) / alpha, self.sigma_data)
        x = like(1 / alpha, x) * x
        y = self.network(like(c_in, x) * x, c_noise, condition)
        if y.shape != x.shape:  # they would be broadcast
            raise InputError(
                f"Preconditioned: the network gives {list(y.shape)}; of {list(x.shape)} it must "
                "give such: no learned variances, no channels besides the image"
            )
        return like(c_skip, x) * x + like(c_out, x) * y


def coefficients(
    sigma: jax.Array, sigma_data: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """c_skip, c_out, c_in and c_noise of T. Karras et al., table 1, column "ours"."""
    total = jnp.sqrt(sigma**2 + sigma_data**2)
    return sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total, jnp.log(sigma) / 4
