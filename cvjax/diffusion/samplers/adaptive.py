"""The probability flow ODE by an adaptive Runge-Kutta method (`pip install 'cvjax[diffusion]'`)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_between, check_count, check_positive
from cvjax.diffusion.process import Process
from cvjax.diffusion.samplers.integration import Denoise, Shape, begin
from cvjax.diffusion.samplers.ode import velocity
from cvjax.errors import InputError


def adaptive(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    start: jax.Array | None = None,
) -> jax.Array:
    """The method of Dormand and Prince, order 5: steps as long as the tolerances allow.

    Y. Song et al., https://arxiv.org/abs/2011.13456, section 4.3. Each image has steps of its own,
    so that it does not depend on its neighbours; a batch takes as many as its slowest image. It has
    no derivative: where one is wanted, take `heun`.

    Args:
      steps: the most that it may take.
      rtol, atol: the error of a step is to be below atol + rtol |x|.

    Raises:
      InputError: an image needs more steps. It comes out of a compiled program as text, inside of
        a JaxRuntimeError.
    """
    return solve(denoise, process, keys, shape, steps, rtol=rtol, atol=atol, start=start)[0]


def solve(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    start: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `adaptive`, and how often each image asked the network, int32 [b]."""
    diffrax = _diffrax()
    check_count(1, steps=steps)
    check_between(0, math.inf, **{"adaptive: rtol": rtol})
    check_positive(**{"adaptive: atol": atol})
    x = begin(process, keys, shape, start)

    # The solver sees one image; the network sees the batch, with all that belongs to its rows. What
    # `denoise` holds (parameters, labels) is handed on as arguments: a rule for vmap can hold
    # nothing that is traced.
    program = jax.make_jaxpr(lambda x, t: velocity(denoise, process, x, t))(
        x, jnp.ones(len(x), x.dtype)
    )

    @jax.custom_batching.custom_vmap
    def one(x: jax.Array, t: jax.Array, held: list[jax.Array]) -> jax.Array:
        return jnp.zeros_like(x)  # only its shape is asked for, outside vmap

    @one.def_vmap
    def batch(size: int, is_batched: list, x: jax.Array, t: jax.Array, held: list[jax.Array]):
        x, t = (
            a if has_rows else jnp.broadcast_to(a, (size, *a.shape))
            for a, has_rows in zip((x, t), is_batched, strict=False)
        )
        return jax.core.eval_jaxpr(program.jaxpr, held, x, t)[0], True

    def solve_one(x: jax.Array, held: list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, held: one(x, jnp.asarray(t, x.dtype), held)),
            diffrax.Dopri5(),
            t0=1.0,
            t1=0.0,
            dt0=None,
            y0=x,
            args=held,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=steps,
            throw=False,
        )
        # Six new evaluations in each step, accepted or not, and one for the first of the first.
        # diffrax tries none to find the first length where it integrates backwards.
        number = 6 * solution.stats["num_steps"] + 1
        return solution.ys[0], number, solution.result == diffrax.RESULTS.successful

    def check(is_done: jax.Array) -> np.ndarray:
        if missing := int(np.sum(~np.asarray(is_done))):
            raise InputError(
                f"the adaptive sampler did not end after {steps} steps for {missing} of "
                f"{len(is_done)} images; give it more steps, or an rtol above {rtol} and an atol "
                f"above {atol}"
            )
        return np.ones((), bool)

    images, number, is_done = jax.vmap(solve_one, (0, None))(
        x, [jnp.asarray(c) for c in program.consts]
    )
    are_done = jax.pure_callback(
        check, jax.ShapeDtypeStruct((), bool), is_done, vmap_method="sequential"
    )
    return jnp.where(are_done, images, jnp.nan), number


def _diffrax():
    try:
        import diffrax
    except ImportError as error:
        raise InputError(
            "the adaptive sampler needs diffrax; pip install 'cvjax[diffusion]'"
        ) from error
    return diffrax
