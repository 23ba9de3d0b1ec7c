"""What all samplers share: where they start, the noise that they draw, the loop over the times."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_count
from cvjax.diffusion.grids import TimeGrid, karras
from cvjax.diffusion.process import Process, prior
from cvjax.errors import InputError

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Shape = tuple[int, ...]


def time_steps(times: TimeGrid, process: Process, steps: int) -> np.ndarray:
    """The times [steps + 1] as numbers, known when a program is compiled.

    Raises InputError unless there is at least one step, the times fall from 1 to 0, and some are
    late enough to see the data: with EDM's sigma as time, equal steps are not.
    """
    check_count(1, steps=steps)
    with jax.ensure_compile_time_eval():
        grid = np.asarray(times(process, steps))
    name = getattr(getattr(times, "func", times), "__name__", times)
    if grid.shape != (steps + 1,) or not (np.diff(grid) < 0).all() or (grid[0], grid[-1]) != (1, 0):
        raise InputError(
            f"times={name} for {steps} steps gives {grid.size} times from {grid.flat[0]:.4g} to "
            f"{grid.flat[-1]:.4g}; it must give {steps + 1} that fall strictly, from 1 to 0"
        )
    # Images in [-1, 1] have a standard deviation of about a half; few steps show no detail anyway.
    last = _last_ratio(process, grid)
    if steps > 1 and last > (5.0 if steps < 10 else 0.5):
        with jax.ensure_compile_time_eval():
            reachable = _last_ratio(process, np.asarray(karras(process, steps)))
        if last > 2 * reachable:
            raise InputError(
                f"times={name} does not fit {type(process).__name__}: the last of {steps} steps "
                f"begins at sigma / alpha = {last:.3g}, so that none sees detail; take times="
                f"grids.karras, where it is {reachable:.3g}"
            )
    return grid


def _last_ratio(process: Process, grid: np.ndarray) -> float:
    """sigma / alpha where the last step begins."""
    sigma, alpha = (float(at_times(f, grid)[-2]) for f in (process.sigma, process.alpha))
    return sigma / alpha


def at_times(function: Callable[[jax.Array], jax.Array], grid: np.ndarray) -> np.ndarray:
    """A function of the time such as `process.sigma`, as numbers, for the times of a grid."""
    with jax.ensure_compile_time_eval():
        return np.asarray(function(jnp.asarray(grid)))


def begin(
    process: Process, keys: jax.Array, shape: Shape, start: jax.Array | None = None
) -> jax.Array:
    """x at t = 1, [b, *shape]: `start` if it is given, else noise."""
    if start is None:
        return jax.vmap(lambda key: prior(process, key, shape))(keys)
    if start.shape != (len(keys), *shape):
        raise InputError(f"start is {start.shape}; it must be {(len(keys), *shape)}")
    return jnp.asarray(start, jnp.promote_types(start.dtype, jnp.result_type(float)))


def normal(keys: jax.Array, shape: Shape, index: jax.Array | int) -> jax.Array:
    """Noise [b, *shape] of the step `index`, each row from its own key."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def integrate(
    step: Callable, state: Any, grid: np.ndarray, batch: int, tables: Sequence[np.ndarray] = ()
) -> Any:
    """`state = step(state, index, t [b], s [b], *rows)`, from time t to time s of each step.

    `rows` are those of the `tables` [steps, ...] for this step.
    """

    def body(state: Any, row: tuple[jax.Array, ...]) -> tuple[Any, None]:
        index, t, s, *rows = row
        return step(state, index, jnp.full(batch, t), jnp.full(batch, s), *rows), None

    rows = (jnp.arange(len(grid) - 1), grid[:-1], grid[1:], *tables)
    return jax.lax.scan(body, state, jax.tree.map(jnp.asarray, rows))[0]
