"""The Task protocol: all that the engine knows of a piece of research."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from clu.metrics import Average

from cvjax.train.state import Params, PyTree, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Average]
Loss = Callable[[Params, TrainState, Batch, jax.Array], tuple[jax.Array, tuple[PyTree, Metrics]]]


class Objective(NamedTuple):
    """One gradient step: `params[group]` descends along `loss`.

    `loss(params, state, batch, rng) -> (scalar, (model_state, metrics))`. The gradient is taken
    with respect to `params[group]` alone. `state` is the TrainState at the beginning of this
    objective: its `step`, `model_state` and `ema` may be read.
    """

    group: str
    loss: Loss


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass of modules and hyper-parameters, without arrays.

    A batch is a dictionary of arrays whose first axis is the example. It always holds `valid`,
    bool [batch]: False marks padding and examples that could not be read; losses and metrics
    must not depend on them. Under `jit` a batch is global: no task knows about devices.

    A task may also have two methods: `check(batch)`, which raises InputError for a batch on the
    host, of training or held out, that it cannot take (each is shown to it, the first of both
    before a run begins: it should be quick); and `summary() -> str`, a line for people.
    """

    @property
    def objectives(self) -> Sequence[Objective]:
        """The objectives of one train step, in the order in which they are taken."""

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns ({group: pytree of parameters}, model_state)."""

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the metrics of a held-out batch that are plain means (loss, accuracy)."""

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns what evaluators and `--mode=predict` use; first axis as in the batch.

        The batch also has `index`, int32 [batch], each row's place in the held-out set, and `rng`
        is the same for all batches: what is drawn for an example with a key of its place is the
        same whatever the batch size (`example_keys`, `first_row`).
        """

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns pictures for people, {name: [height, width, channels] in [0, 1]}."""


def first_row(batch: Batch) -> jax.Array | int:
    """The place of a batch's first row in the held-out set; 0 where the batch does not say."""
    return batch["index"][0] if "index" in batch else 0


def example_keys(rng: jax.Array, count: int, first: int = 0) -> jax.Array:
    """The keys of the examples `first`, `first` + 1, ...: the same however a batch is split."""
    return jax.vmap(lambda index: jax.random.fold_in(rng, index))(first + jnp.arange(count))


def mean(values: jax.Array, valid: jax.Array | None = None) -> Average:
    """The mean of `values` [batch] over the `valid` [batch] ones, as (total, count).

    Kept as a pair so that short batches and several devices give the exact mean. A value that
    is not valid may be anything, NaN included.
    """
    if valid is None:
        valid = jnp.ones(jnp.shape(values), bool)
    values = jnp.asarray(values, jnp.float32)
    return Average(
        total=jnp.sum(jnp.where(valid, values, 0.0)), count=jnp.sum(valid.astype(jnp.int32))
    )
