"""NumPy arrays out of a pickle, without executing anything that it names.

A pickle is a program that may call any function. Here the three names that NumPy writes for an
array stand for inert classes of this file, which only keep what the pickle says; any other name is
refused. The arrays are then made from what was kept.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from cvjax.errors import InputError

DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class _DType:
    """What a pickle says of a dtype."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in DTYPES:
            raise ValueError(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"numbers in the order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What a pickle says of an array."""

    data = None

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if kind != "ndarray":
            raise ValueError("an array of another class")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise ValueError("an array without numbers")
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"an array of shape {shape}")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
        order = "F" if is_fortran else "C"
        self.data = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match (module.replace("numpy._core", "numpy.core"), name):
            case ("numpy.core.multiarray", "_reconstruct"):
                return _Array
            case ("numpy", "ndarray"):
                return "ndarray"
            case ("numpy", "dtype"):
                return _DType
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_arrays(path: Path) -> dict[str, Any]:
    """Nested dictionaries of arrays, which cannot be written to, from a pickle of such.

    Raises InputError for a file that is damaged, holds something else, or asks for any function.
    """
    try:
        return _arrays(_Unpickler(io.BytesIO(path.read_bytes())).load())
    except (
        pickle.UnpicklingError, ValueError, TypeError, IndexError, KeyError, AttributeError,
        EOFError, OverflowError, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        raise InputError(f"{path} is not a pickle of arrays alone: {error}") from error


def _arrays(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _arrays(entry) for key, entry in value.items()}
    if isinstance(value, _Array) and value.data is not None:
        return value.data
    raise ValueError(f"it has a {type(value).__name__}")
