"""What a network is trained to be good at: weights of the squared error, and score matching.

Notation as in `cvjax.diffusion.process`. A weighting is a function of (process, t [b]) that gives
the weight [b] of the squared error of *eps*, whatever the network predicts: every quantity that it
may predict is affine in eps where x_t is known, so that an error of one is a multiple of an error
of the other (`of_prediction`). Weights are those at a time; how often a time comes is the matter of
`process.times`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cvjax.checks import check_positive
from cvjax.diffusion.process import PARAMETERIZATIONS, Process, log_snr

Weighting = Callable[[Process, jax.Array], jax.Array]


def simple(process: Process, t: jax.Array) -> jax.Array:
    """1: L_simple of J. Ho et al., https://arxiv.org/abs/2006.11239, equation 14."""
    return jnp.ones_like(t)


def likelihood(process: Process, t: jax.Array) -> jax.Array:
    """g(t)^2 / sigma(t)^2 / 2 = -(d log SNR / dt) / 2: with uniform times the bound on -log p(x).

    Y. Song et al., https://arxiv.org/abs/2101.09258, theorem 1 (lambda = g^2 on the score) and
    D. Kingma et al., https://arxiv.org/abs/2107.00630, equation 17. In nats for an image if errors
    are summed over its pixels, for a pixel if they are averaged.
    """
    _, slope = jax.jvp(lambda t: log_snr(process, t), (t,), (jnp.ones_like(t),))
    return -slope / 2


def min_snr(process: Process, t: jax.Array, *, gamma: float = 5.0) -> jax.Array:
    """min(SNR, gamma) / SNR: as x_0's weight it is the SNR, but never above gamma.

    T. Hang et al., https://arxiv.org/abs/2303.09556, section 3.4. Raises InputError unless
    gamma > 0.
    """
    check_positive(**{"min_snr: gamma": gamma})
    return jnp.exp(-jnp.maximum(log_snr(process, t) - jnp.log(gamma), 0.0))


def edm(process: Process, t: jax.Array, *, sigma_data: float = 0.5) -> jax.Array:
    """(s^2 + sigma_data^2) / sigma_data^2, where s = sigma / alpha.

    T. Karras et al., https://arxiv.org/abs/2206.00364, table 1, where it is x_0's weight and
    divided by s^2: the preconditioned network's error (see `preconditioning`) has the weight 1.
    Raises InputError unless sigma_data > 0.
    """
    check_positive(**{"edm: sigma_data": sigma_data})
    return 1 + jnp.exp(-log_snr(process, t)) / sigma_data**2


def sigmoid(process: Process, t: jax.Array, *, bias: float = -1.0) -> jax.Array:
    """-(d log SNR / dt) sigmoid(bias - log SNR), up to a factor a weight that falls with the SNR.

    D. Kingma, R. Gao, https://arxiv.org/abs/2303.00848, section 4 (w of their equation 5 is the
    sigmoid); the bias as in E. Hoogeboom et al., https://arxiv.org/abs/2410.19324.
    """
    return 2 * likelihood(process, t) * jax.nn.sigmoid(bias - log_snr(process, t))


def of_prediction(weighting: Weighting, process: Process, t: jax.Array) -> jax.Array:
    """The weight [b] of the squared error of what `process.prediction` names.

    With value = a x_0 + b eps and x_t = alpha x_0 + sigma eps known, an error e of eps is one of
    (b - a sigma / alpha) e in the value.
    """
    a, b = PARAMETERIZATIONS[process.prediction](process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    return weighting(process, t) * (alpha / (alpha * b - sigma * a)) ** 2


def sliced_score_matching(
    score: Callable[[jax.Array], jax.Array], x: jax.Array, rng: jax.Array
) -> jax.Array:
    """E_v [v . (d score / dx) v] + |score|^2 / 2 with one v of N(0, I): float32 [b].

    Y. Song et al., https://arxiv.org/abs/1905.07088, equation 8 (reduced variance). Least where
    score(x) is the gradient of log p(x); no noise is added. Its gradient takes a derivative of
    second order.

    Args:
      score: [b, ...] -> [b, ...].
      x: data.
      rng: of the directions v.
    """
    v = jax.random.normal(rng, x.shape, x.dtype)
    value, along = jax.jvp(score, (x,), (v,))
    exact = jnp.promote_types(x.dtype, jnp.float32)
    v, value, along = (part.astype(exact) for part in (v, value, along))
    axes = range(1, x.ndim)
    return jnp.sum(v * along, axes) + jnp.sum(value**2, axes) / 2
