"""The one exception that is shown to a person as a single line."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

from jax.errors import JaxRuntimeError


class InputError(ValueError):
    """Something that a person gave (a flag, a field, a file, a data set) cannot be used.

    The message is one line: what was given, the value found, and what would be right.
    `main.py` prints it and exits with code 2; anywhere else it is an ordinary ValueError.
    """


@contextlib.contextmanager
def from_callbacks() -> Iterator[None]:
    """What a callback of a compiled program refused is raised as that InputError.

    JAX raises a JaxRuntimeError, the text of which ends with the callback's traceback.
    """
    try:
        yield
    except JaxRuntimeError as error:
        raised = re.search(rf"{InputError.__name__}: (.+)", str(error))
        if raised is None:
            raise
        raise InputError(raised[1]) from error


@contextlib.contextmanager
def naming_fields(who: str, *fields: Iterable[str]) -> Iterator[None]:
    """A KeyError of a name that none of these dictionaries has is raised as an InputError."""
    try:
        yield
    except KeyError as error:
        name, known = error.args[0], {name for some in fields for name in some}
        if not isinstance(name, str) or name in known:
            raise
        raise InputError(f"{who} needs a field {name!r}{nearest(name, known)}") from error


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ' (did you mean X?)', or ' (there are: ...)' when nothing is close to `name`."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices)
    if close:  # the nearest, but first of all the same letters: stesp is steps, not step
        best = max(close, key=lambda choice: sorted(choice) == sorted(name))
        return f" (did you mean {best}?)"
    return f" (there are: {', '.join(choices)})" if choices else ""
