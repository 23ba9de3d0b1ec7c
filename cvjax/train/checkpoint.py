"""Checkpoints of a run: orbax behind one wall, and proof that what is on the disk is whole.

Orbax writes the arrays in the background and renames their folder when all are written. After
that we add `metadata.json` (what a person wants to read) and, last, `manifest.json` (size and
checksum of every file). A folder without a manifest is not a checkpoint; one that does not agree
with its manifest is skipped, by name and with the reason. A state is kept as {path: array}, so
that it can be read without the model that made it.
"""

import json
import logging
import math
import os
import shutil
import zlib
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
from cvjax.train.guards import NonFiniteError
from cvjax.train.state import PyTree, TrainState

log = logging.getLogger("cvjax")

MANIFEST, METADATA, PROOF = "manifest.json", "metadata.json", "round-trip"


class Saved(NamedTuple):
    """A checkpoint on the disk that agrees with its manifest.

    Attributes:
      path: its folder.
      step, position, metrics, config: as they were given to `Checkpoints.save`.
      arrays: dtype and shape, like "float32[3,4]", by path, like "params/model/Dense_0/kernel".
      skipped: newer checkpoints that are damaged, and how, one line each.
    """

    path: Path
    step: int
    position: int
    metrics: dict[str, float]
    config: dict[str, Any]
    arrays: dict[str, str]
    skipped: list[str]


class Restored(NamedTuple):
    """A state that was read back; the other fields are those of `Saved`."""

    state: TrainState
    step: int
    position: int
    metrics: dict[str, float]
    config: dict[str, Any]
    path: Path
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>/`; nothing else may live in `directory`.

    Nothing is made, cleaned or deleted before the first save (or proof): another process may
    restore from the directory of a run that goes on.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
    ):
        """Keeps the newest `keep` checkpoints, and the one with the best metric `best`."""
        self.directory = Path(directory).absolute()
        self.keep, self.best, self.mode = keep, best, mode
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future | None = None
        self._ours: set[int] = set()  # steps that this process saved or restored
        self._damaged: set[int] = set()  # steps that it found to be so

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

        A step that this process has saved or restored is not saved again. One that was left by
        an earlier run (restore did not take it: it is damaged) is replaced.

        Raises:
          NonFiniteError: names the first array with a NaN or infinity; nothing is saved.
          InputError: this save cannot start, or the one before (with `wait`, this one) failed.
          TypeError: a leaf that is not an array, or a config that JSON cannot hold.
        """
        self._wait()
        if step in self._ours:
            return
        arrays = flatten(state)
        _refuse_nonfinite(arrays, step)
        metadata = dict(
            step=step,
            position=position,
            metrics={name: float(value) for name, value in metrics.items()},
            config=config,
        )
        finish = self._write(self.directory / str(step), arrays, metadata)

        def finish_and_tidy() -> None:
            finish()
            self._ours.add(step)
            self._tidy()

        self._saving = self._background.submit(finish_and_tidy)
        if wait:
            self._wait()

    def raise_failed_save(self) -> None:
        """Raises InputError if the save in the background failed. Cheap: for every step."""
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
          like: a state of the same model: arrays, or ShapeDtypeStructs (which take no memory)
            with shardings. It may be on another number of devices than the state was saved from.

        Raises:
          InputError: there are checkpoints, but none is whole, or they are of another model.
        """
        self._wait()
        saved = newest(self.directory)
        if saved is None:
            return None
        state = _load(saved, like)
        self._ours.add(saved.step)
        self._damaged = {step for step in _steps(self.directory) if step > saved.step}
        _, step, position, metrics, config, _, skipped = saved
        return Restored(state, step, position, metrics, config, saved.path, skipped)

    def prove_round_trip(self, state: TrainState) -> None:
        """Saves `state` to a folder of its own, reads it back, compares all bits, and deletes it.

        A disk that is full or read-only and a state that cannot be saved show before the first
        step, not at the first save. Raises InputError, which names the directory and the cause.
        """
        folder = self.directory / PROOF
        try:
            arrays = flatten(state)
            self._write(folder, arrays, dict(step=0, position=0, metrics={}, config={}))()
            if reason := damage(folder):
                raise OSError(reason)
            read = read_arrays(folder, arrays)
            if bad := [path for path, array in arrays.items() if not _same(array, read[path])]:
                raise OSError(f"{bad[0]} is read back with other values")
        except Exception as error:  # whatever it is, the run could not be saved
            raise InputError(
                f"checkpoints cannot be saved in {self.directory}: {_cause(error)}"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def _orbax(self) -> ocp.AsyncCheckpointer:
        self.directory.mkdir(parents=True, exist_ok=True)
        if _is_primary():
            for leftover in [
                *self.directory.glob("*.orbax-checkpoint-tmp*"),
                self.directory / PROOF,
            ]:
                shutil.rmtree(leftover, ignore_errors=True)
        # What fails is raised here in one line; orbax would print the traceback of each thread.
        logging.getLogger("absl").addFilter(_not_of_a_save)
        # With folders made in the background, a folder that cannot be made leaves threads that
        # wait for it and keep the process alive.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)

    def _write(self, folder: Path, arrays: dict[str, Any], metadata: dict[str, Any]) -> Any:
        """Starts to write; returns the function that waits for the arrays and adds the rest."""
        metadata["arrays"] = {path: _describe(array) for path, array in arrays.items()}
        text = json.dumps(metadata, indent=1)
        arrays = {path: _without_key(array) for path, array in arrays.items()}

        def finish() -> None:
            try:
                self._orbax.wait_until_finished()
                if _is_primary():
                    _write_file(folder / METADATA, text)
                    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                    sums = {str(path.relative_to(folder)): _measure(path) for path in files}
                    _write_file(folder / MANIFEST, json.dumps({"files": sums}, indent=1))
            except Exception as error:
                raise InputError(f"checkpoint {folder} cannot be saved: {_cause(error)}") from error

        try:
            self._orbax.save(folder, args=ocp.args.PyTreeSave(arrays), force=True)
        except Exception as error:
            raise InputError(f"checkpoint {folder} cannot be saved: {_cause(error)}") from error
        return finish

    def _wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _tidy(self) -> None:
        """Deletes what need not be kept, now that a newer checkpoint is whole."""
        if not _is_primary():
            return
        folders = _steps(self.directory)
        self._damaged -= self._ours
        whole = [s for s in folders if s not in self._damaged and (folders[s] / MANIFEST).exists()]
        kept = set(sorted(whole)[-self.keep :])
        scores = {step: self._score(folders[step]) for step in whole}
        if scored := {step: score for step, score in scores.items() if score is not None}:
            kept.add(max(scored, key=lambda step: (scored[step], step)))
        for step in folders.keys() - kept:
            # First the manifest: a folder that is half deleted must not pass for a checkpoint.
            (folders[step] / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folders[step], ignore_errors=True)

    def _score(self, folder: Path) -> float | None:
        """How good the checkpoint is; None if its metric was not measured."""
        value = json.loads((folder / METADATA).read_text())["metrics"].get(self.best, math.nan)
        return None if math.isnan(value) else value if self.mode == "max" else -value


def newest(directory: str | os.PathLike) -> Saved | None:
    """The newest checkpoint in `directory` that is whole; None if there is none at all.

    Logs a line for each newer one that is damaged. Raises InputError if all are.
    """
    skipped: list[str] = []
    for _, folder in sorted(_steps(Path(directory)).items(), reverse=True):
        if (reason := damage(folder)) is None:
            return read_metadata(folder)._replace(skipped=skipped)
        skipped.append(f"{folder}: {reason}")
        log.warning("skipped checkpoint %s", skipped[-1])
    if skipped:
        raise InputError(f"none of the checkpoints is whole: {'; '.join(skipped)}")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`; None if every byte is as it was written."""
    if not (folder / MANIFEST).is_file():
        return f"no {MANIFEST}: its save was cut off"
    try:
        for name, (size, checksum) in json.loads((folder / MANIFEST).read_text())["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _measure(path)[1] != checksum:
                return f"{name} has other bytes than were written (checksum)"
        read_metadata(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be read: {_cause(error)}"
    return None


def read_metadata(folder: Path) -> Saved:
    """Reads what is in the checkpoint in `folder`, without the arrays."""
    return Saved(path=folder, skipped=[], **json.loads((folder / METADATA).read_text()))


def read_arrays(folder: Path, paths: Any) -> dict[str, np.ndarray]:
    """Reads the arrays at `paths` as numpy arrays; those of typed keys as `key_data`."""
    return _read(folder, {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, like "params/model/Dense_0/kernel".

    Raises TypeError for a leaf that is not an array, ValueError for two with the same path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"{path} is of type {type(leaf).__name__}, not an array")
        if path in leaves:
            raise ValueError(f"two arrays have the path {path}: a name contains '/'")
        leaves[path] = leaf
    return leaves


def _load(saved: Saved, like: TrainState) -> TrainState:
    wanted = flatten(like)
    described = {path: _describe(leaf) for path, leaf in wanted.items()}
    for path in described | saved.arrays:
        there, here = saved.arrays.get(path, "absent"), described.get(path, "absent")
        if there != here:
            raise InputError(
                f"{saved.path} is of another model: {path} is {there} there and {here} here"
            )
    first = SingleDeviceSharding(jax.devices()[0])
    arrays = _read(
        saved.path,
        {
            path: ocp.ArrayRestoreArgs(sharding=getattr(leaf, "sharding", None) or first)
            for path, leaf in wanted.items()
        },
    )
    leaves = [
        jax.random.wrap_key_data(arrays[path], impl=leaf.dtype._impl.name)
        if _is_key(leaf)
        else arrays[path]
        for path, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read(folder: Path, restore_args: dict[str, ocp.RestoreArgs]) -> dict[str, Any]:
    item = dict.fromkeys(restore_args, 0)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        return orbax.restore(folder.absolute(), args=args)


def _is_primary() -> bool:
    return jax.process_index() == 0


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_key(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _same(one: Any, other: np.ndarray) -> bool:
    """Whether all bits are the same: a NaN equals itself, and 0.0 is not -0.0."""
    one = jnp.asarray(_without_key(one))
    return one.dtype == other.dtype and all(
        np.asarray(shard.data).tobytes() == other[shard.index].tobytes()
        for shard in one.addressable_shards
    )


def _refuse_nonfinite(arrays: dict[str, Any], step: int) -> None:
    floats = {p: x for p, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    bad = {path for path, fine in jax.device_get(_finite(floats)).items() if not fine}
    first = next((path for path in arrays if path in bad), None)
    if first is not None:
        raise NonFiniteError(f"{first} is not finite at step {step}; the state is not saved")


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        # An infinite scalar is no accident there: reduce_on_plateau begins with best_value = inf.
        path: ~jnp.isnan(x)
        if path.startswith("opt_state") and not x.ndim
        else jnp.isfinite(x).all()
        for path, x in arrays.items()
    }


def _measure(path: Path) -> list[int]:
    """Size and checksum; what was only in memory is on the disk afterwards.

    CRC-32 finds accidents, which is what disks have, at more than twice the speed of any hash in
    the standard library.
    """
    size = checksum = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while piece := file.read(1 << 20):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def _write_file(path: Path, text: str) -> None:
    """All of the file is there, or none of it."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _steps(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    return {int(path.name): path for path in directory.iterdir() if path.name.isdecimal()}


def _cause(error: BaseException) -> str:
    """The error in one line of bearable length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _not_of_a_save(record: logging.LogRecord) -> bool:
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)
