"""What a run has before its first step: an example of a batch, and the first state."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cvjax.checks import fitting
from cvjax.data.loader import Loader
from cvjax.train import sharding
from cvjax.train.optimizer import optimizers_by_group
from cvjax.train.state import PyTree, TrainState
from cvjax.train.step import Decay, check_decay, initial_state, start_of_average
from cvjax.train.task import Task

log = logging.getLogger("cvjax")


def first_batch(
    task: Task, data: Any, batch_size: int, loader: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """The first batch, which a task with a `check` may refuse."""
    # Where reading fails, as the run itself does; but without its threads and processes.
    names = ("transforms", "retries", "backoff", "bad_budget")
    options = {name: loader[name] for name in names if name in (loader or {})}
    return next(checked(task, Loader(data, batch_size, last="pad", **options).iterate()))


def checked(
    task: Task, batches: Iterator[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """The batches, each of which a task with a `check` may refuse."""
    for batch in batches:
        if hasattr(task, "check"):
            task.check(batch)
        yield batch


def example_batch(*of: Any) -> dict[str, np.ndarray]:
    """A batch of zeros of the same shapes, after the same checks."""
    return jax.tree.map(np.zeros_like, first_batch(*of))


def state_maker(
    task: Task,
    example: Mapping[str, np.ndarray],
    rng: jax.Array,
    optimizer: Any,
    ema: float | Decay | Mapping[str, Decay] | None,
    steps: int,
    mesh: Mesh,
) -> tuple[Callable[[jax.Array, PyTree], TrainState], dict, dict]:
    """The jitted maker of the first state, and the optimizers and decays by group."""
    groups = [group for group, _ in task.objectives]
    averages = ema if isinstance(ema, Mapping) else dict.fromkeys(groups, ema) if ema else {}
    averages = averages if groups else {}
    for group, decay in averages.items():
        check_decay(group, decay)
    params, _ = jax.eval_shape(task.init, rng, example)
    optimizers = optimizers_by_group(optimizer, params, groups, steps) if groups else {}
    # It runs once: what XLA's CPU compiler would optimize takes it 10 to 25 s, and without 3 to 6.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    make_state = jax.jit(
        lambda rng, batch: initial_state(task, batch, rng, optimizers, averages),
        out_shardings=sharding.replicated(mesh),
        compiler_options=quick,
    )
    return make_state, optimizers, averages


def shapes_of(make_state: Callable, rng: jax.Array, example: Any, mesh: Mesh) -> TrainState:
    """The state's shapes, for a restore that does not hold two states in memory."""
    whole = sharding.replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(make_state, rng, example),
    )


def initialized(
    state: TrainState, initialize: Callable, optimizers: Mapping[str, Any], mesh: Mesh
) -> TrainState:
    """The state with other params and model state; averages and optimizers start from these."""
    with fitting("initialize"):
        params, model_state, table = initialize(state.params, state.model_state)
    log.info("%s", table)
    # Some optimizers begin with a copy of the params (optax.contrib.schedule_free).
    start = jax.jit(
        lambda params: {name: one.init(params[name]) for name, one in optimizers.items()}
    )
    ema = {name: start_of_average(params[name]) for name in state.ema}
    state = state.replace(params=params, model_state=model_state, ema=ema, opt_state=start(params))
    return jax.tree.map(lambda x: jax.device_put(x, sharding.replicated(mesh)).copy(), state)


def use_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless the person chose a place or none."""
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "cvjax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
