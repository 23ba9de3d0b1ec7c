"""What main.py does with a config: build it and train, evaluate or predict."""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cvjax import config as configs
from cvjax import draw, files
from cvjax.build import build, check_value
from cvjax.data.sources import example_id
from cvjax.errors import InputError, from_callbacks, nearest
from cvjax.train.evaluation import (
    eval_loader_of,
    evaluate,
    naming_shapes,
    places,
    prediction_key,
)
from cvjax.train.loop import fit
from cvjax.train.restore import load_state
from cvjax.train.sharding import check_batch_size, data_mesh, put_whole_batch, replicated
from cvjax.train.state import TrainState
from cvjax.train.task import Task
from cvjax.train.writers import write_json, writing

log = logging.getLogger("cvjax")

DATA = {
    "train",
    "test",
    "transforms",
    "test_transforms",
    "threads",
    "processes",
    "retries",
    "bad_budget",
}
NOT_OF_CONFIG = {"workdir", "config", "loader", "eval_data", "check_only"}  # arguments of `fit`


def run(config: ConfigDict, workdir: Path, mode: str = "train") -> int:
    """Runs a config in a mode and returns the exit code.

    A config with `stages`, {name: config}, is run stage after stage, each in a folder of its own in
    `workdir`. The `initialize` of a stage that names no `path` takes the work directory of the
    stage before it. Other modes are those of the last stage; the config of all is saved, too.
    """
    if config.get("stages") is None:
        return _run(config, _build(config, mode), workdir, mode)
    plain, stages, previous = configs.save_json(config), [], None
    if not isinstance(config.stages, ConfigDict) or not len(config.stages):
        raise InputError(f"config.stages is {config.stages!r}; it must be configs by name")
    for name in plain["stages"]:  # in their order
        stage = config.stages[name]
        if not isinstance(stage, ConfigDict):
            raise InputError(f"config.stages.{name} is {stage!r}; it must be a config")
        if previous and stage.get("initialize") and "path" not in stage.initialize:
            with stage.unlocked():
                stage.initialize.path = str(previous)
        previous = workdir / name
        # All are built first: a mistake in the last must not show after the first has trained.
        if mode == "train" or name == list(plain["stages"])[-1]:
            stages.append((stage, _build(stage, mode, f"config.stages.{name}"), previous))
    for stage, built, folder in stages[1:]:
        try:
            fit(check_only=True, **_built(stage, built, mode))
        except InputError as error:
            raise InputError(f"stage {folder.name}: {error}") from error
    for stage, built, folder in stages:
        log.info("stage %s", folder.name)
        code = _run(stage, built, folder, mode)
        if mode == "train" and workdir.exists() and jax.process_index() == 0:
            # Of each stage what was trained: one that is refused has changed nothing.
            done = {name: workdir / name / "config.json" for name in plain["stages"]}
            trained = {
                n: configs.save_json(configs.load_json(f)) for n, f in done.items() if f.is_file()
            }
            with writing(workdir):
                whole = {**plain, "stages": {**plain["stages"], **trained}}
                write_json(workdir / "config.json", whole)
        if code:
            return code
    return 0


class Run(NamedTuple):
    """A run that was trained: its task, its newest state, and its data.

    The state is without that of the optimizers, `train` None where the data is no longer there.
    """

    task: Any
    state: TrainState
    train: Any
    test: Any


def load_run(workdir: Path, changes: list[tuple[str, str]] = ()) -> Run:
    """Reads a run back from its work directory alone, for a script or a notebook.

    `changes`, (field, value) as of `cvjax.config.override`, apply to the config that was saved.

    Raises:
      InputError: nothing was saved there, or a change does not fit.
    """
    config = configs.override(configs.load_json(Path(workdir) / "config.json"), changes)
    built = _built(config, _build(config, "load"), "load")
    state = _newest_state(built, Path(workdir))
    return Run(built["task"], state, built["data"], built["eval_data"])


def _build(config: ConfigDict, mode: str, path: str = "config") -> dict[str, Any]:
    """What a config makes; but for training it does without training data that is not there."""
    plain = configs.buildable(config)
    try:
        return build(plain, path)
    except InputError as error:
        data = dict(plain.get("data", {}))
        if mode == "train" or data.pop("train", None) is None or "test" not in data:
            raise
        built = build({**plain, "data": data}, path)
        log.warning("goes on without the training data, its classes are not compared: %s", error)
        return built


def _built(config: ConfigDict, built: dict[str, Any], mode: str) -> dict[str, Any]:
    """What was built as arguments of `fit`, after checks that take the whole config."""
    built = dict(built)
    fields = inspect.signature(fit).parameters
    fields = {k: v for k, v in fields.items() if k not in NOT_OF_CONFIG}
    for name, value in built.items():
        if name not in fields:
            raise InputError(f"config.{name}: no such field{nearest(name, fields)}")
        check_value(f"config.{name}", value, fields[name])
    for name in ("task", "data", "steps", "batch_size"):
        if built.get(name) is None:
            raise InputError(f"config.{name} is missing")
    if not isinstance(built["task"], Task):
        kind = type(built["task"]).__name__
        raise InputError(f"config.task is a {kind}, no task (the protocol is in cvjax.train.task)")
    data = built.pop("data")
    if not isinstance(data, Mapping):
        raise InputError(f"config.data is {data!r}; it must have the fields train and test")
    if data.get("train") is None and mode == "train":
        raise InputError("config.data.train is missing")
    for name in data:
        if name not in DATA:
            raise InputError(f"config.data.{name}: no such field{nearest(name, DATA)}")
    plain = configs.save_json(config)
    for name in ("train", "test"):
        check_num_classes(plain.get("task", {}), data.get(name), f"config.data.{name}")
    # The data path alone (`train.noop.NoOp`) evaluates nothing.
    evaluators = (plain.get("evaluators") or {}) if built["task"].objectives else {}
    check_num_classes(evaluators, data.get("test"), "config.data.test", "config.evaluators")
    check_class_names(data.get("train"), data.get("test"))
    loader = {name: value for name, value in data.items() if name not in ("train", "test")}
    loader["transforms"] = tuple((loader.get("transforms") or {}).values())
    loader["eval_transforms"] = tuple((loader.pop("test_transforms", None) or {}).values())
    return built | {"data": data.get("train"), "eval_data": data.get("test"), "loader": loader}


def _newest_state(built: dict[str, Any], workdir: Path) -> TrainState:
    data, loader = built["data"], built["loader"]
    if data is None:
        data, loader = built["eval_data"], {**loader, "transforms": loader["eval_transforms"]}
    return load_state(
        built["task"], data, workdir, batch_size=built["batch_size"], ema=built.get("ema"),
        loader=loader,
    )  # fmt: skip


@from_callbacks()
def _run(config: ConfigDict, built: dict[str, Any], workdir: Path, mode: str) -> int:
    plain, built = configs.save_json(config), _built(config, built, mode)
    if mode == "train":
        saved = workdir / "config.json"
        if os.path.exists(saved):  # that of a path is an error for a name that is too long
            for line in configs.differences(configs.save_json(configs.load_json(saved)), plain):
                log.warning("%s goes on with another config: %s", workdir, line)
        result = fit(workdir=workdir, config=plain, **built)
        if result.received is None and result.workdir is not None:
            log.info("done: look into %s (curves.png, pictures/, metrics.jsonl)", workdir)
        return 128 + result.received if result.received is not None else 0

    if built["eval_data"] is None:
        raise InputError(f"--mode={mode} needs held-out data, and config.data.test is missing")
    task, seed, size = built["task"], built.get("seed", 0), built["batch_size"]
    data, loader, state = built["eval_data"], built["loader"], _newest_state(built, workdir)
    if mode == "evaluate":
        found, pictures = evaluate(
            task, state, data, batch_size=size, evaluators=built.get("evaluators"), loader=loader,
            seed=seed,
        )  # fmt: skip
        if jax.process_index() == 0:
            for name, value in found.items():
                print(f"{name}: {value:.6g}")
            with writing(workdir):
                finite = {k: v if np.isfinite(v) else None for k, v in found.items()}
                write_json(workdir / "evaluation.json", finite)
                for name, picture in pictures.items():
                    draw.save_png(workdir / f"{name}.png", np.asarray(picture))
        return 0
    return _predict(task, state, data, size, loader, seed, workdir)


def check_num_classes(task: Any, source: Any, where: str, path: str = "config.task") -> None:
    """Raises InputError where a `num_classes` in the config is too small for a source's labels."""
    classes = getattr(source, "class_names", None)
    for name, value in task.items() if isinstance(task, Mapping) and classes else ():
        # Zero classes mean that labels are not looked at.
        if name == "num_classes" and value and value < len(classes):
            raise InputError(
                f"{path}.num_classes is {value}, but {where} has {len(classes)} classes; "
                f"set --{path}.num_classes={len(classes)}"
            )
        check_num_classes(value, source, where, f"{path}.{name}")


def check_class_names(train: Any, test: Any) -> None:
    """Raises InputError where a class has another number among held-out examples.

    So it happens when a folder of a class is missing. Sets with no class in common are fine.
    """
    ours, theirs = (
        {name: number for number, name in enumerate(getattr(source, "class_names", None) or ())}
        for source in (train, test)
    )
    for name in ours:
        if name in theirs and ours[name] != theirs[name]:
            raise InputError(
                f"config.data.test: {name!r} is class {theirs[name]} of {len(theirs)}, but "
                f"{ours[name]} of {len(ours)} in config.data.train: both must have the same classes"
            )


def default_workdir(config: str, changes: list[tuple[str, str]]) -> Path:
    """runs/<recipe>; with changes a name of its own, so that the same command resumes its run."""
    name = config.replace(":", "-").replace(".py", "").rpartition("/")[2]
    if changes:
        name += "-" + hashlib.sha256(json.dumps(sorted(changes)).encode()).hexdigest()[:8]
    return Path("runs") / name


def _predict(task, state, data, batch_size: int, loader, seed: int, workdir: Path) -> int:
    """Writes what the task predicts for all that is held out to predictions.npz.

    `index` and `id` say which example of the source a row is of: one that cannot be read has none.
    Where images have several sizes and so have the outputs, those are `<name>/<index>`.
    """
    mesh, rows, rng = data_mesh(), [], prediction_key(jax.random.key(seed))
    check_batch_size(batch_size, mesh)
    predict = jax.jit(task.predict, out_shardings=replicated(mesh))
    for number, batch in enumerate(eval_loader_of(data, batch_size, loader).iterate()):
        place = places(batch, number)
        # A text is for people, and no task reads one.
        numbers = {name: x for name, x in batch.items() if x.dtype.kind not in "US"}
        placed = put_whole_batch({**numbers, **place}, mesh)
        with naming_shapes(batch):
            outputs = predict(state.averaged_params, state.model_state, placed, rng)
        outputs = jax.device_get(outputs)
        for name, value in outputs.items():
            if value.dtype.kind == "V":  # NumPy files have no bfloat16
                outputs[name] = value.astype(np.float32)
        rows.append({k: v[batch["valid"]] for k, v in {**place, **outputs}.items()})
    if jax.process_index() != 0:
        return 0
    columns, told = {}, []
    index = np.concatenate([row["index"] for row in rows])
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if len({part.shape[1:] for part in parts}) == 1:
            columns[name] = np.concatenate(parts)
            told.append(f"{name} {list(columns[name].shape)}")
        else:  # images of any size: an array for each
            columns |= {f"{name}/{i}": v for i, v in zip(index, chain(*parts), strict=True)}
            told.append(f"{name}/0 and so on")
    columns["id"] = np.array([example_id(data, int(index)) for index in columns["index"]])

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **columns)

    with writing(workdir):
        files.replace(workdir / "predictions.npz", write)
    print(f"{workdir / 'predictions.npz'}: {', '.join(told)}")
    return 0
