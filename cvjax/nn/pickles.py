"""Data out of a pickle, without executing anything that it names.

A pickle is a program: an instruction to call any function with any arguments is part of the format,
which `pickle.load` obeys. Here the program is interpreted instead. Dictionaries, lists, numbers and
strings are built; a function that it names is never looked up: a name is a pair of strings, and of
those that NumPy writes for arrays and numbers the meaning is coded below. So is that of what
training scripts save beside them: an `argparse.Namespace` (whose attributes are left out), a set (a
list), an OrderedDict, a defaultdict and a Counter (dictionaries). A file that asks for anything
else is refused.
"""

import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvjax.errors import InputError

DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
# What a damaged file may raise.
DAMAGE = (
    ValueError, TypeError, IndexError, KeyError, AttributeError, EOFError, OverflowError,
    RuntimeError, MemoryError,
)  # fmt: skip


class Refused(Exception):
    """The file asks for something that data does not need."""


class Name(NamedTuple):
    """A class or function that the file names; nothing but its name."""

    module: str
    name: str


NAMESPACE = Name("argparse", "Namespace")


class Numbers:
    """What a pickle says of a dtype or an array: the arguments, and the state that it gets."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()


class _Mark:
    """Where a sequence begins on the stack."""


_MARK = _Mark()


def interpret(file: io.BytesIO, call: Callable, refer: Callable | None = None) -> Any:
    """Runs the pickle at the file's position, up to its end, as far as it is data.

    `call(function, arguments)` is what a known function would return, `refer(description)` what
    stands elsewhere in the file.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        values = []
        while (value := stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "FLOAT" | "BINFLOAT"
                | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING"
                | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE" | "LIST" | "FROZENSET":
                values = since_mark()
                stack.append(tuple(values) if opcode.name == "TUPLE" else values)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise IndexError("the pickle takes more than it made")
                stack[-count:] = [tuple(stack[-count:])]
            case "DICT":
                values = since_mark()
                stack.append({})
                _set(stack[-1], values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                values = since_mark()
                _set(stack[-1], values)
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                values = since_mark()
                _extend(stack[-1], values)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise TypeError("a name that is no text")
                stack.append(Name(module, name))
            case "BINPERSID" if refer:
                stack.append(refer(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, Name) or not isinstance(arguments, tuple):
                    raise Refused(f"it calls something {_shown(function)}")
                stack.append(call(function, arguments))
            case "NEWOBJ" if stack[-2:] == [NAMESPACE, ()]:
                stack[-2:] = [{}]
            case "BUILD":  # attributes (`_metadata` of a dictionary, options), which nobody needs
                state = stack.pop()
                if isinstance(stack[-1], Numbers):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict):
                    raise Refused(f"it sets the state of {_shown(stack[-1])}")
            case other:
                named = [value for value in stack if isinstance(value, Name)]
                what = f" {'.'.join(named[-1])}" if named else ""
                raise Refused(f"it makes an object{what} ({other}), which a dictionary of weights "
                               "does not need; save the state_dict()")  # fmt: skip
    raise EOFError("the pickle has no end")


def _set(target: Any, values: list[Any]) -> None:
    if not isinstance(target, dict) or len(values) % 2:
        raise TypeError("items are set in what is no dictionary")
    for key, value in zip(values[::2], values[1::2], strict=True):
        # Keys of other types are hashed, which a file could make endless.
        if not isinstance(key, str | int | float | None):
            raise Refused(f"it has a key {_shown(key)}")
        target[key] = value


def _extend(target: Any, values: list[Any]) -> None:
    if not isinstance(target, list):
        raise TypeError("items are added to what is no list")
    target += values


def _shown(value: Any) -> str:
    return ".".join(value) if isinstance(value, Name) else f"of type {type(value).__name__}"


def called(function: Name, arguments: tuple) -> Any:
    """What one of the few known functions would return."""
    match Name(function.module.replace("numpy._core", "numpy.core"), function.name):
        case ("collections", "OrderedDict"):
            if arguments and arguments != ([],):
                raise Refused("it makes an OrderedDict of something")
            return {}
        case ("collections", "defaultdict"):  # its factory is a name, or None
            if len(arguments) > 1 or not all(isinstance(x, Name | None) for x in arguments):
                raise Refused("it makes a defaultdict of something")
            return {}
        case ("collections", "Counter"):
            (counts,) = arguments or ({},)
            if not isinstance(counts, dict):
                raise Refused("it makes a Counter of something")
            return dict(counts)
        case ("__builtin__" | "builtins", "set" | "frozenset"):
            # Not a set: to hash its members could be endless.
            (members,) = arguments or ([],)
            if not isinstance(members, list):
                raise TypeError("a set of what is no list")
            return members
        case ("_codecs", "encode"):  # bytes, in the older protocols
            text, encoding = arguments
            if not isinstance(text, str) or encoding != "latin1":
                raise TypeError("bytes made of something else")
            return text.encode("latin1")
        case ("__builtin__", "bytes") if not arguments:
            return b""
        case ("numpy.core.multiarray", "_reconstruct"):
            return Numbers()
        case ("numpy.core.multiarray", "scalar"):
            dtype, data = arguments
            return np.frombuffer(data, _dtype(dtype))[0].item()
        case ("numpy", "dtype"):
            return Numbers(*arguments)
    raise Refused(f"it calls {'.'.join(function)}, which data does not need")


def _dtype(said: Numbers) -> np.dtype:
    code, order = said.arguments[0], said.state[1]
    if not isinstance(code, str) or code not in DTYPES or order not in ("<", ">", "|"):
        raise Refused("it has an array of other things than numbers")
    return np.dtype(code).newbyteorder(order)


def to_array(said: Numbers) -> np.ndarray:
    """The array, which cannot be written to."""
    _, shape, dtype, is_fortran, data = said.state
    return np.frombuffer(data, _dtype(dtype)).reshape(shape, order="F" if is_fortran else "C")


def read_arrays(path: Path) -> dict[str, Any]:
    """Nested dictionaries of arrays, which cannot be written to, from a pickle of such.

    Raises InputError for a file that is damaged, holds something else, or asks for any function.
    """
    try:
        return _arrays(interpret(io.BytesIO(path.read_bytes()), called))
    except (Refused, *DAMAGE) as error:
        raise InputError(f"{path} is not a pickle of arrays alone: {error}") from error


def _arrays(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _arrays(entry) for key, entry in value.items()}
    if isinstance(value, Numbers):
        return to_array(value)
    raise ValueError(f"it has a {type(value).__name__}")
