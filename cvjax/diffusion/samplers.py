"""Samplers: from noise at t = 1 to data at t = 0, written once against a process.

Each takes `predict(x, t) -> Prediction`, with x [batch, ...] and t [batch], and is one
`lax.scan`. All randomness of an example comes from its own key, so that an image does not depend
on what else is in the batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cvjax.diffusion.process import Prediction, Process, expand, rates
from cvjax.errors import InputError

Predict = Callable[[jax.Array, jax.Array], Prediction]
Sampler = Callable[..., jax.Array]

SHORTEST = 1e-4  # alpha and sigma are bounded by it where their logarithm is needed


def noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [batch, *shape], each example from its key in `keys` [batch]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def ddim(
    predict: Predict,
    process: Process,
    x: jax.Array,
    keys: jax.Array,
    *,
    steps: int,
    eta: float = 0.0,
) -> jax.Array:
    """DDIM (Song, Meng and Ermon 2021, equation 12), first order; one evaluation a step.

    With eta = 1 it is the ancestral sampler: the noise added has the variance of the posterior,
    eta^2 (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2), from t to s < t.
    """

    def step(x: jax.Array, times: tuple) -> tuple[jax.Array, None]:
        t, s, number = times
        x0, eps = predict(x, jnp.full(x.shape[:1], t))
        alpha_t, sigma_t = process.alpha(t), process.sigma(t)
        alpha_s, sigma_s = process.alpha(s), process.sigma(s)
        added = 0.0
        if eta:
            between = jnp.maximum(sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2, 0.0)
            added = eta * sigma_s / sigma_t * jnp.sqrt(between)
        x = alpha_s * x0 + jnp.sqrt(jnp.maximum(sigma_s**2 - added**2, 0.0)) * eps
        if eta:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
            x = x + added * noise(step_keys, x.shape[1:])
        return x, None

    t = _grid(steps)
    return jax.lax.scan(step, x, (t[:-1], t[1:], jnp.arange(steps)))[0]


def heun(
    predict: Predict, process: Process, x: jax.Array, keys: jax.Array, *, steps: int
) -> jax.Array:
    """Heun's method on the probability-flow ODE dx/dt = alpha' x0 + sigma' eps, second order.

    Two evaluations a step and one for the last, which is Euler's (Karras et al. 2022,
    algorithm 1).
    """

    def slope(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.full(x.shape[:1], t)
        x0, eps = predict(x, t)
        alpha_rate, sigma_rate = rates(process, expand(t, x))
        return alpha_rate * x0 + sigma_rate * eps

    def step(x: jax.Array, times: tuple) -> tuple[jax.Array, None]:
        t, s = times
        first = slope(x, t)
        second = slope(x + (s - t) * first, s)
        return x + (s - t) * 0.5 * (first + second), None

    t = _grid(steps)
    x = jax.lax.scan(step, x, (t[:-2], t[1:-1]))[0]
    return x + (t[-1] - t[-2]) * slope(x, t[-2])


def dpm_solver_2m(
    predict: Predict, process: Process, x: jax.Array, keys: jax.Array, *, steps: int
) -> jax.Array:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step.

    The first and the last step are of first order: there is no step before the one, and the
    other ends where the log-SNR is infinite.
    """

    def half_log_snr(t: jax.Array) -> jax.Array:
        alpha, sigma = (jnp.maximum(f(t), SHORTEST) for f in (process.alpha, process.sigma))
        return jnp.log(alpha) - jnp.log(sigma)

    def step(carry: tuple, times: tuple) -> tuple[tuple, None]:
        x, x0_before, h_before = carry
        t, s, number = times
        x0, _ = predict(x, jnp.full(x.shape[:1], t))
        h = half_log_snr(s) - half_log_snr(t)
        first_order = (number == 0) | (number == steps - 1)
        slope = jnp.where(first_order, 0.0, 0.5 * h / h_before)
        direction = x0 + slope * (x0 - x0_before)
        shrink = process.sigma(s) / process.sigma(t)
        x = shrink * x + (process.alpha(s) - shrink * process.alpha(t)) * direction
        return (x, x0, h), None

    t = _grid(steps)
    start = (x, jnp.zeros_like(x), jnp.ones(()))
    return jax.lax.scan(step, start, (t[:-1], t[1:], jnp.arange(steps)))[0][0]


def guided(
    predict: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    label: jax.Array,
    null: int,
    weight: float,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Classifier-free guidance of a network's output: any + weight * (class - any).

    Ho and Salimans 2022, equation 6, with weight = 1 + their w: 1 is no guidance (and costs one
    evaluation), 0 ignores the class. `predict(x, t, label)`; `null` is the class "any".
    """
    if weight == 1:
        return lambda x, t: predict(x, t, label)

    def both(x: jax.Array, t: jax.Array) -> jax.Array:
        labels = jnp.concatenate([label, jnp.full_like(label, null)])
        output = predict(jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels)
        conditional, unconditional = jnp.split(output, 2)
        return unconditional + weight * (conditional - unconditional)

    return both


def _grid(steps: int) -> jax.Array:
    if steps < 1:
        raise InputError(f"sample_steps is {steps}; it must be at least 1")
    return jnp.linspace(1.0, 0.0, steps + 1)
