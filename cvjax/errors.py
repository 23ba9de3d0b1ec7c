"""The one exception that is shown to a person as a single line, without a traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that a person gave (a flag, a field, a file, a data set) cannot be used.

    The message is one line: what was given, the value found, and what would be right.
    `main.py` prints it and exits with code 2; anywhere else it is an ordinary ValueError.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ' (did you mean X?)', or ' (there are: ...)' when nothing is close to `name`."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (there are: {', '.join(choices)})" if choices else ""
