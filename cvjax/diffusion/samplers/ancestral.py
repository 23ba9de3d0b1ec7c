"""DDIM and DDPM: predict x_0, then draw from p(x_s | x_t, x_0) with more noise or less."""

import jax

from cvjax.checks import check_between
from cvjax.diffusion import grids
from cvjax.diffusion.process import Process, posterior, split
from cvjax.diffusion.samplers.integration import (
    Denoise,
    Shape,
    begin,
    integrate,
    normal,
    time_steps,
)


def ddim(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
    eta: float = 0.0,
    start: jax.Array | None = None,
) -> jax.Array:
    """J. Song et al., https://arxiv.org/abs/2010.02502, equation 12: order 1.

    With `eta` = 0 it is deterministic, and for FlowMatching it is Euler's method; `eta` = 1 is
    ancestral sampling as in DDPM. Their variance (equation 16), written for any process, is that
    of p(x_s | x_t, x_0): sigma_s^2 (1 - alpha_t^2 sigma_s^2 / (alpha_s^2 sigma_t^2)).
    """
    check_between(0, 1, eta=eta)

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        x0, eps = split(process, process.prediction, denoise(x, t), x, t)
        mean, std = posterior(process, x0, eps, t, s, eta)
        return mean + std * normal(keys, shape, index) if eta > 0 else mean

    grid = time_steps(times, process, steps)
    return integrate(step, begin(process, keys, shape, start), grid, len(keys))


def ddpm(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
) -> jax.Array:
    """Ancestral sampling: each step draws from p(x_s | x_t, x_0) at the predicted x_0.

    J. Ho et al., https://arxiv.org/abs/2006.11239, algorithm 2, with the smaller of its variances.
    """
    return ddim(denoise, process, keys, shape, steps, times=times, eta=1.0)
