"""One-step methods for the probability flow ODE dx/dt = velocity (Y. Song et al., equation 13)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_between
from cvjax.diffusion import grids
from cvjax.diffusion.process import Process, convert, like, time_at
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


def velocity(denoise: Denoise, process: Process, x: jax.Array, t: jax.Array) -> jax.Array:
    """dx/dt at x [b, ...] and t [b], from whatever the network predicts."""
    return convert(process, process.prediction, "velocity", denoise(x, t), x, t)


def euler(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
    start: jax.Array | None = None,
) -> jax.Array:
    """Euler's method in the time t: order 1."""

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        return x + like(s - t, x) * velocity(denoise, process, x, t)

    grid = time_steps(times, process, steps)
    return integrate(step, begin(process, keys, shape, start), grid, len(keys))


def heun(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    start: jax.Array | None = None,
) -> jax.Array:
    """Heun's method with churn: order 2, two evaluations a step but for the last, which is Euler's.

    T. Karras et al., https://arxiv.org/abs/2206.00364, algorithm 2, in the time t. Before a step
    from a noise level sigma / alpha in [s_min, s_max], fresh noise raises that level by the factor
    1 + min(s_churn / steps, sqrt(2) - 1), though never beyond that of t = 1. With `s_churn` = 0
    it is deterministic (algorithm 1). With the process EDM the time is theirs.

    Args:
      s_noise: the standard deviation of the fresh noise; a little over 1 makes up for detail that
        the network takes away.

    Raises:
      InputError: negative settings, or churn at no step.
    """
    for name, value in dict(s_churn=s_churn, s_min=s_min, s_noise=s_noise).items():
        check_between(0, math.inf, **{f"heun: {name}": value})
    grid = time_steps(times, process, steps)
    ratio = at_times(process.sigma, grid) / at_times(process.alpha, grid)
    is_churned = (s_min <= ratio[:-1]) & (ratio[:-1] <= s_max)
    if s_churn and steps == 1:
        raise InputError(
            f"heun: s_churn is {s_churn}, but the only step begins at t = 1, beyond which there is "
            "no noise; set s_churn=0 or take more steps"
        )
    if s_churn and not is_churned[1:].any():
        raise InputError(
            f"heun: s_churn is {s_churn}, but no step begins at a noise level in [{s_min}, "
            f"{s_max}]: they go from {ratio[0]:.4g} to {ratio[-1]:.4g}; set s_churn=0 or widen it"
        )
    factor = 1 + np.where(is_churned, min(s_churn / steps, np.sqrt(2) - 1), 0.0)
    raised = at_times(lambda t: time_at(process, factor * ratio[:-1]), grid)
    raised = np.where(factor > 1, np.maximum(raised, grid[:-1]), grid[:-1])

    def churn(x: jax.Array, index: jax.Array, t: jax.Array, higher: jax.Array) -> jax.Array:
        kept = process.alpha(higher) / process.alpha(t)
        added = jnp.sqrt(
            jnp.maximum(process.sigma(higher) ** 2 - (kept * process.sigma(t)) ** 2, 0.0)
        )
        return like(kept, x) * x + s_noise * like(added, x) * normal(keys, shape, index)

    def first_order(x, index, t, s, higher):
        if s_churn:
            higher = jnp.full_like(t, higher)
            x, t = churn(x, index, t, higher), higher
        here = velocity(denoise, process, x, t)
        return x, here, like(s - t, x), x + like(s - t, x) * here

    def step(x, index, t, s, higher):
        x, here, length, guess = first_order(x, index, t, s, higher)
        there = velocity(denoise, process, guess, s)
        return x + length * (here + there) / 2

    x = begin(process, keys, shape, start)
    x = integrate(step, x, grid[:-1], len(keys), (raised[:-1],))
    t, s = (jnp.full(len(keys), time) for time in grid[-2:])
    return first_order(x, steps - 1, t, s, raised[-1])[-1]
