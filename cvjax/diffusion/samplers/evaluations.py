"""How often a sampler asks the network (NFE): what it costs, whatever it calls a step."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from cvjax.diffusion.process import Process
from cvjax.diffusion.samplers.integration import Denoise, Shape
from cvjax.errors import InputError
from cvjax.train.task import example_keys


def evaluations(
    sampler: Callable[..., jax.Array],
    process: Process,
    steps: int,
    *,
    shape: Shape = (1,),
    answer: Denoise = lambda x, t: x,
) -> int:
    """Evaluations of `denoise` for one image, counted in the sampler's own program.

    Args:
      sampler: one of `cvjax.diffusion.samplers`, its settings bound.
      shape, answer: of an image, and of what `denoise` gives, for a sampler that minds these.

    Raises:
      InputError: the number is not known beforehand; `adaptive.solve` returns it.
    """

    @jax.jit  # a function with a name stays one equation of the program
    def network_evaluation(x: jax.Array, t: jax.Array) -> jax.Array:
        return answer(x, t)

    def sample(keys: jax.Array) -> jax.Array:
        return sampler(network_evaluation, process, keys, shape, steps)

    return _count(jax.make_jaxpr(sample)(example_keys(jax.random.key(0), 1)).jaxpr)


def _count(program: Any) -> int:
    total = 0
    for equation in program.eqns:
        if equation.params.get("name") == "network_evaluation":
            total += 1
            continue
        inside = sum(map(_count, _programs(equation.params)))
        if inside and equation.primitive.name not in ("scan", "jit", "closed_call"):
            raise InputError(
                "the evaluations of an adaptive sampler are known only when it has run: "
                "samplers.adaptive.solve returns them"
            )
        total += inside * equation.params.get("length", 1)
    return total


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in jax.tree.leaves(tuple(params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(value, "eqns"):
            yield value
