"""What a saved run has learned: all of it, or a part as the beginning of another model."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from cvjax.errors import InputError, nearest
from cvjax.train import sharding
from cvjax.train.checkpoint import read_state
from cvjax.train.checkpoint_files import (
    METADATA,
    Saved,
    damage,
    describe,
    flatten,
    newest,
    read_arrays,
    read_metadata,
)
from cvjax.train.start import example_batch, shapes_of, state_maker, use_compilation_cache
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.step import Decay
from cvjax.train.task import Task

STATE = "model_state/"

log = logging.getLogger("cvjax")


class Row(NamedTuple):
    """What became of one array."""

    path: str
    shape: str
    status: str


@dataclass(frozen=True)
class Table:
    """What became of every array of the model, and of every one that was to be taken.

    The status is one of: loaded; left (no rule speaks of it); missing (a rule does, but it was not
    saved); shape differs; unused (to be taken, but the model does not have it).
    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        path, shape, _ = (max(map(len, column)) for column in zip(*self.rows, strict=True))
        return "\n".join(
            f"{row.path:{path}}  {row.shape:{shape}}  {row.status}" for row in self.rows
        )


def load_params(
    params: Params,
    model_state: PyTree,
    *,
    path: str | os.PathLike,
    take: Mapping[str, str] | None = None,
    use_ema: bool = False,
) -> tuple[Params, PyTree, Table]:
    """Returns both with what `take` names replaced from a checkpoint, and what became of each.

    Dtypes and shardings stay. The code that made the checkpoint is not needed. It is what
    `fit(initialize=...)` takes, with `path` bound.

    Args:
      params: of the new model, {group: pytree}.
      model_state: its other collections, {"batch_stats": pytree} for example.
      path: a work directory (the newest checkpoint that is whole) or the folder of one step.
      take: {path among the saved params: path in `params`}, each of an array or of all below it,
        like {"model/encoder": "student/backbone"}; "" is the root. Paths in the model state begin
        with "model_state/": {"model_state/batch_stats": "model_state/batch_stats"}. None: all of
        both, where it was.
      use_ema: takes the moving average of those groups that have one.

    Raises:
      InputError: there is no checkpoint, or it is damaged; a rule names nothing in the checkpoint
        or nothing in the model, or nothing of it fits.
    """
    rules = {"": ""} if take is None else take
    if not isinstance(rules, Mapping) or not (
        rules and all(isinstance(name, str) for pair in rules.items() for name in pair)
    ):
        raise InputError(
            f"take is {take!r}; it must be {{path in the checkpoint: path in the model}}"
        )
    saved = _find(Path(str(path)))  # a flag makes a number of a name of digits
    kinds = ("params/", "ema/") if use_ema else ("params/",)
    sources = {
        name.removeprefix(kind): name
        for kind in kinds
        for name in saved.arrays
        if name.startswith(kind)
    }
    sources |= {name: name for name in saved.arrays if name.startswith(STATE)}
    tree = (params, model_state)
    target = flatten(params) | {STATE + name: x for name, x in flatten(model_state).items()}
    shapes = {name: describe(leaf) for name, leaf in target.items()}
    rows = {name: Row(name, shape, "left") for name, shape in shapes.items()}
    chosen: dict[str, str] = {}  # path in the model: path in the checkpoint
    for there, here in rules.items():
        old = _below(there, sources, f"checkpoint {saved.path}")
        new = _below(here, target, "the model")
        fitting = {
            new[rest]: sources[old[rest]]
            for rest in new.keys() & old.keys()
            if _shape(saved.arrays[sources[old[rest]]]) == _shape(shapes[new[rest]])
        }
        if not fitting:
            raise InputError(
                f"take: nothing below {there!r} has a path and shape as below {here!r}"
            )
        chosen |= fitting
        for rest, name in new.items():
            status = "loaded" if name in chosen else "shape differs" if rest in old else "missing"
            rows[name] = Row(name, shapes[name], status)
        for rest in sorted(old.keys() - new.keys()):
            source = sources[old[rest]]
            rows[source] = Row(source, saved.arrays[source], "unused")
    read = read_arrays(saved.path, chosen.values())
    leaves = [
        jax.device_put(read[chosen[name]].astype(leaf.dtype), getattr(leaf, "sharding", None))
        if name in chosen
        else leaf
        for name, leaf in target.items()
    ]
    return *jax.tree.unflatten(jax.tree.structure(tree), leaves), Table(tuple(rows.values()))


def load_state(
    task: Task,
    data: Any,
    workdir: str | os.PathLike,
    *,
    batch_size: int,
    ema: float | Decay | Mapping[str, Decay] | None = None,
    loader: Mapping[str, Any] | None = None,
) -> TrainState:
    """The newest valid state of the run in `workdir`, to predict with: `opt_state` is {}.

    `task`, `ema` and `loader` are those given to `fit`; of `data` only the shapes matter, so that
    it may be other data.

    Raises InputError when there is none, or when it is the state of another model.
    """
    use_compilation_cache()
    mesh, rng = sharding.data_mesh(), jax.random.key(0)
    example = example_batch(task, data, batch_size, loader)
    make_state, _, _ = state_maker(task, example, rng, optax.identity(), ema, 1, mesh)
    like = shapes_of(make_state, rng, example, mesh).replace(opt_state={})
    saved = newest(Path(workdir) / "checkpoints")
    if saved is None:
        raise InputError(f"workdir {workdir} has no checkpoint; train first")
    state = read_state(saved, like, but="opt_state")
    log.info("loaded checkpoint %d of %s", saved.step, workdir)
    return state


def _find(path: Path) -> Saved:
    """The checkpoint in the folder of a step, or the newest of a work directory."""
    if (path / METADATA).is_file():
        if reason := damage(path):
            raise InputError(f"checkpoint {path} is damaged: {reason}")
        return read_metadata(path)
    saved = newest(path / "checkpoints") or newest(path)
    if saved is None:
        raise InputError(f"{path} has no checkpoint")
    return saved


def _below(prefix: str, paths: Iterable[str], where: str) -> dict[str, str]:
    """{what follows the prefix: path} for the paths that are at the prefix or below it."""
    start = f"{prefix}/" if prefix else ""
    found = {path[len(start) :]: path for path in paths if f"{path}/".startswith(start)}
    if not found:
        depth = prefix.count("/") + 1
        names = {"/".join(path.split("/")[:depth]) for path in paths}
        raise InputError(f"take: {where} has no parameters {prefix!r}{nearest(prefix, names)}")
    return found


def _shape(described: str) -> str:
    return described.partition("[")[2]
