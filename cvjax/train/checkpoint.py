"""The checkpoints of a run: orbax behind one wall.

Orbax writes the arrays in the background; when they are there, `checkpoint_files` adds the proof
that the checkpoint is whole. What fails in the background is raised at the next step.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from cvjax.errors import InputError
from cvjax.train.checkpoint_files import (
    MANIFEST,
    Saved,
    damage,
    describe,
    flatten,
    is_key,
    newest,
    one_line,
    read_arrays,
    read_metadata,
    seal,
    step_folders,
)
from cvjax.train.guards import NonFiniteError
from cvjax.train.state import TrainState

PROOF = "proof"  # the folder of prove_round_trip

log = logging.getLogger("cvjax")


class Restored(NamedTuple):
    """A state that was read back; the other fields are those of `Saved`."""

    state: TrainState
    path: Path
    step: int
    position: int
    metrics: dict[str, float]
    config: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>/`; nothing else may live in `directory`.

    Nothing is made, cleaned or deleted before the first save (or proof), so that one process may
    restore from the directory of another that is training.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
    ):
        """Keeps the newest `keep` checkpoints, and the one whose metric `best` is best."""
        self.directory = Path(directory).absolute()
        self.keep, self.best, self.mode = keep, best, mode
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future | None = None
        self._ours: set[int] = set()  # steps that this process saved or restored
        self._damaged: set[int] = set()  # steps that it could not restore

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            self.close()
        except InputError as failure:
            if kind is None:
                raise
            log.error("%s", failure)  # must not hide the error that ends the run

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        position: int,
        metrics: dict[str, float],
        config: dict[str, Any],
        wait: bool = False,
    ) -> None:
        """Saves in the background; waits first for the save before, and with `wait` for this one.

        A step that this process has saved or restored is not saved again; one that an earlier
        run left, and that restore did not take, is replaced.

        Raises:
          NonFiniteError: names the first array with a NaN or an infinity; nothing is saved.
          InputError: this save cannot start, or the one before (with `wait`, this one) failed.
          TypeError: a leaf is not an array, or JSON cannot hold the config.
        """
        self._wait()
        if step not in self._ours:
            arrays = flatten(state)
            _refuse_nonfinite(arrays, step)
            numbers = {name: float(value) for name, value in metrics.items()}
            metadata = dict(step=step, position=position, metrics=numbers, config=config)
            finish = self._write(self.directory / str(step), arrays, metadata)

            def finish_and_tidy() -> None:
                finish()
                self._ours.add(step)
                self._tidy()

            self._saving = self._background.submit(finish_and_tidy)
        if wait:
            self._wait()

    def raise_failed_save(self) -> None:
        """Raises InputError if the save in the background failed. Cheap enough for every step."""
        if self._saving is not None and self._saving.done():
            self._wait()

    def close(self) -> None:
        """Waits for the save in the background. Raises InputError if it failed."""
        try:
            self._wait()
        finally:
            self._background.shutdown()

    def restore(self, like: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, on the devices of `like`; None if there is none.

        Args:
          like: a state of the same model: arrays, or ShapeDtypeStructs with shardings (which
            take no memory). Its devices may be more or fewer than the saved state had.

        Raises:
          InputError: there are checkpoints, but none is whole, or they are of another model.
        """
        self._wait()
        saved = newest(self.directory)
        if saved is None:
            return None
        state = read_state(saved, like)
        self._ours.add(saved.step)
        self._damaged = {step for step in step_folders(self.directory) if step > saved.step}
        return Restored(state, *saved[:-1])

    def prove_round_trip(self, state: TrainState) -> None:
        """Saves `state` to a folder of its own, reads it back, compares all bits, and deletes it.

        A full or read-only disk and a state that cannot be saved show before the first step, not
        at the first save. Raises InputError, which names the directory and the cause.
        """
        folder = self.directory / PROOF
        try:
            arrays = flatten(state)
            _refuse_nonfinite(arrays, 0)
            self._write(folder, arrays, dict(step=0, position=0, metrics={}, config={}))()
            if _is_primary() and (reason := damage(folder)):
                raise OSError(reason)
            read = read_arrays(folder, arrays)
            if bad := [path for path, array in arrays.items() if not _same(array, read[path])]:
                raise OSError(f"{bad[0]} is read back with other values")
        except Exception as error:  # whatever it is, the run could not be saved
            cause = one_line(error.__cause__ or error)
            raise InputError(f"checkpoints cannot be kept in {self.directory}: {cause}") from error
        finally:
            ocp.multihost.sync_global_processes("cvjax:proof")
            self._clear()

    @cached_property
    def _orbax(self) -> ocp.AsyncCheckpointer:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._clear()
        # A failure is raised here in one line; orbax would also log the traceback of every thread.
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        # When folders are made in the background and one cannot be made, orbax leaves threads
        # behind that wait for it and hold the process at its end.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)

    def _write(
        self, folder: Path, arrays: dict[str, Any], metadata: dict[str, Any]
    ) -> Callable[[], None]:
        """Copies the arrays and begins to write; returns what waits for it and seals the folder."""
        described = {path: describe(array) for path, array in arrays.items()}
        text = json.dumps(metadata | {"arrays": described}, indent=1)
        plain = {path: _one_copy(_key_data(array)) for path, array in arrays.items()}

        def finish() -> None:
            try:
                self._orbax.wait_until_finished()
                if _is_primary():
                    seal(folder, text)
            except Exception as error:
                raise _cannot_be_saved(folder, error) from error

        try:
            self._orbax.save(folder, args=ocp.args.PyTreeSave(plain), force=True)
        except Exception as error:
            raise _cannot_be_saved(folder, error) from error
        return finish

    def _wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _clear(self) -> None:
        """Deletes the proof, and what saves that were killed left behind."""
        if _is_primary():
            for leftover in [
                *self.directory.glob("*.orbax-checkpoint-tmp*"),
                self.directory / PROOF,
            ]:
                shutil.rmtree(leftover, ignore_errors=True)

    def _tidy(self) -> None:
        """Deletes what need not be kept, now that a newer checkpoint is whole."""
        if not _is_primary():
            return
        folders = step_folders(self.directory)
        self._damaged -= self._ours
        whole = [s for s in folders if s not in self._damaged and (folders[s] / MANIFEST).exists()]
        scores = {step: self._score(folders[step]) for step in whole}
        scored = [step for step in whole if not math.isnan(scores[step])]
        best = sorted(scored, key=lambda step: (scores[step], step))[-1:]
        for step in folders.keys() - {*sorted(whole)[-self.keep :], *best}:
            # First the manifest: a folder that is half deleted must not pass for a checkpoint.
            (folders[step] / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folders[step], ignore_errors=True)

    def _score(self, folder: Path) -> float:
        """How good a checkpoint is; NaN if that was not measured."""
        try:
            value = read_metadata(folder).metrics.get(self.best, math.nan)
        except (OSError, ValueError, TypeError):  # damaged since
            return math.nan
        return value if self.mode == "max" else -value


def read_state(saved: Saved, like: TrainState, but: str | None = None) -> TrainState:
    """Reads a state onto the devices of `like`, `but` for what was saved below that path.

    Raises InputError if it is of another model.
    """
    wanted = flatten(like)
    described = {path: describe(leaf) for path, leaf in wanted.items()}
    for path in described | saved.arrays:
        if but is not None and path.startswith(f"{but}/"):
            continue
        there, here = saved.arrays.get(path, "absent"), described.get(path, "absent")
        if there != here:
            raise InputError(
                f"checkpoint {saved.path} is of another model: {path} is {there} there, {here} here"
            )
    first = SingleDeviceSharding(jax.devices()[0])
    shardings = {path: getattr(leaf, "sharding", None) or first for path, leaf in wanted.items()}
    arrays = read_arrays(saved.path, wanted, shardings)
    for path, leaf in wanted.items():
        if is_key(leaf):
            implementation = jax.random.key_impl(jnp.empty((), leaf.dtype))
            arrays[path] = jax.random.wrap_key_data(arrays[path], impl=implementation)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in wanted])


def _refuse_nonfinite(arrays: dict[str, Any], step: int) -> None:
    floats = {path: x for path, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = jax.device_get(_finite(floats))
    for path in floats:
        if not finite[path]:
            raise NonFiniteError(f"{path} is not finite at step {step}; the state is not saved")


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def is_fine(path: str, x: jax.Array) -> jax.Array:
        # Infinite scalars beside the params are no accident: reduce_on_plateau begins with one.
        if x.ndim == 0 and not path.startswith(("params/", "ema/")):
            return ~jnp.isnan(x)
        return jnp.isfinite(x).all()

    return {path: is_fine(path, x) for path, x in arrays.items()}


def _same(one: Any, other: np.ndarray) -> bool:
    """Whether all bits are the same: a NaN equals itself, 0.0 is not -0.0."""
    one = jnp.asarray(_key_data(one))
    return one.dtype == other.dtype and all(
        np.asarray(shard.data).tobytes() == other[shard.index].tobytes()
        for shard in one.addressable_shards
    )


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _one_copy(leaf: Any) -> Any:
    """One device's copy of what all have: orbax would compile a program that cuts it in pieces."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated and jax.process_count() == 1:
        return leaf.addressable_data(0)
    return leaf


def _is_primary() -> bool:
    return jax.process_index() == 0


def _cannot_be_saved(folder: Path, error: Exception) -> InputError:
    return InputError(f"checkpoint {folder} cannot be saved: {one_line(error)}")


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
