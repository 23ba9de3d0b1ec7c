"""At which times a sampler asks the network: `grid(process, steps)` is decreasing, [steps + 1].

The first is 1, noise; the last is 0, data. A sampler takes one as its argument `times`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cvjax.checks import check_positive
from cvjax.diffusion.process import Process, time_at
from cvjax.errors import InputError

TimeGrid = Callable[[Process, int], jax.Array]


def uniform(process: Process, steps: int) -> jax.Array:
    """Steps of equal length in t."""
    return 1 - jnp.arange(steps + 1) / steps


def quadratic(process: Process, steps: int) -> jax.Array:
    """Steps of equal length in sqrt(t), shorter towards the data.

    J. Song et al., https://arxiv.org/abs/2010.02502, appendix D.2.
    """
    return uniform(process, steps) ** 2


def karras(
    process: Process, steps: int, *, rho: float = 7.0, sigma_min: float | None = None
) -> jax.Array:
    """Steps of equal length in (sigma / alpha)^(1 / rho) down to `sigma_min`, and one to t = 0.

    T. Karras et al., https://arxiv.org/abs/2206.00364, equation 5, mapped to the times of any
    process. The default of `sigma_min` is that of the process if it has one, else 0.002. Where the
    process itself stops above it, all steps are of equal length.
    """
    check_positive(**{"karras: rho": rho})
    sigma_min = getattr(process, "sigma_min", 0.002) if sigma_min is None else sigma_min
    last, first = (process.sigma(t) / process.alpha(t) for t in (jnp.zeros(()), jnp.ones(())))
    if not 0 < sigma_min < first:
        raise InputError(
            f"karras: sigma_min is {sigma_min}; it must be between 0 and {first:.4g}, that of t = 1"
        )
    nodes = steps if sigma_min > last else steps + 1
    part = jnp.arange(nodes) / max(nodes - 1, 1)
    roots = first ** (1 / rho), jnp.maximum(sigma_min, last) ** (1 / rho)
    ratio = (roots[0] + part * (roots[1] - roots[0])) ** rho
    return _from_one_to_zero(time_at(process, ratio), steps)


def log_snr(process: Process, steps: int) -> jax.Array:
    """Steps of equal length in log(alpha / sigma).

    C. Lu et al., https://arxiv.org/abs/2206.00927, section 3.4.
    """
    last, first = (process.sigma(t) / process.alpha(t) for t in (jnp.zeros(()), jnp.ones(())))
    ratio = first * (last / first) ** (jnp.arange(steps + 1) / steps)
    return _from_one_to_zero(time_at(process, ratio), steps)


def _from_one_to_zero(times: jax.Array, steps: int) -> jax.Array:
    """Ends without rounding; `times` may lack the last."""
    return jnp.zeros(steps + 1).at[:steps].set(times[:steps]).at[0].set(1.0)
