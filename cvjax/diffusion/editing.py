"""Editing with a trained denoiser: filling holes, encoding images as noise, mixing their noises."""

import math

import jax
import jax.numpy as jnp

from cvjax.checks import check_count
from cvjax.diffusion import grids
from cvjax.diffusion.process import Process, like, perturb, posterior, renewed, split
from cvjax.diffusion.samplers.integration import Denoise, begin, integrate, normal, time_steps
from cvjax.diffusion.samplers.ode import velocity
from cvjax.errors import InputError


def repaint(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    known: jax.Array,
    is_known: jax.Array,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
    repeats: int = 10,
) -> jax.Array:
    """Inpainting: draws what is not known of an image, given the rest.

    A. Lugmayr et al., https://arxiv.org/abs/2201.09865, algorithm 1: ancestral steps in which the
    known pixels are replaced by themselves with fresh noise, each taken `repeats` times, with the
    noise of the step added again in between, so that the two parts come to agree. It costs
    steps * repeats evaluations. Of p(unknown given known) it is an approximation, which gets better
    with both: few repeats ignore the known part, many of them with few steps vary too little.

    Args:
      denoise, process, keys [b], steps, times: as for a sampler.
      known: images [b, ...] in the range of the process; what is not known may be anything finite.
      is_known: bool, shape of `known` or broadcast to it.

    Returns:
      x at t = 0, shape of `known`: the known pixels exactly.

    Raises:
      InputError: repeats below 1, known images of whole numbers or not as many as keys, or a mask
        of another shape or dtype.
    """
    check_count(1, repeats=repeats)
    fits = is_known.ndim <= known.ndim and all(
        side in (1, whole)
        for side, whole in zip(is_known.shape[::-1], known.shape[::-1], strict=False)
    )
    if not jnp.issubdtype(known.dtype, jnp.floating) or len(keys) != len(known):
        raise InputError(
            f"repaint: known is {known.dtype} {list(known.shape)} for {len(keys)} keys; it must be "
            "floating, in the range of the process, with a row for each key"
        )
    if is_known.dtype != bool or not fits:
        raise InputError(
            f"repaint: is_known is {is_known.dtype} {list(is_known.shape)}; it must be bool and "
            f"broadcast to {list(known.shape)}"
        )
    shape = known.shape[1:]
    grid = time_steps(times, process, steps)

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        kept = process.alpha(t) / process.alpha(s)
        added = process.sigma(t) * jnp.sqrt(renewed(process, t, s))

        def draw(x: jax.Array, fresh: jax.Array, noise: jax.Array) -> jax.Array:
            x0, eps = split(process, process.prediction, denoise(x, t), x, t)
            mean, std = posterior(process, x0, eps, t, s)
            return jnp.where(is_known, perturb(process, known, noise, s), mean + std * fresh)

        def again(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            fresh, noise, back = jnp.moveaxis(normal(keys, (3, *shape), number), 1, 0)
            return like(kept, x) * draw(x, fresh, noise) + like(added, x) * back, None

        numbers = index * repeats + jnp.arange(repeats)
        x, _ = jax.lax.scan(again, x, numbers[:-1])
        return draw(x, *jnp.moveaxis(normal(keys, (2, *shape), numbers[-1]), 1, 0))

    x = integrate(step, begin(process, keys, shape), grid, len(keys))
    return jnp.where(is_known, known, x)


def invert(
    denoise: Denoise,
    process: Process,
    x: jax.Array,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
) -> jax.Array:
    """The noise at t = 1 from which a deterministic sampler, with it as `start`, draws x [b, ...].

    The probability flow ODE run from data to noise, as in DDIM inversion (J. Song et al.,
    https://arxiv.org/abs/2010.02502, section 4.3), but by Heun's method: 2 * steps evaluations, and
    an error of order 2.

    Raises InputError for x of whole numbers: it must be in the range of the process.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"invert: x is {x.dtype}; it must be floating, in the range of the process"
        )
    grid = time_steps(times, process, steps)[::-1]

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        here = velocity(denoise, process, x, t)
        there = velocity(denoise, process, x + like(s - t, x) * here, s)
        return x + like(s - t, x) * (here + there) / 2

    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.result_type(float)))
    return integrate(step, x, grid, len(x))


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
    """Spherical interpolation of noises [b, ...]: a for weight 0, b for 1; weight is [] or [b].

    K. Shoemake, Animating Rotation with Quaternion Curves (1985). Between independent noises the
    result has the length that noise has, where a straight line would be shorter. That is what is
    taken where there is no angle, for one of them is zero. Between a and -a there is no one way:
    the result is not finite, or as short as rounding makes it.
    """
    dot = lambda x, y: jnp.sum(x * y, axis=range(1, a.ndim), keepdims=True)  # noqa: E731
    has_angle = (dot(a, a) > 0) & (dot(b, b) > 0)
    norms = (jnp.sqrt(jnp.where(has_angle, dot(x, x), 1.0)) for x in (a, b))
    cosine = dot(a, b) / math.prod(norms)
    # At an angle of 0 the slope of arccos is infinite, that of the result is that of a line.
    has_angle = has_angle & (cosine < 1)
    angle = jnp.arccos(jnp.where(has_angle, jnp.maximum(cosine, -1.0), 0.0))
    angle = jnp.where(has_angle, angle, 0.0)
    weight = like(jnp.broadcast_to(jnp.asarray(weight, a.dtype), (len(a),)), a)
    # sinc keeps its precision where the angle is 0 and both weights are those of a straight line.
    part = lambda w: w * jnp.sinc(w * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)  # noqa: E731
    return part(1 - weight) * a + part(weight) * b
