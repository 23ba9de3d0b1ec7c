"""Weights out of a file that torch wrote, without torch, and without executing anything of it.

A `.pth` file holds a pickle, which is a program; it is interpreted as `cvjax.nn.pickles` says. Of
the names that torch writes for tensors the meaning is coded below, and of a `torch.device`, which
is its name. A file that asks for anything else is refused.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cvjax.errors import InputError
from cvjax.nn.pickles import DAMAGE, Name, Numbers, Refused, called, interpret, to_array

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch before 1.6
# A tensor may show its numbers again and again, with strides of 0; a small file shall not become
# large arrays by it: so many numbers, of all such tensors together.
MOST_REPEATED = 2**24
DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Storage(NamedTuple):
    """A row of numbers in the file, or a part of it."""

    key: str
    dtype: np.dtype
    start: int
    length: int


class _Tensor(NamedTuple):
    """What a file says of a tensor, before its numbers are read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, with numpy arrays (that cannot be written to) for tensors.

    Both of torch's formats are read: a zip archive, and the older row of pickles.

    Raises InputError for a file that is neither, is damaged, or wants anything executed.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        return _read_zip(path) if is_zip else _read_legacy(path)
    except Refused as error:
        raise InputError(f"{path} is refused: {error}") from None
    except (*DAMAGE, struct.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a whole file of weights of torch: {error}") from error


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} files data.pkl in the archive, not 1")
        # Torch does not compress; what is not compressed cannot be larger than the file is.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its parts are compressed")
        folder = roots[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it is not little-endian")
        root = _interpreted(io.BytesIO(archive.read(roots[0])))
        return _fill(root, lambda key: archive.read(f"{folder}data/{key}"))


def _read_legacy(path: Path) -> Any:
    file = io.BytesIO(path.read_bytes())
    if _interpreted(file) != LEGACY_MAGIC:
        raise ValueError("it does not begin as one")
    _interpreted(file)  # the version, always 1001
    if not _interpreted(file).get("little_endian", True):
        raise ValueError("it is not little-endian")
    root = _interpreted(file)
    keys = _interpreted(file)
    sizes = {storage.key: storage.dtype.itemsize for storage in _storages(root)}
    raw = {}
    for key in keys:  # each is the number of elements and the elements
        count = int.from_bytes(_exactly(file, 8), "little")
        if not isinstance(key, str):  # to look for another could be endless
            raise TypeError("numbers without a name")
        raw[key] = _exactly(file, count * sizes[key])
    return _fill(root, raw.__getitem__)


def _exactly(file: io.BytesIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("it ends too early")
    return data


def _storages(value: Any) -> list[_Storage]:
    """All storages in nested dictionaries, lists and tuples."""
    found, open_values, seen = [], [value], set()
    while open_values:
        value = open_values.pop()
        if isinstance(value, _Tensor):
            found.append(value.storage)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            open_values += value.values() if isinstance(value, dict) else value
    return found


def _fill(root: Any, read: Callable[[str], bytes]) -> Any:
    """The same with arrays for tensors, two levels deep: that is where weights are."""
    raw: dict[str, bytes] = {}
    repeated = 0

    def array(tensor: _Tensor) -> np.ndarray:
        storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
        if storage.key not in raw:
            raw[storage.key] = read(storage.key)
        data = np.frombuffer(raw[storage.key], storage.dtype)
        if storage.start + storage.length > len(data):
            raise ValueError(
                f"a tensor of {storage.length} numbers, of which {len(data)} are there"
            )
        data = data[storage.start : storage.start + storage.length]
        nonlocal repeated
        count = math.prod(tensor.shape)
        repeated += count if count > len(data) else 0
        if count > len(data) and repeated > MOST_REPEATED:
            raise ValueError(f"a tensor of shape {tensor.shape}, made of {len(data)} numbers")
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, storage.dtype)
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
        if last >= len(data):
            raise ValueError(f"a tensor reaches to number {last} of {len(data)}")
        return np.lib.stride_tricks.as_strided(
            data[tensor.offset :],
            tensor.shape,
            [stride * itemsize for stride in tensor.strides],
            writeable=False,
        )

    def filled(value: Any, depth: int) -> Any:
        if isinstance(value, _Tensor):
            return array(value)
        if isinstance(value, Numbers):
            return to_array(value)
        if isinstance(value, dict) and depth:
            return {key: filled(entry, depth - 1) for key, entry in value.items()}
        return value

    return filled(root, 2)


def _interpreted(file: io.BytesIO) -> Any:
    return interpret(file, _called, _storage)


def _called(function: Name, arguments: tuple) -> Any:
    """What one of the few known functions would return."""
    match function:
        case ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor"):
            storage, offset, shape, strides = arguments[:4]
            if any(arguments[6:]):  # that its numbers are negative ones, or conjugate
                raise Refused("a tensor has more than its numbers; save a clone() of it")
            # Never shown: what is nested in itself a hundred times would be endless.
            numbers = (offset, *shape, *strides)
            if not isinstance(storage, _Storage) or len(shape) != len(strides):
                raise TypeError("a tensor without numbers")
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError("a tensor whose shape and strides are no numbers")
            if len(shape) > 32:
                raise ValueError(f"a tensor of {len(shape)} axes")
            return _Tensor(storage, offset, tuple(shape), tuple(strides))
        case ("torch._utils", "_rebuild_parameter"):
            if not isinstance(arguments[0], _Tensor):
                raise TypeError("a parameter that is no tensor")
            return arguments[0]
        case ("torch", "Size"):
            return tuple(arguments[0])
        case ("torch", "device"):
            if any(type(part) not in (str, int) for part in arguments):
                raise TypeError("a device without a name")
            return ":".join(map(str, arguments))
    return called(function, arguments)


def _storage(description: Any) -> _Storage:
    """What torch's pickles say in the place of numbers that stand elsewhere in the file."""
    if description[0] == "module":  # the older format tells of each class
        raise Refused("it holds a whole module, not weights alone; save the state_dict()")
    kind, storage_type, key, _, length, *view = description
    if kind != "storage" or not isinstance(storage_type, Name):
        raise ValueError("a reference to something other than numbers")
    dtype = DTYPES.get(storage_type.name)
    if dtype is None or storage_type.module not in ("torch", "torch.storage"):
        raise Refused(f"its numbers are of type {'.'.join(storage_type)}")
    if not isinstance(key, str) or type(length) is not int or length < 0:
        raise ValueError("a reference without a name or a length")
    if view and view[0] is not None:
        _, start, length = view[0]
        if type(start) is not int or type(length) is not int or min(start, length) < 0:
            raise ValueError("a view of no range")
        return _Storage(key, dtype, start, length)
    return _Storage(key, dtype, 0, length)


def state_dict(root: Any, path: Path) -> dict[str, np.ndarray]:
    """The weights in what was read: where training scripts put them, or the dictionary itself.

    In this order: beside the weights there may be other tensors, the best accuracy for example.

    Raises InputError, which names the file, when there are none.
    """
    wrappers = ("state_dict", "model", "model_state_dict", "model_state", "model_ema", "net")
    for candidate in [*(root.get(name) for name in wrappers if isinstance(root, dict)), root]:
        if isinstance(candidate, dict):
            arrays = {
                name: value
                for name, value in candidate.items()
                if isinstance(name, str) and isinstance(value, np.ndarray)
            }
            if arrays:
                return arrays
    found = ", ".join(map(str, list(root)[:5])) if isinstance(root, dict) else type(root).__name__
    raise InputError(f"{path} has no dictionary of weights, but: {found or 'nothing'}")
