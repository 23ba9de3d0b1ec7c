"""A config dictionary with a `type` becomes the object that it names. The only such place."""

import collections.abc
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from cvjax.errors import InputError, nearest


def build(config: Any, path: str = "config") -> Any:
    """Builds what `config` describes, innermost first.

    A mapping with a `type` is an object: `dict(type="nn.resnet.ResNet", depth=18)` becomes
    `cvjax.nn.resnet.ResNet(depth=18)`; names outside cvjax are given whole
    (`my_lab.backbones.Tiny`, `optax.adamw`). A class is called with its fields; a function
    becomes itself with the fields bound (`functools.partial`). Other mappings, lists and tuples
    are built entry by entry; everything else is itself.

    Raises InputError, with the path in the config, for a type that is not there, a field that it
    does not take, one that it lacks, and whatever its constructor refuses.
    """
    if isinstance(config, Mapping):
        fields = {key: build(value, f"{path}.{key}") for key, value in config.items()}
        return _construct(fields.pop("type"), fields, path) if "type" in fields else fields
    if isinstance(config, list | tuple):
        return type(config)(build(value, f"{path}.{i}") for i, value in enumerate(config))
    return config


def describe(thing: Any, path: str = "config") -> Any:
    """The plain data from which `build` makes an equal object: what to save beside weights.

    `describe(ResNet(depth=18))` is {"type": "nn.resnet.ResNet", "depth": 18, ...}, with all fields.
    Dataclasses, Linen modules among them, partials and functions with a name have a description;
    a dtype is its name. A function comes back as a partial of itself with nothing bound.

    Raises InputError, with the path, for what could not be built again: an array, a lambda, a class
    made inside a function.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, np.generic):
        return thing.item()
    if isinstance(thing, Mapping):
        return {str(key): describe(value, f"{path}.{key}") for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(describe(value, f"{path}.{i}") for i, value in enumerate(thing))
    if isinstance(thing, np.dtype) or (isinstance(thing, type) and hasattr(thing, "dtype")):
        return np.dtype(thing).name
    if isinstance(thing, functools.partial) and not thing.args:
        return {"type": _name_of(thing.func, path), **describe(thing.keywords, path)}
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        names = [field.name for field in dataclasses.fields(thing) if field.init]
        given = {name: getattr(thing, name) for name in names if name not in ("parent", "name")}
        return {"type": _name_of(type(thing), path), **describe(given, path)}
    return {"type": _name_of(thing, path)}


def _name_of(target: Any, path: str) -> str:
    """The dotted name by which `resolve` finds a class or function."""
    name = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}"
    short = name.removeprefix("cvjax.")
    try:
        if resolve(short, path) is target:
            return short
    except InputError:
        pass
    raise InputError(f"{path} is {target!r}, which cannot be built again from its name")


def resolve(name: str, path: str = "config") -> Any:
    """The class or function with a dotted name, looked up in cvjax first, then anywhere."""
    module_name, _, attribute = str(name).rpartition(".")
    if not module_name:
        raise InputError(f"{path}.type is {name!r}; it must be module.Name")
    for candidate in (f"cvjax.{module_name}", module_name):
        if not _exists(candidate):
            continue
        try:
            module = importlib.import_module(candidate)
        except Exception as error:
            raise InputError(
                f"{path}.type is {name!r}, but {candidate} cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        if hasattr(module, attribute):
            return getattr(module, attribute)
        public = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and callable(value)
        ]
        here = [key for key in public if vars(module)[key].__module__ == candidate]
        raise InputError(
            f"{path}.type is {name!r}, but {candidate} has no {attribute}"
            f"{nearest(attribute, here or public)}"
        )
    hint = nearest(module_name, _modules())
    if "did you mean" not in hint:  # they are too many for a line
        hint = "; one of your own must be beside main.py or on PYTHONPATH"
    raise InputError(f"{path}.type is {name!r}, but there is no module {module_name}{hint}")


def fields_of(target: Any) -> dict[str, inspect.Parameter] | None:
    """The fields that a class or function takes, by name; None when it takes any."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    # Linen's own fields are no settings.
    return {name: p for name, p in parameters.items() if name not in ("parent", "self")}


def _construct(name: str, fields: dict[str, Any], path: str) -> Any:
    target = resolve(name, path)
    known, parameters = fields_of(target), inspect.signature(target).parameters
    # Of fields of any name (`in_order(example, rng, **transforms: Transform)`) the kind is said.
    others = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for field in fields:
        if known is not None and field not in known:
            raise InputError(f"{path}.{field}: {name} has no such field{nearest(field, known)}")
        check_value(f"{path}.{field}", fields[field], parameters.get(field, *others))
    for field, parameter in (known or {}).items():
        required = parameter.default is parameter.empty
        # What a function takes by position is what its caller gives.
        given_later = not inspect.isclass(target) and parameter.kind is not parameter.KEYWORD_ONLY
        positional = parameter.kind is not parameter.VAR_POSITIONAL
        if required and positional and not given_later and field not in fields:
            raise InputError(f"{path}.{field} is missing: {name} needs it")
    if not inspect.isclass(target):
        return functools.partial(target, **fields)
    if isinstance(fields.get("dtype"), str):
        try:
            is_float = jnp.issubdtype(jnp.dtype(fields["dtype"]), jnp.floating)
        except TypeError:
            is_float = False
        if not is_float:
            raise InputError(
                f"{path}.dtype is {fields['dtype']!r}; it can be 'float32', 'bfloat16' or 'float16'"
            )
    try:
        return target(**fields)
    except (TypeError, ValueError, OSError, MemoryError) as error:
        raise InputError(f"{path}: {error}") from error


def check_value(path: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """Raises InputError for data, or no module, of another kind than a field's annotation."""
    if parameter is None or (value is None and parameter.default is None):
        return
    kind, default = parameter.annotation, parameter.default
    found = inspect.formatannotation(kind).replace("collections.abc.", "")
    # Linen's modules would take None for the dtype of their inputs.
    may_be_none = kind is not DTypeLike and (
        kind is parameter.empty or re.search(r"\b(None|Optional|Any|object)\b|^'", found)
    )
    if not _fits(value, kind) or (value is None and not may_be_none):
        raise InputError(f"{path} is {value!r}; it must be {_WORDS.get(kind, f'of type {found}')}")
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    if isinstance(value, str) and is_number and not re.search(r"\bstr\b", str(parameter)):
        raise InputError(f"{path} is {value!r}; it must be a number, as its default is: {default}")


_WORDS = {
    int: "a whole number",
    float: "a number",
    ArrayLike: "a number",
    bool: "true or false",
    DTypeLike: "'float32', 'bfloat16' or 'float16'",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: plain data, a module, a function; True for all other kinds."""
    origin, within = get_origin(kind), get_args(kind)
    if kind is nn.Module:
        return isinstance(value, nn.Module)
    if origin is collections.abc.Callable:
        return callable(value)
    if not isinstance(value, bool | int | float | str | tuple | list | Mapping | None):
        return True
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, int | kind)
    if kind in (bool, str, types.NoneType):
        return isinstance(value, kind)
    if origin in (types.UnionType, Union):
        return any(_fits(value, one) for one in within)
    if origin is tuple:
        is_row = isinstance(value, tuple | list)
        if within[-1] is ...:
            return is_row and all(_fits(one, within[0]) for one in value)
        return is_row and len(value) == len(within) and all(map(_fits, value, within))
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(_fits(one, within[1]) for one in value.values())
    return True


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # for __main__
        return False
    except ModuleNotFoundError as error:
        # Of a parent: one that is there but lacks something itself is for the import to say.
        return error.name is not None and not f"{module}.".startswith(f"{error.name}.")
    except Exception:  # a parent that is there and fails
        return True


def _modules() -> list[str]:
    package = importlib.import_module("cvjax")
    found = pkgutil.walk_packages(package.__path__, "cvjax.", onerror=lambda name: None)
    return [module.name.removeprefix("cvjax.") for module in found if not module.ispkg]
