"""A config dictionary with a `type` becomes the object that it names. The only such place."""

import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

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


def resolve(name: str, path: str = "config") -> Any:
    """The class or function with a dotted name, looked up in cvjax first, then anywhere."""
    module_name, _, attribute = str(name).rpartition(".")
    if not module_name:
        raise InputError(f"{path}.type is {name!r}; it must be module.Name")
    for candidate in (f"cvjax.{module_name}", module_name):
        if not _exists(candidate):
            continue
        module = importlib.import_module(candidate)
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
    raise InputError(
        f"{path}.type is {name!r}, but there is no module {module_name}"
        f"{nearest(module_name, _modules())}"
    )


def fields_of(target: Any) -> dict[str, inspect.Parameter] | None:
    """The fields that a class or function takes, by name; None when it takes any."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    # Linen's own fields are no settings.
    return {name: p for name, p in parameters.items() if name not in ("parent", "self")}


def _construct(name: str, fields: dict[str, Any], path: str) -> Any:
    target = resolve(name, path)
    known = fields_of(target)
    for field in fields:
        if known is not None and field not in known:
            raise InputError(f"{path}.{field}: {name} has no such field{nearest(field, known)}")
    if not inspect.isclass(target):
        return functools.partial(target, **fields)
    for field, parameter in (known or {}).items():
        required = parameter.default is parameter.empty
        positional = parameter.kind is not parameter.VAR_POSITIONAL
        if required and positional and field not in fields:
            raise InputError(f"{path}.{field} is missing: {name} needs it")
    try:
        return target(**fields)
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"{path}: {error}") from error


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _modules() -> list[str]:
    package = importlib.import_module("cvjax")
    found = pkgutil.walk_packages(package.__path__, "cvjax.", onerror=lambda name: None)
    return [module.name.removeprefix("cvjax.") for module in found if not module.ispkg]
