"""Exponential multistep methods: x_0 is extrapolated in lambda = log(alpha / sigma) from the steps
before, the rest of the probability flow ODE is solved exactly. One evaluation a step.

The solution from t to s of that ODE, written with x_0(lambda) along it, is

    x_s = sigma_s / sigma_t x_t + alpha_s int exp(lambda - lambda_s) x_0(lambda) dlambda

with lambda from lambda_t to lambda_s (C. Lu et al., https://arxiv.org/abs/2211.01095, equation 8).
"""

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_choice, check_count
from cvjax.diffusion import grids
from cvjax.diffusion.process import Process, like, log_snr, perturb, split
from cvjax.diffusion.samplers.integration import (
    Denoise,
    Shape,
    at_times,
    begin,
    integrate,
    time_steps,
)


def dpm_solver_2m(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
    start: jax.Array | None = None,
) -> jax.Array:
    """DPM-Solver++(2M): order 2 with one evaluation a step.

    C. Lu et al., https://arxiv.org/abs/2211.01095, algorithm 2: a step of DDIM, but with x_0
    extrapolated to the middle of the step, linearly in lambda = log(alpha / sigma), from this
    step and the one before. The first step, which has none before it, and the last, in which
    lambda may rise too far to extrapolate, are of order 1.
    """
    grid = time_steps(times, process, steps)
    previous = np.concatenate([[2 * grid[0] - grid[1]], grid[:-2]]).astype(grid.dtype)

    def step(state, index, t, s, earlier):
        x, before = state
        x0, _ = split(process, process.prediction, denoise(x, t), x, t)
        now = log_snr(process, t)
        h, h_before = log_snr(process, s) - now, now - log_snr(process, jnp.full_like(t, earlier))
        is_between = (index > 0) & (index < steps - 1)
        weight = like(jnp.where(is_between, h / (2 * h_before), 0.0), x)
        middle = x0 + weight * (x0 - before)
        _, eps = split(process, "x0", middle, x, t)
        return perturb(process, middle, eps, s), x0

    x = begin(process, keys, shape, start)
    return integrate(step, (x, jnp.zeros_like(x)), grid, len(keys), (previous,))[0]


def unipc(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
    order: int = 2,
    start: jax.Array | None = None,
) -> jax.Array:
    """UniPC: order `order` + 1 with one evaluation a step.

    W. Zhao et al., https://arxiv.org/abs/2302.04867, algorithm 5 to 8 with the prediction of x_0. A
    predictor interpolates x_0 through the last `order` steps; the network's answer where it arrives
    is one more point, through which a corrector does the same step again. The integrals are those
    of the interpolating polynomials, exact: their weights for any B(h), but for the shortcut that
    they take at order 2. A step that is more than twice as long in lambda as the one before is
    extrapolated from its beginning alone.
    """
    check_count(1, **{"unipc: order": order})
    check_choice((1, 2, 3), **{"unipc: order": order})
    grid = time_steps(times, process, steps)
    alpha, sigma = at_times(process.alpha, grid), at_times(process.sigma, grid)
    tables = _unipc_tables(np.log(np.float64(alpha) / sigma), alpha, sigma, order)

    def step(state, index, t, s, kept_here, here, kept_there, there):
        predicted, corrected, history = state
        x0, _ = split(process, process.prediction, denoise(predicted, t), predicted, t)
        history = jnp.concatenate([x0[None], history])
        corrected = kept_here * corrected + jnp.tensordot(here, history, 1)
        history = history[:-1]
        return kept_there * corrected + jnp.tensordot(there, history, 1), corrected, history

    x = begin(process, keys, shape, start)
    state = (x, x, jnp.zeros((order, *x.shape)))
    return integrate(step, state, grid, len(keys), [table.astype(x.dtype) for table in tables])[0]


def _unipc_tables(
    lambda_: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, order: int
) -> tuple[np.ndarray, ...]:
    """For each step, x_t's factor and the weights of x_0 at t and before, twice.

    First those of the correction of x_t itself, [steps] and [steps, order + 1], which does nothing
    where there is no step before; then those of the prediction of x_s, [steps] and [steps, order].
    """
    steps = len(lambda_) - 1
    corrector = np.zeros((steps, order + 1))
    predictor = np.zeros((steps, order))
    h = np.diff(lambda_)
    for i in range(steps):
        points = min(order, i + 1) if i and h[i] <= 2 * h[i - 1] else 1
        nodes = lambda_[i + 1 :: -1][: points + 1]
        ends = lambda_[i], lambda_[i + 1]
        predictor[i, :points] = alpha[i + 1] * _weights(nodes[1:], *ends)
        if i + 1 < steps:
            corrector[i + 1, : points + 1] = alpha[i + 1] * _weights(nodes, *ends)
    shrunk = sigma[1:] / sigma[:-1]
    return np.concatenate([[1.0], shrunk[:-1]]), corrector, shrunk, predictor


def _weights(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """int exp(lambda - end) l_j(lambda) dlambda from start to end, l_j Lagrange's polynomials."""
    points, weights = np.polynomial.legendre.leggauss(32)
    points = start + (end - start) * (points + 1) / 2
    weights = weights * (end - start) / 2 * np.exp(points - end)
    others = [np.delete(nodes, j) for j in range(len(nodes))]
    bases = [
        np.prod((points[:, None] - other) / (node - other), axis=1)
        for node, other in zip(nodes, others, strict=True)
    ]
    return np.stack(bases) @ weights
