"""The likelihood of images: a bound by the diffusion (VLB), or exact by the probability flow ODE.

Both give log densities in nats, of the x that the process sees: images in [-1, 1]. An 8-bit image
has a probability, not a density; the usual way from one to the other is uniform dequantization
(L. Theis et al., https://arxiv.org/abs/1511.01844, section 3.1): add noise, uniform in a grey
level, and the log density of the result, minus the log of the number of grey levels in a unit of x,
is on average at most the log probability that the model gives to the image.

So with D numbers in an image, and 256 levels of width 2 / 256,

    bits per dimension = -log p(x) / (D log 2) + log2(256 / 2)

The offset is 7 for [-1, 1]; it would be 8 for images in [0, 1], whose density is 2^D times higher.
A network that was trained on images without that noise has learned 256 spikes, and where it has
learned them well such a density is very low: train on what `dequantize` returns.

x at t = 0 is alpha(0) x_0 with noise of sigma(0), not x_0. Both functions take that into account:
the density is that of x_{t=0} / alpha(0), which is x_0 blurred by sigma(0) / alpha(0).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_count
from cvjax.diffusion import grids
from cvjax.diffusion.process import Process, convert, like, log_snr, perturb, time_at
from cvjax.diffusion.samplers.integration import Denoise, integrate, normal, time_steps
from cvjax.diffusion.samplers.ode import velocity
from cvjax.errors import InputError

Field = Callable[[jax.Array], jax.Array]


def dequantize(pixels: jax.Array, keys: jax.Array, levels: int = 256) -> jax.Array:
    """Integers 0 .. levels - 1, [b, ...], to numbers in [-1, 1): uniform within their level.

    The keys [b] are one for each image. A level k is [2 k / levels - 1, 2 (k + 1) / levels - 1).
    Raises InputError for pixels that are no integers and, outside of jit, of no level.
    """
    check_count(2, **{"dequantize: levels": levels})
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        raise InputError(f"dequantize: pixels are {pixels.dtype}; they must be integers")
    if not isinstance(pixels, jax.core.Tracer) and pixels.size:
        low, high = (int(end(np.asarray(pixels))) for end in (np.min, np.max))
        if low < 0 or high >= levels:
            raise InputError(
                f"dequantize: pixels go from {low} to {high}; of {levels} levels they must be in "
                f"[0, {levels - 1}]"
            )
    noise = jax.vmap(lambda key: jax.random.uniform(key, pixels.shape[1:]))(keys)
    # Of as many bits as the levels leave in a float32: no sum is rounded up to the next level.
    parts = 2.0 ** (23 - (levels - 1).bit_length())
    return 2 * (pixels + jnp.floor(noise * parts) / parts) / levels - 1


def bits_per_dimension(
    log_likelihood: jax.Array, dimensions: int, *, width: float = 2.0, levels: int = 256
) -> jax.Array:
    """Log densities in nats, any shape, to bits for each of the numbers in an image.

    Args:
      log_likelihood: of images whose `levels` grey levels fill an interval of length `width`.
      dimensions: how many numbers an image has, height * width * channels.
    """
    return -log_likelihood / (dimensions * jnp.log(2.0)) + jnp.log2(levels / width)


def hutchinson(field: Field, x: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(field(x) [b, ...], an estimate of its divergence [b]) by one random direction of signs.

    M. Hutchinson (1989); W. Grathwohl et al., https://arxiv.org/abs/1810.01367, section 3.1. It is
    right on average over the keys [b].
    """
    signs = jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))(keys)
    value, change = jax.jvp(field, (x,), (signs,))
    return value, jnp.sum(signs * change, axis=range(1, x.ndim))


def exact_divergence(field: Field, x: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same without an error, at one derivative for each number in an image."""
    size = math.prod(x.shape[1:])
    value, derivative = jax.linearize(field, x)

    def diagonal(direction: jax.Array) -> jax.Array:
        direction = direction.reshape(x.shape[1:])
        change = derivative(jnp.broadcast_to(direction, x.shape))
        return jnp.sum(direction * change, axis=range(1, x.ndim))

    return value, jnp.sum(jax.vmap(diagonal)(jnp.eye(size, dtype=x.dtype)), axis=0)


def ode_log_likelihood(
    denoise: Denoise,
    process: Process,
    x: jax.Array,
    keys: jax.Array,
    steps: int,
    *,
    times: grids.TimeGrid = grids.log_snr,
    divergence: Callable = hutchinson,
) -> jax.Array:
    """log p(x), [b], of the model that is sampled by the probability flow ODE.

    Y. Song et al., https://arxiv.org/abs/2011.13456, equation 39: the log density of the noise at
    the end, N(0, sigma(1)^2 I), plus the integral of the divergence of the velocity on the way, by
    the classical Runge-Kutta method of order 4 (4 evaluations and as many derivatives a step).

    Args:
      denoise: (x [b, ...], t [b]) -> what `process.prediction` names; each row of its own.
      x: [b, ...], float in [-1, 1].
      keys: [b], for the directions of `hutchinson`, one for each image along its whole way.
      steps, times: as of a sampler.
      divergence: `hutchinson` or `exact_divergence`.
    """
    grid = time_steps(times, process, steps)[::-1]
    x = _checked(x, keys)
    dimensions = math.prod(x.shape[1:])

    def slope(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return divergence(lambda x: velocity(denoise, process, x, t), x, keys)

    def step(state, index, t, s):
        x, gained = state
        length = s - t
        v1, d1 = slope(x, t)
        v2, d2 = slope(x + like(length, x) / 2 * v1, t + length / 2)
        v3, d3 = slope(x + like(length, x) / 2 * v2, t + length / 2)
        v4, d4 = slope(x + like(length, x) * v3, s)
        x = x + like(length, x) / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        return x, gained + length / 6 * (d1 + 2 * d2 + 2 * d3 + d4)

    zero, one = jnp.zeros(len(x), x.dtype), jnp.ones(len(x), x.dtype)
    alpha = process.alpha(zero)
    noise, gained = integrate(step, (like(alpha, x) * x, zero), grid, len(x))
    return _log_normal(noise, process.sigma(one)) + gained + dimensions * jnp.log(alpha)


def vlb(
    denoise: Denoise,
    process: Process,
    x: jax.Array,
    keys: jax.Array,
    steps: int,
) -> jax.Array:
    """An unbiased estimate of the lower bound on log p(x), [b], of the model with the reverse SDE.

    D. Kingma et al., https://arxiv.org/abs/2107.00630, equations 11 and 15: the bound is

        -D/2 (1 + log(2 pi sigma(0)^2 / alpha(0)^2)) - KL(q(x_1 given x) || N(0, sigma(1)^2 I))
        - 1/2 int E |eps - eps'|^2 d log SNR

    The first term decodes x_{t=0} / alpha(0), with the noise that is left, to x. The integral is
    over equal parts of log SNR, one random time in each for each image: its error falls with
    `steps`, but on average over the keys it is right for any number, of which each is one
    evaluation.

    Args: as of `ode_log_likelihood`.
    """
    check_count(1, steps=steps)
    x = _checked(x, keys)
    batch, dimensions, axes = len(x), math.prod(x.shape[1:]), tuple(range(1, x.ndim))
    zero, one = jnp.zeros(batch, x.dtype), jnp.ones(batch, x.dtype)
    highest, lowest = log_snr(process, zero), log_snr(process, one)
    square = lambda x: jnp.sum(x**2, axis=axes)  # noqa: E731

    def part(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * index)
        u = jax.vmap(jax.random.uniform)(own)
        level = highest + (lowest - highest) * (index + u) / steps
        t = time_at(process, jnp.exp(-level / 2)).astype(x.dtype)
        eps = normal(keys, x.shape[1:], 2 * index + 1).astype(x.dtype)
        noisy = perturb(process, x, eps, t)
        found = convert(process, process.prediction, "eps", denoise(noisy, t), noisy, t)
        return total + square(eps - found), None

    errors, _ = jax.lax.scan(part, zero, jnp.arange(steps))
    diffusion = (highest - lowest) / (2 * steps) * errors
    decoder = -dimensions / 2 * (1 + jnp.log(2 * jnp.pi) - highest)
    # Both have the same variance, so that only the means differ.
    prior = square(like(process.alpha(one) / process.sigma(one), x) * x) / 2
    return decoder - prior - diffusion


def _checked(x: jax.Array, keys: jax.Array) -> jax.Array:
    """x, which has a key for each row, as floats at least as precise as those of the times."""
    if keys.shape[:1] != x.shape[:1]:
        raise InputError(
            f"keys are {list(keys.shape)}, of {len(x)} images; there must be one for each"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"x is {x.dtype}; a density is of floats in [-1, 1]: take what dequantize returns"
        )
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


def _log_normal(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """log N(x; 0, sigma^2 I), [b]."""
    squares = jnp.sum((x / like(sigma, x)) ** 2, axis=range(1, x.ndim))
    return -squares / 2 - math.prod(x.shape[1:]) * (jnp.log(2 * jnp.pi) / 2 + jnp.log(sigma))
