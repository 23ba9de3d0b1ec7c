"""A task that learns nothing: a run with it measures the data path and the engine alone."""

from dataclasses import dataclass

import jax

from cvjax.train.state import Params, PyTree
from cvjax.train.task import Batch, Metrics, Objective


@dataclass(frozen=True)
class NoOp:
    """Trains nothing on any data; `fit` then neither evaluates nor saves, only reports speed."""

    objectives: tuple[Objective, ...] = ()

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """No parameters."""
        return {}, {}

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """No metrics."""
        return {}

    def predict(self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array) -> Batch:
        """No outputs."""
        return {}

    def visualize(self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array) -> Batch:
        """No pictures."""
        return {}
