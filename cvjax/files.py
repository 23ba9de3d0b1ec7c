"""Files that are whole or not there."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Calls `write` with the path of a new file beside `path`, then gives it the name `path`.

    The folder is made if need be. Where writing fails, what was at `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
