"""Checks of the settings of transforms: each raises an InputError of one line."""

from collections.abc import Collection, Sequence

import numpy as np

from cvjax.errors import InputError, nearest

_WHOLE, _NUMBER = (int, np.integer), (int, float, np.integer, np.floating)
Size = int | Sequence[int]  # the side of a square, or (height, width)


def check_between(low: float, high: float, **settings: float) -> None:
    """Raises InputError unless low <= setting <= high."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, _NUMBER):
            raise InputError(f"{name}={value!r} must be a number")
        if not low <= value <= high:
            raise InputError(f"{name}={value} must be from {low:g} to {high:g}")


def check_count(least: int, **settings: int) -> None:
    """Raises InputError unless each setting is a whole number that is at least so large."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, _WHOLE) or value < least:
            raise InputError(f"{name}={value!r} must be a whole number, at least {least}")


def check_range(low: float, high: float, **settings: Sequence[float]) -> None:
    """Raises InputError unless each setting is a pair with low <= first <= second <= high."""
    for name, value in settings.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            raise InputError(f"{name}={value!r} must be two numbers, the least and the most")
        check_between(low, high, **{f"{name}[0]": value[0], f"{name}[1]": value[1]})
        if value[0] > value[1]:
            raise InputError(f"{name}={value} must begin with the smaller number")


def check_choice(choices: Collection[str], **settings: str) -> None:
    """Raises InputError unless each setting is one of the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise InputError(f"{name}={value!r} does not exist{nearest(str(value), choices)}")


def height_and_width(size: Size, name: str = "size") -> tuple[int, int]:
    """Returns (height, width), for one number that of a square; raises InputError."""
    pair = tuple(size) if isinstance(size, Sequence | np.ndarray) else (size, size)
    if len(pair) != 2 or any(not isinstance(side, _WHOLE) or side < 1 for side in pair):
        raise InputError(f"{name}={size!r} must be a number of pixels, at least 1, or two of them")
    return int(pair[0]), int(pair[1])


def check_fill(channels: int, fill: object) -> None:
    """Raises InputError unless `fill` is a value from 0 to 255, or one for each channel."""
    values = fill if isinstance(fill, Sequence) and not isinstance(fill, str) else [fill]
    is_level = [isinstance(v, _NUMBER) and 0 <= v <= 255 for v in values]
    if not all(is_level) or len(values) not in (1, channels):
        raise InputError(f"fill={fill!r} must be from 0 to 255, or {channels} such values")
