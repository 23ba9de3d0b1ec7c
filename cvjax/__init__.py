"""Computer vision research in JAX and Flax: `fit`, `load_run`, `InputError`, and the packages."""

import importlib
from typing import Any

# Imported when they are asked for: `import cvjax` costs nothing.
_PLACES = {"fit": "cvjax.train.loop", "load_run": "cvjax.run", "InputError": "cvjax.errors"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("cvjax")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'cvjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES, "__version__"])
