"""Reading a config, changing it by flags, and keeping it as JSON."""

import ast
import copy
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cvjax.build import fields_of, resolve
from cvjax.errors import InputError, nearest

# Objects by names that are free to choose, so that a flag may add one.
NAMED = ("evaluators", "data.transforms", "data.test_transforms")
# Objects that a run may have, though a recipe does not mention them.
OF_RUN = ("initialize", "optimizer", "ema", "data.test")


def read(name: str) -> ConfigDict:
    """The config of a recipe, "configs/diffusion.py", or its small version, "...py:tiny"."""
    file, _, argument = name.partition(":")
    path = Path(file)
    if not path.is_file():
        siblings = (
            [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        )
        raise InputError(f"--config={file}: there is no such file{nearest(file, siblings)}")
    if argument not in ("", "tiny"):
        raise InputError(f"--config={name}: {argument!r} is no version of it (there is: tiny)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise InputError(f"--config={file}: a config is a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise InputError("it has no function get_config(tiny=False)")
        config = module.get_config(tiny=argument == "tiny")
    except InputError as error:
        raise InputError(f"--config={file}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"--config={file}: {type(error).__name__}: {error}") from error
    if type(config) is not ConfigDict:  # a FrozenConfigDict cannot be changed by flags
        kind = type(config).__name__
        raise InputError(f"--config={file}: get_config gives a {kind}; it must be a ConfigDict")
    return config


def read_changes(arguments: Sequence[str], flags: Iterable[str]) -> list[tuple[str, str]]:
    """Arguments --config.x.y=z as the pairs that `override` takes; InputError for any other.

    `flags` are the names of those that the program has besides: one of them may be meant.
    """
    known = ("--config.<field>", *(f"--{flag}" for flag in flags))
    pairs = []
    for argument in arguments:
        field, equals, text = argument.partition("=")
        if not field.startswith("--config."):
            raise InputError(f"{argument}: no such flag{nearest(field, known)}")
        if not equals:
            raise InputError(f"{argument} has no value; write {argument}=...")
        pairs.append((field.removeprefix("--config."), text))
    return pairs


def override(config: ConfigDict, assignments: Sequence[tuple[str, str]]) -> ConfigDict:
    """Applies flags: pairs of a dotted path and the text of the value.

    A value takes the type of the one that it replaces. A new `type` makes another object: the
    fields that it does not take are dropped, those that it does take may be set by further
    flags, in whatever order. Where there is no object yet, but may be one, it makes the first;
    among transforms and evaluators it adds one, as the last, under a name that is not taken.
    None takes one away of several objects that have names: transforms, evaluators, losses, heads.
    `data.on_bad` is that of all sources of `data` that have this field.
    Raises InputError in one line for everything else.
    """
    config = copy.deepcopy(config)
    config.unlock()
    removed = [path for path, text in assignments if text == "None"]
    for path, _ in assignments:
        for parent in removed:
            if path.startswith(f"{parent}."):
                raise InputError(
                    f"--config.{parent}=None takes away what --config.{path} is a field of; "
                    "leave one of them out"
                )
    types_first = sorted(assignments, key=lambda pair: not pair[0].endswith(".type"))
    for path, text in types_first:
        *parents, last = path.split(".")
        node, walked = config, "config"
        for depth, parent in enumerate(parents, 1):
            holds = _may_hold(node, parent, walked, within=depth < len(parents))
            if last == "type" and holds:
                with node.ignore_type():
                    node[parent] = ConfigDict()
            if not isinstance(node, ConfigDict) or parent not in node:
                more = "; a new object needs its type, too" if holds else ""
                known = _known(node, parent, walked)
                raise InputError(f"--{walked}.{parent}: no such field{known}{more}")
            node, walked = node[parent], f"{walked}.{parent}"
        if not isinstance(node, ConfigDict):
            raise InputError(f"--config.{path}: {walked} is a value, {node!r}, and has no fields")
        flag = f"--config.{path}"
        if last == "type" and _of_run(walked) in NAMED:
            raise InputError(f"{flag}: its objects have names; --{walked}.<name>.type adds one")
        if last == "type":
            takes = fields_of(resolve(text, walked))
            kept = {k: v for k, v in node.items() if k != "type" and (takes is None or k in takes)}
            _replace(node, {"type": text, **kept})
        elif last in node:
            value = _parse(text, node[last], flag)
            if value is None and _are_named(node, walked):
                del node[last]
                continue
            with node.ignore_type():
                node[last] = value
        elif "type" in node and _takes(node["type"], last, walked):
            node[last] = _parse(text, None, flag)
        elif path == "data.on_bad" and (sources := _sources(node, last, walked)):
            for source in sources:
                source[last] = text
        elif _is_of_run(node, walked) and path != "data.on_bad":
            # Whether there is such a field, `cvjax.run` knows, of what it and the loader take.
            node[last] = _parse(text, None, flag)
        else:
            raise InputError(f"{flag}: no such field{_known(node, last, walked)}")
    return config


def save_json(config: ConfigDict) -> dict[str, Any]:
    """The resolved config as plain data, its fields in their order."""
    return json.loads(config.to_json_best_effort())


def buildable(config: ConfigDict) -> dict[str, Any]:
    """The same with tuples in place of lists: what `build` takes.

    Not `ConfigDict.to_dict`, which sorts fields by name: transforms and stages have an order.
    """
    return _tuples(save_json(config))


def load_json(path: Path) -> ConfigDict:
    """The config that a run saved. Raises InputError when it is not there or is not JSON."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"there is no run to load: {path} does not exist") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(
            f"{path} must hold a config, fields by name, not a {type(config).__name__}"
        )
    return ConfigDict(_tuples(config))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each field in which two configs (plain data) differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        nested = [differences(old.get(k), new.get(k), f"{path}.{k}".strip(".")) for k in keys]
        return [line for lines in nested for line in lines]
    return [] if old == new else [f"{path}: {old!r} was, {new!r} is"]


def _may_hold(node: Any, field: str, path: str, within: bool) -> bool:
    """Whether an object, or one `within` its field, can be put where a node has none."""
    if not isinstance(node, ConfigDict) or node.get(field) is not None:
        return False
    if within and _of_run(f"{path}.{field}") in NAMED:
        return "stages" not in node
    if _of_run(path) in NAMED:
        return "type" not in node
    if _is_of_run(node, path) and _of_run(f"{path}.{field}") in OF_RUN:
        return True
    return field in node or ("type" in node and _takes(node["type"], field, path))


def _are_named(node: ConfigDict, path: str) -> bool:
    """Whether all that a node has are objects, under names that are free to choose."""
    is_free = "type" not in node or fields_of(resolve(node["type"], path)) is None
    objects = [value for name, value in node.items() if name != "type"]
    return is_free and all(isinstance(one, ConfigDict) and "type" in one for one in objects)


def _of_run(path: str) -> str:
    """A path in the config of one run: without "config." and the name of a stage."""
    return re.sub(r"^config\.(stages\.[^.]+\.)?", "", path)


def _is_of_run(node: ConfigDict, path: str) -> bool:
    """Whether a node has the fields of a run, or those of its data."""
    is_run = "task" in node and re.fullmatch(r"config(\.stages\.[^.]+)?", path)
    return bool(is_run) or _of_run(path) == "data"


def _takes(type_name: str, field: str, path: str) -> bool:
    takes = fields_of(resolve(type_name, path))
    return takes is None or field in takes


def _sources(data: ConfigDict, field: str, path: str) -> list[ConfigDict]:
    """The sources of `data`, also those within others, that take a field."""

    def within(node: Any, path: str) -> list[ConfigDict]:
        if not isinstance(node, ConfigDict):
            return []
        own = [node] if "type" in node and _takes(node["type"], field, path) else []
        return own + [one for key in node for one in within(node[key], f"{path}.{key}")]

    return [one for name in ("train", "test") for one in within(data.get(name), f"{path}.{name}")]


def _known(node: Any, name: str, path: str) -> str:
    if not isinstance(node, ConfigDict):
        return ""
    tails = [place.rpartition(".")[2] for place in NAMED]
    names = {*node, *(tail for tail in tails if _of_run(f"{path}.{tail}") in NAMED)}
    if "type" in node:
        names |= set(fields_of(resolve(node["type"])) or {})
    return nearest(name, names - {name})


def _replace(node: ConfigDict, fields: Mapping[str, Any]) -> None:
    for key in list(node):
        del node[key]
    with node.ignore_type():
        for key, value in fields.items():
            node[key] = value


def _parse(text: str, before: Any, flag: str) -> Any:
    """The value that a text means, of the same type as the one before (None: any)."""
    if isinstance(before, str | ConfigDict) and text == "None":
        return None
    if isinstance(before, str):
        return text
    if isinstance(before, ConfigDict):
        raise InputError(f"{flag}={text}: it has fields of its own{nearest(text, before)}")
    if isinstance(before, bool):
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise InputError(f"{flag}={text}: it must be true or false, as the {before} it replaces")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text  # the last three: "{[]: 1}", and brackets in brackets in brackets
    if before is None or value is None:
        return value
    if isinstance(before, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(before, tuple | list) and isinstance(value, tuple | list):
        return type(before)(value)
    if type(value) is not type(before):
        raise InputError(
            f"{flag}={text}: it must be of type {type(before).__name__}, "
            f"as the {before!r} that it replaces"
        )
    return value


def _tuples(value: Any) -> Any:
    """JSON has lists only; a config's sequences are tuples, which modules can be hashed with."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
