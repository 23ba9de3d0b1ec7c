"""The one exception that is shown to a person as a single line, and checks of fields that raise it.

Those of the arguments of functions are in `cvjax.data.transforms.settings`.
"""

import contextlib
import difflib
import re
from collections.abc import Collection, Iterable, Iterator

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


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ' (did you mean X?)', or ' (there are: ...)' when nothing is close to `name`."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (there are: {', '.join(choices)})" if choices else ""


def check_choices(owner: object, **choices: Collection) -> None:
    """Raises InputError unless each field of `owner` that is named is one of its `choices`."""
    for field, known in choices.items():
        value = getattr(owner, field)
        if value not in known:
            *first, last = map(repr, known)
            raise InputError(
                f"{type(owner).__name__}: {field} is {value!r}; it can be "
                f"{', '.join(first)} or {last}"
            )


def check_at_least(owner: object, **least: float) -> None:
    """Raises InputError for a field of `owner` that is below its `least`, or not a number.

    None is passed over. Of a tuple, which cannot be empty, each number counts.
    """
    for field, bound in least.items():
        value = getattr(owner, field)
        several = isinstance(value, tuple | list)
        numbers = value if several else (value,)
        if value is not None and not (numbers and all(number >= bound for number in numbers)):
            raise InputError(
                f"{type(owner).__name__}: {field} is {value!r}; {'each' if several else 'it'} must "
                f"be at least {bound}"
            )


def check_fractions(owner: object, *fields: str) -> None:
    """Raises InputError for a field of `owner` that is outside of [0, 1]."""
    for field in fields:
        value = getattr(owner, field)
        if not 0 <= value <= 1:
            raise InputError(f"{type(owner).__name__}: {field} is {value}; it must be in [0, 1]")
