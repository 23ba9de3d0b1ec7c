"""The reverse SDE dx = (f x - g^2 score) dt + g dw, from t = 1 to t = 0.

Y. Song et al., https://arxiv.org/abs/2011.13456, equation 6. The method of Euler and Maruyama takes
what the forward process loses in a step to be small; a process whose drift has a pole at t = 1,
where nothing of the data is left (flow matching, cosine), needs a grid that is fine there.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_count, check_positive
from cvjax.diffusion import grids
from cvjax.diffusion.process import Process, convert, diffusion, drift, like, posterior, split
from cvjax.diffusion.samplers.integration import (
    Denoise,
    Shape,
    at_times,
    begin,
    integrate,
    normal,
    time_steps,
)
from cvjax.errors import InputError


def euler_maruyama(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
) -> jax.Array:
    """The Euler-Maruyama method: order 1 in distribution. The last step adds no noise.

    Raises:
      InputError: the factor of x_0 changes more than twofold in a step, or several steps are too
        few for the noise to go: the variance-exploding process needs a dozen.
    """
    grid = time_steps(times, process, steps)
    _check_fits(process, grid)

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        f, g, length = (like(a, x) for a in (drift(process, t), diffusion(process, t), t - s))
        x = x - length * (f * x - g**2 * _score(denoise, process, x, t))
        return x + (index < steps - 1) * g * jnp.sqrt(length) * normal(keys, shape, index)

    return integrate(step, begin(process, keys, shape), grid, len(keys))


def predictor_corrector(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
    corrections: int = 1,
    snr: float = 0.16,
) -> jax.Array:
    """Ancestral steps, and after each but the last `corrections` steps of Langevin dynamics.

    Y. Song et al., https://arxiv.org/abs/2011.13456, algorithm 1, with the ancestral sampling of
    their appendix F as the predictor, which is exact where x_0 is. The corrector's step is
    2 (snr sigma)^2: theirs, with the norm of the score as it is expected, |z| / sigma, in place of
    its mean over a batch, so that an image does not depend on its neighbours.
    """
    check_count(0, **{"predictor_corrector: corrections": corrections})
    check_positive(**{"predictor_corrector: snr": snr})
    grid = time_steps(times, process, steps)

    def predict(x: jax.Array, t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        x0, eps = split(process, process.prediction, denoise(x, t), x, t)
        return posterior(process, x0, eps, t, s)

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        number = index * (corrections + 1)
        mean, std = predict(x, t, s)
        x = mean + std * normal(keys, shape, number)

        def correct(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            length = like(2 * (snr * process.sigma(s)) ** 2, x)
            x = x + length * _score(denoise, process, x, s)
            return x + jnp.sqrt(2 * length) * normal(keys, shape, number), None

        return jax.lax.scan(correct, x, number + 1 + jnp.arange(corrections))[0]

    x = integrate(step, begin(process, keys, shape), grid[:-1], len(keys))
    t, s = (jnp.full(len(keys), time) for time in grid[-2:])
    return predict(x, t, s)[0]


def _score(denoise: Denoise, process: Process, x: jax.Array, t: jax.Array) -> jax.Array:
    return convert(process, process.prediction, "score", denoise(x, t), x, t)


def _check_fits(process: Process, grid: np.ndarray) -> None:
    """The method takes exp(y) to be 1 + y for y = log(alpha_s / alpha_t), and so for the noise."""
    alpha = at_times(process.alpha, grid)
    factors = alpha[1:] / alpha[:-1]
    worst = int(np.argmax(factors))
    if factors[worst] > 2:
        raise InputError(
            f"euler_maruyama does not fit {type(process).__name__} at these times: alpha grows "
            f"{factors[worst]:.3g}-fold in the step from t = {grid[worst]:.4g} to "
            f"{grid[worst + 1]:.4g}, and 2 is the most; take times=grids.log_snr, more steps than "
            f"{len(grid) - 1}, or a process such as VariancePreserving('linear')"
        )
    # Where x_0 is 0 every step is linear in x: how much noise the exact denoiser leaves.
    f, g, sigma = (
        at_times(function, grid)
        for function in (partial(drift, process), partial(diffusion, process), process.sigma)
    )
    length = -np.diff(grid)
    left = float(sigma[0]) ** 2
    for i, h in enumerate(length):
        left *= (1 - h * (f[i] + (g[i] / sigma[i]) ** 2)) ** 2
        left += h * g[i] ** 2 if i < len(length) - 1 else 0
    # One step shows nothing; images in [-1, 1] have a standard deviation of about a half.
    if len(length) > 1 and left > 0.5**2:
        raise InputError(
            f"euler_maruyama does not fit {type(process).__name__} at these times: its "
            f"{len(length)} steps leave noise of the standard deviation {left**0.5:.3g}, even of "
            "an exact network; take more steps"
        )
