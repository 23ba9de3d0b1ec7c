"""`fit`: the one training loop. It takes objects, not a config."""

import collections
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview

from cvjax.checks import check_choice, check_count
from cvjax.data.loader import Loader
from cvjax.errors import InputError, nearest
from cvjax.train import sharding
from cvjax.train.checkpoint import Checkpoints
from cvjax.train.evaluation import Evaluation, Evaluator, eval_loader_of, means, pairs
from cvjax.train.guards import DirectoryLock, NonFiniteGuard, Signals
from cvjax.train.optimizer import micro_batches
from cvjax.train.progress import Progress
from cvjax.train.start import example_batch, initialized, shapes_of, state_maker
from cvjax.train.state import TrainState
from cvjax.train.step import Decay, TrainStep, make_train_step
from cvjax.train.task import Task
from cvjax.train.writers import JsonLines, Several, TensorBoard, WeightsAndBiases, write_json

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
) -> Result:
    """Trains `task` on `data` and returns the state and the history.

    With a `workdir` it resumes from the newest valid checkpoint there, finishes the step, saves
    and returns at SIGTERM or Ctrl-C, and leaves behind: `metrics.jsonl`, `curves.png`,
    `pictures/`, `tensorboard/`, `checkpoints/`, `bad_examples.jsonl`, `config.json`. A task
    without objectives has nothing to save or to evaluate: such a run only measures speed.

    Args:
      task: what is trained (the protocol is in `cvjax.train.task`).
      data: the source of training examples (the protocol is in `cvjax.data.loader`).
      steps: optimizer updates in all, those of the run that is resumed included. Of a bare optax
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
        `evaluate_every`), and together with every evaluation (for `checkpoint_every`).
      keep: how many of the newest checkpoints stay; and the best by `best`, an eval metric.
      max_nonfinite: that many steps in a row may be skipped for a loss or gradient that is not
        finite; one more raises NonFiniteError.
      initialize: `initialize(params, model_state) -> (params, model_state, table)`: what a new run
        starts from, and a table for the log of what became of each array:
        `functools.partial(cvjax.train.restore.load_params, path=...)` or
        `cvjax.nn.pretrained.load_pretrained`.
      config: the resolved config, saved with the checkpoints; in a notebook
        {"task": cvjax.build.describe(task)} says what the saved parameters are of.

    Raises:
      InputError: arguments that cannot be used, before the workdir is made.
      NonFiniteError: see `max_nonfinite`.
    """
    for name, value in dict(
        steps=steps, log_every=log_every, evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every, keep=keep,
    ).items():  # fmt: skip
        if value is not None:
            check_count(1, **{name: value})
    check_choice(("jit", "pmap"), parallel=parallel)
    check_choice(("max", "min"), best_mode=best_mode)
    _use_compilation_cache()
    mesh = sharding.data_mesh()
    sharding.check_batch_size(batch_size, mesh)
    if not task.objectives:
        workdir = eval_data = initialize = None
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
        example_batch(task, eval_data, batch_size, {**(loader or {}), "transforms": transforms})

    rng = jax.random.key(seed)
    make_state, optimizers, averages = state_maker(task, example, rng, optimizer, ema, steps, mesh)
    axis = sharding.AXIS if parallel == "pmap" else None
    step = step or make_train_step(task, optimizers, averages, axis, scanned)
    compiled = (sharding.pmap_step if axis else sharding.jit_step)(step, mesh)

    made_workdir = False
    lock = checkpoints = None
    writer, history = Several([]), []
    try:
        restored, position = None, 0
        if workdir:
            is_new = _make_directory(workdir)
            lock = DirectoryLock(workdir) if is_primary else None
            made_workdir = is_new and is_primary  # known by the lock: another may have come first
            checkpoints = Checkpoints(workdir / "checkpoints", keep=keep, best=best, mode=best_mode)
            restored = checkpoints.restore(shapes_of(make_state, rng, example, mesh))
        if restored is not None:
            state, position = restored.state, restored.position
        else:
            state = make_state(rng, example)
            if initialize is not None:
                state = initialized(state, initialize, mesh)
            if checkpoints:
                checkpoints.prove_round_trip(state)
        if workdir and is_primary:
            if config is not None:
                write_json(workdir / "config.json", config)
            kinds = [JsonLines] + [TensorBoard] * tensorboard + [WeightsAndBiases] * wandb
            writer = Several([kind(workdir, position // micro) for kind in kinds])
            history = writer.writers[0].rows
            writer.write_hparams(hparams=config or {})
        made_workdir = False

        _describe(task, state, example, mesh, position // micro, workdir)
        evaluate_state = Evaluation(task, eval_loader, evaluators or {}, mesh, seed)
        guard, rates = NonFiniteGuard(max_nonfinite), _schedules(optimizer, steps)
        total, saved = steps * micro, None
        result = Result(state, history, None, workdir)
        pending: collections.deque = collections.deque()
        window: list[dict[str, tuple[float, float]]] = []

        def collect() -> None:
            """Reads the oldest step's metrics: waiting for it keeps the device's queue short."""
            at, metrics = pending.popleft()
            metrics = pairs(metrics)
            if guard.check(at, {name: total for name, (total, _) in metrics.items()}):
                window.append(metrics)
            else:
                bad = [
                    n for n, (total, _) in metrics.items() if n.startswith("nonfinite/") and total
                ]
                window.append({name: metrics[name] for name in bad})
                log.warning("step %d skipped: %s", at, ", ".join(bad))

        def save(wait: bool = False, metrics: Mapping[str, float] | None = None) -> None:
            nonlocal saved
            if checkpoints and saved != position:
                checkpoints.save(
                    position, state, position=position, metrics=dict(metrics or {}),
                    config=dict(config or {}), wait=wait,
                )  # fmt: skip
                saved = position

        with Signals() as signals, Progress(total // micro, position // micro) as progress:
            batches = _timed(train_loader.iterate(position), progress)
            while position < total and signals.received is None:
                state, metrics = compiled(state, sharding.put_batch(next(batches), mesh))
                position += 1
                pending.append((position, metrics))
                if len(pending) > 2:
                    collect()
                if checkpoints:
                    checkpoints.raise_failed_save()
                if position % micro:
                    continue
                update, ends = position // micro, position == total
                progress.advance(update)
                evaluating = ends or (evaluate_every and update % evaluate_every == 0)
                if update % log_every == 0 or ends or evaluating:
                    while pending:
                        collect()
                    row = {f"train/{name}": value for name, value in means(window).items()}
                    row |= {name: float(rate(update)) for name, rate in rates.items()}
                    row |= progress.measure(update, batch_size * micro * scanned)
                    window.clear()
                    progress.show(update, row)
                    _record(writer, history, update, row)
                found = {}
                if evaluating and eval_loader is not None:
                    try:
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
                    except Exception as error:  # what was trained is not lost for it
                        save(wait=True)
                        if isinstance(error, OSError):
                            raise InputError(f"workdir {workdir}: {error}") from error
                        raise
                every = checkpoint_every or evaluate_every
                if ends or (every and update % every == 0):
                    save(metrics=found)
            while pending:
                collect()
            save(wait=True)
            result.state, result.received = state, signals.received
        if checkpoints:
            checkpoints.close()
            checkpoints = None
        progress.summary()
        return result
    except InputError:
        if made_workdir and workdir.exists():
            _remove(workdir)
        raise
    finally:
        writer.close()
        if checkpoints:  # an error ends the run: what was being saved is still finished
            checkpoints.__exit__(RuntimeError)
        if lock:
            lock.release()


def load_state(
    task: Task,
    data: Any,
    workdir: str | os.PathLike,
    *,
    steps: int,
    batch_size: int,
    optimizer: Any = None,
    ema: float | Decay | Mapping[str, Decay] | None = None,
    seed: int = 0,
    loader: Mapping[str, Any] | None = None,
) -> TrainState:
    """The newest valid state of the run in `workdir`; the arguments are those given to `fit`.

    Raises InputError when there is none, or when it is the state of another model.
    """
    _use_compilation_cache()
    mesh, rng = sharding.data_mesh(), jax.random.key(seed)
    example = example_batch(task, data, batch_size, loader)
    make_state, _, _ = state_maker(task, example, rng, optimizer, ema, steps, mesh)
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"workdir {workdir} has no checkpoint; train first")
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(shapes_of(make_state, rng, example, mesh))
    if restored is None:
        raise InputError(f"workdir {workdir} has no checkpoint; train first")
    log.info("loaded step %d of %s", restored.step, workdir)
    return restored.state


def _record(writer: Several, history: list, step: int, row: dict[str, float]) -> None:
    if writer.writers:
        writer.write_scalars(step=step, scalars=row)  # the history is the first writer's rows
    else:
        history.append({"step": step, **row})


def _timed(batches: Iterator, progress: Progress) -> Iterator:
    """Counts the time that the device had to wait for data."""
    while True:
        began = time.perf_counter()
        batch = next(batches)
        progress.waited += time.perf_counter() - began
        yield batch


def _schedules(optimizer: Any, steps: int) -> dict[str, Callable[[int], float]]:
    named = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
    return {
        f"learning_rate/{group}" if group else "learning_rate": one.schedule(steps)
        for group, one in named.items()
        if hasattr(one, "schedule")
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


def _make_directory(path: Path) -> bool:
    """Makes the directory and says whether it is new; InputError where nothing can be written."""
    try:
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / "lock"
        probe.open("a").close()
    except OSError as error:
        raise InputError(f"workdir {path} cannot be written: {error.strerror}") from error
    return is_new


def _remove(directory: Path) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless the person chose a place or none."""
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "cvjax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
