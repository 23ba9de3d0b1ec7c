"""`fit`: the one training loop. It takes objects, not a config."""

import collections
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from flax.errors import ScopeParamShapeError

from cvjax.checks import check_choice, check_count
from cvjax.data.loader import Loader
from cvjax.errors import InputError, nearest
from cvjax.train import sharding
from cvjax.train.checkpoint import Checkpoints
from cvjax.train.evaluation import Evaluation, Evaluator, eval_loader_of
from cvjax.train.guards import DirectoryLock, NonFiniteError, NonFiniteGuard, Signals
from cvjax.train.metrics import Window
from cvjax.train.optimizer import Optimizer, micro_batches, updates_by_group
from cvjax.train.progress import Progress
from cvjax.train.start import (
    checked,
    example_batch,
    first_batch,
    initialized,
    shapes_of,
    state_maker,
    use_compilation_cache,
)
from cvjax.train.state import TrainState
from cvjax.train.step import Decay, TrainStep, make_train_step
from cvjax.train.task import Task
from cvjax.train.writers import (
    JsonLines,
    Several,
    TensorBoard,
    WeightsAndBiases,
    write_json,
    writing,
)

log = logging.getLogger("cvjax")


@dataclass
class Result:
    """What `fit` gives back.

    Attributes:
      state: the last state.
      history: one dictionary for each line of the log: `step`, `train/...`, `eval/...`.
      received: the signal that ended the run early, or None.
      workdir: where the run was kept, or None.
    """

    state: TrainState
    history: list[dict[str, float]] = field(default_factory=list)
    received: int | None = None
    workdir: Path | None = None


def fit(
    task: Task,
    data: Any,
    *,
    steps: int,
    batch_size: int,
    optimizer: Any = None,
    eval_data: Any = None,
    evaluators: Mapping[str, Evaluator] | None = None,
    loader: Mapping[str, Any] | None = None,
    ema: float | Decay | Mapping[str, Decay] | None = None,
    seed: int = 0,
    parallel: str = "jit",
    step: TrainStep | None = None,
    workdir: str | os.PathLike | None = None,
    log_every: int = 50,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    keep: int = 3,
    best: str | None = None,
    best_mode: str = "max",
    max_nonfinite: int = 10,
    tensorboard: bool = True,
    wandb: bool = False,
    initialize: Callable[..., Any] | None = None,
    config: Mapping[str, Any] | None = None,
    check_only: bool = False,
) -> Result:
    """Trains `task` on `data` and returns the state and the history.

    With a `workdir` it resumes from the newest valid checkpoint there, finishes the step, saves
    and returns at SIGTERM or Ctrl-C, and leaves behind: `metrics.jsonl`, `curves.png`,
    `pictures/`, `tensorboard/`, `checkpoints/`, `bad_examples.jsonl`, `config.json`. A task
    without objectives has nothing to save or to evaluate: such a run only measures speed.

    Args:
      task: what is trained (the protocol is in `cvjax.train.task`).
      data: the source of training examples (the protocol is in `cvjax.data.loader`).
      steps: optimizer updates in all, those of the run that is resumed included; groups that have
        several objectives, or accumulate less than others, take more. Of a bare optax
        transformation its calls: with `optax.MultiSteps` they are micro-batches.
      batch_size: examples in one micro-batch, over all devices and processes.
      optimizer: an `Optimizer` or optax transformation for all groups of parameters, or
        {group: one of these}.
      eval_data: the source of held-out examples.
      evaluators: by name; each starts as a fresh copy at every evaluation.
      loader: more arguments of `cvjax.data.loader.Loader` (transforms, threads, processes, ...);
        `transforms` are for training alone, `eval_transforms` for the held-out examples.
      ema: decay of the moving average of all groups, or {group: decay}; None for none.
      seed: of the parameters, the data order, and all randomness of the steps.
      parallel: "jit" (global batch, sharded) or "pmap" (one program on each device's rows).
      step: a train step of your own instead of the engine's.
      workdir: None keeps nothing on disk.
      log_every, evaluate_every, checkpoint_every: in updates; None means at the end only (for
        `evaluate_every`), or together with every evaluation (for `checkpoint_every`).
      keep: how many of the newest checkpoints stay; and the best by `best`, an eval metric.
      max_nonfinite: that many steps in a row may be skipped for a loss or gradient that is not
        finite; one more raises NonFiniteError.
      initialize: `initialize(params, model_state) -> (params, model_state, table)`: what a new run
        starts from, and a table for the log of what became of each array:
        `functools.partial(cvjax.train.restore.load_params, path=...)` or
        `cvjax.nn.pretrained.load_pretrained`.
      config: the resolved config, saved with the checkpoints; in a notebook
        {"task": cvjax.build.describe(task)} says what the saved parameters are of.
      check_only: looks at all that is refused before the workdir is made, and returns the shapes of
        the state: a later stage of a run need not wait for that until the first has trained.

    Raises:
      InputError: arguments that cannot be used, before the workdir is made.
      NonFiniteError: see `max_nonfinite`.
    """
    check_count(1, steps=steps, log_every=log_every, keep=keep)
    check_count(0, max_nonfinite=max_nonfinite)
    for name, value in dict(
        evaluate_every=evaluate_every, checkpoint_every=checkpoint_every
    ).items():
        if value is not None:
            check_count(1, **{name: value})
    for name, value in dict(initialize=initialize, step=step).items():
        if value is not None and not callable(value):
            raise InputError(f"{name} is {value!r}; it must be a function")
    if not isinstance(evaluators or {}, Mapping):
        raise InputError(f"evaluators is {evaluators!r}; it must be a dictionary, by name")
    for name, one in (evaluators or {}).items():
        if not isinstance(one, Evaluator):
            raise InputError(f"evaluators.{name} is {one!r}; it must have add and result")
    if evaluators and eval_data is None and task.objectives:
        log.warning("nothing is evaluated: there are evaluators, but no held-out data")
    check_choice(("jit", "pmap"), parallel=parallel)
    check_choice(("max", "min"), best_mode=best_mode)
    if best is not None and eval_data is None and task.objectives:
        raise InputError(f"best is {best!r}, but nothing is evaluated: there is no held-out data")
    if parallel == "pmap" and jax.process_count() > 1:
        raise InputError("parallel is 'pmap', which is for one process; it must be 'jit'")
    use_compilation_cache()
    mesh = sharding.data_mesh()
    sharding.check_batch_size(batch_size, mesh)
    if not task.objectives:
        workdir = eval_data = initialize = best = None
    workdir = Path(workdir) if workdir is not None else None
    is_primary = jax.process_index() == 0

    micro, scanned = micro_batches(optimizer)
    train_loader = Loader(
        data, batch_size * scanned, seed=seed, process_index=jax.process_index(),
        process_count=jax.process_count(),
        bad_examples=workdir / "bad_examples.jsonl" if workdir else None,
        **{name: value for name, value in (loader or {}).items() if name != "eval_transforms"},
    )  # fmt: skip
    eval_loader = eval_loader_of(eval_data, batch_size, loader) if eval_data is not None else None
    example = example_batch(task, data, batch_size, loader)
    if eval_data is not None:
        transforms = (loader or {}).get("eval_transforms", ())
        held_out = first_batch(
            task, eval_data, batch_size, {**(loader or {}), "transforms": transforms}
        )

    rng = jax.random.key(seed)
    make_state, optimizers, averages = state_maker(task, example, rng, optimizer, ema, steps, mesh)
    axis = sharding.AXIS if parallel == "pmap" else None
    step = step or make_train_step(task, optimizers, averages, axis, scanned)
    compiled = (sharding.pmap_step if axis else sharding.jit_step)(step, mesh)
    evaluate_state = Evaluation(task, eval_loader, evaluators or {}, mesh, seed)
    # Traced here, so that what a loss or a prediction refuses is told before there is a directory.
    like = shapes_of(make_state, rng, example, mesh)
    jax.eval_shape(compiled, like, sharding.shapes_of_batch(example, scanned, mesh))
    try:
        measured = evaluate_state.rehearse(like, held_out) if eval_data is not None else []
    except ScopeParamShapeError as error:  # such as colours where training has grey levels
        pairs = [(name, example[name].shape[1:], held_out[name].shape[1:]) for name in held_out]
        differ = [f"{name} {list(one)} and {list(two)}" for name, one, two in pairs if one != two]
        raise InputError(
            f"one model cannot take training and held-out examples: {', '.join(differ)}"
        ) from error
    # What an evaluator finds out, "name/...", is known only when it has run.
    by_evaluator = best is not None and best.partition("/")[0] in (evaluators or {})
    if best is not None and best not in measured and not by_evaluator:
        raise InputError(f"best is {best!r}, which is not evaluated{nearest(best, measured)}")
    if check_only:
        return Result(like)
    untrained = like.params.keys() - {group for group, _ in task.objectives}
    if untrained and task.objectives and initialize is None:
        log.warning(
            "no objective trains %s, and initialize is not set: in a new run it is random",
            ", ".join(sorted(untrained)),
        )

    with contextlib.ExitStack() as closing:  # whatever ends the run, the last opened first
        made, checkpoints, restored = [], None, None
        if workdir:
            made = _make_directory(workdir)
            if is_primary:
                closing.enter_context(DirectoryLock(workdir))
            checkpoints = closing.enter_context(
                Checkpoints(workdir / "checkpoints", keep=keep, best=best, mode=best_mode)
            )
        # Known by the lock: another run may have come first.
        with _removed_if_refused(made if is_primary else []):
            if checkpoints:
                restored = checkpoints.restore(like)
            if restored:
                state, position = restored.state, restored.position
            else:
                state, position = make_state(rng, example), 0
                if initialize is not None:
                    state = initialized(state, initialize, optimizers, mesh)
                if checkpoints:
                    checkpoints.prove_round_trip(state)
            writer, history = Several([], workdir), []
            if workdir and is_primary:
                kinds = [JsonLines] + [TensorBoard] * tensorboard + [WeightsAndBiases] * wandb
                closing.callback(writer.close)
                with writing(workdir):
                    if config is not None:
                        write_json(workdir / "config.json", config)
                    for kind in kinds:
                        writer.writers.append(kind(workdir, position // micro))
                history = writer.writers[0].rows
                writer.write_hparams(hparams=config or {})

        _describe(task, state, example, mesh, position // micro, workdir)
        window, rates = Window(NonFiniteGuard(max_nonfinite)), _schedules(task, optimizer, steps)
        total, saved = steps * micro, None

        def save(wait: bool = False, metrics: Mapping[str, float] | None = None) -> None:
            nonlocal saved
            if checkpoints and saved != position:
                checkpoints.save(
                    position, state, position=position, metrics=dict(metrics or {}),
                    config=dict(config or {}), wait=wait,
                )  # fmt: skip
                saved = position

        with Signals() as signals, Progress(total // micro, position // micro) as progress:
            batches = checked(task, _timed(train_loader.iterate(position), progress))

            def evaluated(update: int) -> dict[str, float]:
                with progress.paused():
                    found, pictures = evaluate_state(state)
                row = {f"eval/{name}": value for name, value in found.items()}
                progress.show(update, row, force=True)
                _record(writer, history, update, row)
                writer.write_images(step=update, images=pictures)
                writer.flush()
                if best is not None and best not in found:
                    raise InputError(
                        f"best is {best!r}, which was not evaluated{nearest(best, found)}"
                    )
                return found

            try:
                if position == total and eval_loader is not None and not _is_evaluated(history):
                    evaluated(total // micro)  # That of a run that ended just before.
                while position < total and not signals.stops(position):
                    state, metrics = compiled(state, sharding.put_batch(next(batches), mesh))
                    position += 1
                    window.add(position, metrics)
                    if checkpoints:
                        checkpoints.raise_failed_save()
                    if position % micro:
                        continue
                    update, ends = position // micro, position == total
                    progress.advance(update)
                    evaluating = ends or (evaluate_every and update % evaluate_every == 0)
                    if update % log_every == 0 or ends or evaluating:
                        row = {f"train/{name}": value for name, value in window.finish().items()}
                        row |= {name: float(rate(update)) for name, rate in rates.items()}
                        row |= progress.measure(update, batch_size * micro * scanned)
                        progress.show(update, row)
                        _record(writer, history, update, row)
                    found = {}
                    if evaluating and eval_loader is not None:
                        found = evaluated(update)
                    every = checkpoint_every or evaluate_every
                    if ends or (every and update % every == 0):
                        save(metrics=found)
                window.finish()
            except Exception as error:
                # Data, an evaluator or the disk may fail: what was trained is not lost for it. Of
                # several processes the others know nothing of it, and would not save.
                is_whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
                if is_whole and not isinstance(error, NonFiniteError) and jax.process_count() == 1:
                    save(wait=True)
                raise
            save(wait=True)
        progress.summary()
        return Result(state, history, signals.received, workdir)


def _record(writer: Several, history: list, step: int, row: dict[str, float]) -> None:
    if writer.writers:
        writer.write_scalars(step=step, scalars=row)  # the history is the first writer's rows
    else:
        history.append({"step": step, **row})


def _is_evaluated(history: list[dict[str, float]]) -> bool:
    """Whether the newest step in the history is one that was evaluated."""
    newest = [row for row in history if row["step"] == history[-1]["step"]]
    return any(name.startswith("eval/") for row in newest for name in row)


def _timed(batches: Iterator, progress: Progress) -> Iterator:
    """Counts the time that the device had to wait for data."""
    while True:
        began = time.perf_counter()
        batch = next(batches)
        progress.waited += time.perf_counter() - began
        yield batch


def _schedules(task: Task, optimizer: Any, steps: int) -> dict[str, Callable[[int], float]]:
    """The learning rates by updates of the run, of which a group may take several at once."""
    named = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
    groups = [group for group, _ in task.objectives]

    def rate(group: str, one: Optimizer) -> Callable[[int], float]:
        group = group or groups[-1]  # those of one optimizer are at the same share of their way
        schedule = one.schedule(updates_by_group(optimizer, groups, steps)[group])
        return lambda step: schedule(updates_by_group(optimizer, groups, step)[group])

    return {
        f"learning_rate/{group}" if group else "learning_rate": rate(group, one)
        for group, one in named.items()
        if isinstance(one, Optimizer) and groups
    }


def _describe(task, state, example, mesh, resumed, workdir) -> None:
    """What a person wants to know before the first step."""
    if state.params:
        table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        log.info("%s", table)
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    log.info("devices: %s", ", ".join(f"{n} x {kind}" for kind, n in kinds.items()))
    shapes = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in example.items())
    log.info("batch: %s", shapes)
    if hasattr(task, "summary"):
        log.info("%s", task.summary())
    if workdir:
        log.info("workdir: %s%s", workdir, f"; resumed at step {resumed}" if resumed else "")


def _make_directory(path: Path) -> list[Path]:
    """Makes the directory; returns it and those above it that are new, the deepest first.

    Raises InputError where nothing can be written.
    """
    try:
        made = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        probe = path / "lock"
        probe.open("a").close()
    except OSError as error:
        raise InputError(f"workdir {path} cannot be written: {error.strerror}") from error
    return made


@contextlib.contextmanager
def _removed_if_refused(made: list[Path]) -> Iterator[None]:
    """Directories that were made for a run which cannot begin do not stay behind."""
    try:
        yield
    except Exception:
        for directory in made[:1]:
            shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is in it
            for parent in made[1:]:
                parent.rmdir()
        raise
