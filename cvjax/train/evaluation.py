"""The metrics and pictures of the whole of the held-out data."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax.errors import ScopeParamShapeError

from cvjax.data.loader import Loader
from cvjax.errors import InputError, naming_fields
from cvjax.train import sharding
from cvjax.train.metrics import means, pairs
from cvjax.train.start import checked, first_batch
from cvjax.train.state import TrainState
from cvjax.train.task import Task


@runtime_checkable
class Evaluator(Protocol):
    """Needs the outputs for the whole set; must leave out examples that are not `valid`.

    Each evaluation works with a deep copy of what `fit` was given, as it was given. Before it
    trains, `fit` shows one the first batch with outputs of zeros: what it misses is told then; and
    one that also has `check(task)` the task, which it may refuse.
    One that also has `pictures() -> {name: [h, w, c] in [0, 1]}` shows them beside the task's.
    """

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Takes what `task.predict` gave for a batch."""

    def result(self) -> dict[str, float]:
        """The metrics of all that was added."""


def evaluate(
    task: Task,
    state: TrainState,
    data: Any,
    *,
    batch_size: int,
    evaluators: Mapping[str, Evaluator] | None = None,
    loader: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics of the whole of `data`, and pictures; with averaged params where there are."""
    mesh = sharding.data_mesh()
    sharding.check_batch_size(batch_size, mesh)
    batches = eval_loader_of(data, batch_size, loader)
    options = {**(loader or {}), "transforms": (loader or {}).get("eval_transforms", ())}
    first_batch(task, data, batch_size, options)  # which the task may refuse
    return Evaluation(task, batches, evaluators or {}, mesh, seed)(state)


@contextlib.contextmanager
def naming_shapes(batch: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Parameters that do not fit a batch, as of grey levels and colours, are one line."""
    try:
        yield
    except ScopeParamShapeError as error:
        shapes = ", ".join(f"{name} {list(x.shape[1:])}" for name, x in batch.items())
        raise InputError(f"the model was trained on examples of other shapes: {shapes}") from error


class Evaluation:
    """Compiles what an evaluation needs once, for all evaluations of a run."""

    def __init__(
        self, task: Task, loader: Loader | None, evaluators: Mapping, mesh: Any, seed: int
    ):
        self.task, self.loader, self.evaluators, self.mesh = task, loader, evaluators, mesh
        self.rng = jax.random.key(seed)

        def measure(params, model_state, batch, place, rng, key):
            metrics = task.evaluate(params, model_state, batch, rng)
            if not evaluators:
                return metrics, {}
            return metrics, task.predict(params, model_state, {**batch, **place}, key)

        # One program: what both work out alike, such as the network's outputs, it does once.
        whole = sharding.replicated(mesh)
        self.measure = jax.jit(measure, out_shardings=whole)
        self.visualize = jax.jit(task.visualize, out_shardings=whole)

    def rehearse(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> list[str]:
        """Traces what an evaluation runs, of shapes alone: it raises what that would raise.

        Returns the names of the task's own metrics.
        """
        params, model_state = state.averaged_params, state.model_state
        shapes = sharding.shapes_of_batch(batch, 1, self.mesh)
        place = sharding.shapes_of_batch(places(batch, 0), 1, self.mesh)
        keys = self.rng, prediction_key(self.rng)
        metrics, outputs = jax.eval_shape(self.measure, params, model_state, shapes, place, *keys)
        jax.eval_shape(self.visualize, params, model_state, shapes, self.rng)
        outputs = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), outputs)
        for name, evaluator in self.evaluators.items():
            with _naming(name):
                if hasattr(evaluator, "check"):
                    evaluator.check(self.task)
            _add(name, copy.deepcopy(evaluator), outputs, batch)
        return list(metrics)

    def __call__(self, state: TrainState) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The metrics, and the pictures of the first batch and of the evaluators."""
        params, model_state = state.averaged_params, state.model_state
        evaluators = {name: copy.deepcopy(one) for name, one in self.evaluators.items()}
        sums, pictures = [], {}
        for number, batch in enumerate(checked(self.task, self.loader.iterate())):
            rng = jax.random.fold_in(self.rng, number)
            on_device = sharding.put_whole_batch(batch, self.mesh)
            place = sharding.put_whole_batch(places(batch, number), self.mesh)
            with naming_shapes(batch):
                metrics, outputs = self.measure(
                    params, model_state, on_device, place, rng, prediction_key(self.rng)
                )
            sums.append(pairs(metrics))
            outputs = jax.device_get(outputs)
            for name, evaluator in evaluators.items():
                _add(name, evaluator, outputs, batch)
            if number == 0:
                pictures = jax.device_get(self.visualize(params, model_state, on_device, rng))
        found = means(sums)
        for name, evaluator in evaluators.items():
            for metric, value in evaluator.result().items():
                if np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
                    raise InputError(
                        f"evaluators.{name} gave {value!r} for {metric}; it must be a number"
                    )
                found[f"{name}/{metric}"] = value
            if hasattr(evaluator, "pictures"):
                pictures |= evaluator.pictures()
        return found, pictures


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"evaluators.{name}: {error}") from error


def _add(name: str, evaluator: Evaluator, outputs: Mapping, batch: Mapping) -> None:
    with _naming(name), naming_fields("it", outputs, batch):
        evaluator.add(outputs, batch)


def places(batch: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """`index` of the batch of that number, the place of each row in the set: for `predict`."""
    size = len(batch["valid"])
    return {"index": number * size + np.arange(size, dtype=np.int32)}


def prediction_key(rng: jax.Array) -> jax.Array:
    """The one key of all predictions of an evaluation."""
    return jax.random.fold_in(rng, 0)


def eval_loader_of(data: Any, batch_size: int, options: Mapping[str, Any] | None) -> Loader:
    """Every held-out example once, in order; `options` are the `loader` of `fit`."""
    options = dict(options or {})
    options["transforms"] = options.pop("eval_transforms", ())
    return Loader(data, batch_size, shuffle=False, epochs=1, last="pad", **options)
