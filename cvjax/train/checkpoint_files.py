"""What a checkpoint is on the disk, and how to know that it is whole.

A folder `<directory>/<step>/` holds the arrays as orbax writes them, `metadata.json` (what a
person wants to read) and, written last, `manifest.json` (size and checksum of every file). A
folder without a manifest is not a checkpoint; one that does not agree with its manifest is
passed over, by name and with the reason. A state is kept as {path: array}, so that it can be read
without the model that made it.
"""

import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cvjax.errors import InputError
from cvjax.train.state import PyTree

log = logging.getLogger("cvjax")

MANIFEST, METADATA = "manifest.json", "metadata.json"


class Saved(NamedTuple):
    """A checkpoint on the disk.

    Attributes:
      path: its folder.
      step, position, metrics, config: as they were given to `Checkpoints.save`.
      skipped: newer checkpoints that are damaged, and how, one line each.
      arrays: dtype and shape, like "float32[3,4]", by path, like "params/model/Dense_0/kernel".
    """

    path: Path
    step: int
    position: int
    metrics: dict[str, float]
    config: dict[str, Any]
    skipped: list[str]
    arrays: dict[str, str]


def newest(directory: str | os.PathLike) -> Saved | None:
    """The newest checkpoint in `directory` that is whole; None if there is none at all.

    Logs a line for each newer one that is damaged. Raises InputError if all are; but a run that was
    killed in its first save has none.
    """
    skipped: list[str] = []
    for _, folder in sorted(step_folders(Path(directory)).items(), reverse=True):
        if (reason := damage(folder)) is None:
            return read_metadata(folder)._replace(skipped=skipped)
        skipped.append(f"{folder}: {reason}")
        log.warning("skipped checkpoint %s", skipped[-1])
    folders = step_folders(Path(directory)).values()
    if skipped and not (len(folders) == 1 and is_cut_off(*folders)):
        raise InputError(f"none of the checkpoints is whole: {'; '.join(skipped)}")
    return None


def is_cut_off(folder: Path) -> bool:
    """Whether the save of a checkpoint did not come to its end: its manifest is the last."""
    return not (folder / MANIFEST).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`; None if every byte is as it was written."""
    if is_cut_off(folder):
        return f"no {MANIFEST}: its save was cut off"
    try:
        for name, (size, checksum) in json.loads((folder / MANIFEST).read_text())["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _checksum(path) != checksum:
                return f"{name} has other bytes than were written"
        read_metadata(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it cannot be read: {one_line(error)}"
    return None


def seal(folder: Path, metadata: str) -> None:
    """Makes a checkpoint of a folder in which all arrays are written."""
    _write(folder / METADATA, metadata)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the manifest must not survive a power cut that they do not
        files[str(path.relative_to(folder))] = path.stat().st_size, _checksum(path)
    _write(folder / MANIFEST, json.dumps({"files": files}, indent=1))


def read_metadata(folder: Path) -> Saved:
    """What there is to know of the checkpoint in `folder`, without the arrays."""
    return Saved(path=folder, skipped=[], **json.loads((folder / METADATA).read_text()))


def read_arrays(
    folder: Path, paths: Iterable[str], shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads the arrays at `paths`, onto `shardings`, or as numpy arrays when there are none.

    Typed keys come as their `jax.random.key_data`.
    """
    how = {
        path: ocp.ArrayRestoreArgs(sharding=shardings[path])
        if shardings
        else ocp.RestoreArgs(restore_type=np.ndarray)
        for path in paths
    }
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(how, 0), restore_args=how, partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        return orbax.restore(folder.absolute(), args=args)


def step_folders(directory: Path) -> dict[int, Path]:
    """The folders in `directory` that have the name of a step, whole or not."""
    if not directory.is_dir():
        return {}
    return {
        int(path.name): path
        for path in directory.iterdir()
        if path.name.isdecimal() and path.is_dir()
    }


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, like "params/model/Dense_0/kernel".

    Raises TypeError for a leaf that is not an array of numbers, ValueError for two of one path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"{path} is of type {type(leaf).__name__}, not an array")
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU":
            raise TypeError(f"{path} is an array of {leaf.dtype}, not of numbers")
        if path in leaves:
            raise ValueError(f"two arrays have the path {path}: a name contains '/'")
        leaves[path] = leaf
    return leaves


def describe(leaf: Any) -> str:
    """Dtype and shape of an array, like "float32[3,4]"; of a typed key like "key<fry>[]"."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key, which orbax cannot keep as it is."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def one_line(error: BaseException) -> str:
    """An error as one line of bearable length; what went wrong may stand at either end."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
    return f"{type(error).__name__}: {text}"


def _checksum(path: Path) -> int:
    """CRC-32: finds accidents, all that happens to disks, faster than any hash of the library."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _write(path: Path, text: str) -> None:
    """All of the file is there, or none of it."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
