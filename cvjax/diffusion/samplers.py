"""Samplers: from noise to images with the help of a denoiser, for any `Process`.

All share the signature `sampler(denoise, process, keys, shape, steps)`:

    denoise   (x [b, *shape], t [b]) -> what `process.prediction` names, the same shape as x
    keys      typed PRNG keys [b], one for each image: an image depends on its own key alone, not
              on its place in the batch
    shape     of one image
    steps     of equal length in t, from t = 1 to t = 0

and return float32 [b, *shape], x at t = 0. Each is one `lax.scan`: jit the caller.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cvjax.diffusion.process import Process, convert, log_snr, perturb, prior, split
from cvjax.errors import InputError

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Shape = tuple[int, ...]


def example_keys(rng: jax.Array, count: int, first: int = 0) -> jax.Array:
    """The keys of the examples `first`, `first` + 1, ...: the same however a batch is split."""
    return jax.vmap(lambda index: jax.random.fold_in(rng, index))(first + jnp.arange(count))


def ddim(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    eta: float = 0.0,
) -> jax.Array:
    """J. Song et al., https://arxiv.org/abs/2010.02502, equation 12: order 1.

    With `eta` = 0 it is deterministic, and for FlowMatching it is Euler's method; `eta` = 1 is
    ancestral sampling as in DDPM. Their variance (equation 16), written for any process, is that
    of p(x_s | x_t, x_0): sigma_s^2 (1 - alpha_t^2 sigma_s^2 / (alpha_s^2 sigma_t^2)).
    """

    if not 0 <= eta <= 1:
        raise InputError(f"ddim: eta is {eta}; it must be in [0, 1]")

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        x0, eps = split(process, process.prediction, denoise(x, t), x, t)
        if eta > 0:
            drawn = eta * jnp.sqrt(-jnp.expm1(log_snr(process, t) - log_snr(process, s)))
            drawn = drawn.reshape(-1, *[1] * len(shape))
            noise = _normal(jax.vmap(jax.random.fold_in, (0, None))(keys, index), shape)
            eps = jnp.sqrt(1 - drawn**2) * eps + drawn * noise
        return perturb(process, x0, eps, s)

    return _integrate(step, _start(process, keys, shape), steps, len(keys))


def heun(
    denoise: Denoise, process: Process, keys: jax.Array, shape: Shape, steps: int
) -> jax.Array:
    """Heun's method for the probability flow ODE dx/dt = velocity: order 2, two evaluations a step.

    T. Karras et al., https://arxiv.org/abs/2206.00364, algorithm 1, in the time t.
    """

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        return convert(process, process.prediction, "velocity", denoise(x, t), x, t)

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        length = (s - t).reshape(-1, *[1] * len(shape))
        here = velocity(x, t)
        there = velocity(x + length * here, s)
        return x + length * (here + there) / 2

    return _integrate(step, _start(process, keys, shape), steps, len(keys))


def dpm_solver_2m(
    denoise: Denoise, process: Process, keys: jax.Array, shape: Shape, steps: int
) -> jax.Array:
    """DPM-Solver++(2M): order 2 with one evaluation a step.

    C. Lu et al., https://arxiv.org/abs/2211.01095, algorithm 2: a step of DDIM, but with x_0
    extrapolated to the middle of the step, linearly in lambda = log(alpha / sigma), from this
    step and the one before. The first step, which has none before it, and the last, in which
    lambda rises too far to extrapolate, are of order 1.
    """

    def step(state, index, t, s):
        x, before = state
        x0, _ = split(process, process.prediction, denoise(x, t), x, t)
        now = log_snr(process, t)
        h, h_before = log_snr(process, s) - now, now - log_snr(process, t + (t - s))
        is_between = (index > 0) & (index < steps - 1)
        weight = jnp.where(is_between, h / (2 * h_before), 0.0).reshape(-1, *[1] * len(shape))
        middle = x0 + weight * (x0 - before)
        _, eps = split(process, "x0", middle, x, t)
        return perturb(process, middle, eps, s), x0

    x = _start(process, keys, shape)
    return _integrate(step, (x, jnp.zeros_like(x)), steps, len(keys))[0]


def _normal(keys: jax.Array, shape: Shape) -> jax.Array:
    """Noise [b, *shape], each row from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _start(process: Process, keys: jax.Array, shape: Shape) -> jax.Array:
    """Noise at t = 1, [b, *shape]."""
    return jax.vmap(lambda key: prior(process, key, shape))(keys)


def _integrate(step: Callable, state: Any, steps: int, batch: int) -> Any:
    """`state = step(state, index, t [b], s [b])`, from time t to time s, `steps` times."""
    if steps < 1:
        raise InputError(f"steps is {steps}; a sampler takes at least 1")

    def body(state: Any, index: jax.Array) -> tuple[Any, None]:
        t, s = (jnp.full(batch, 1 - i / steps) for i in (index, index + 1))
        return step(state, index, t, s), None

    return jax.lax.scan(body, state, jnp.arange(steps))[0]
