"""Checks of what a person gives: each raises an InputError, a line: `name is value; it must be`.

Arguments of functions are given by name with their value, `check_count(1, copies=copies)`; fields
of an object by their names alone, `check_at_least(self, copies=1)`: the line names its class.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.errors import InputError

_WHOLE, _NUMBER = (int, np.integer), (int, float, np.integer, np.floating)
Size = int | Sequence[int]  # the side of a square, or (height, width)


def check_between(low: float, high: float, **settings: float) -> None:
    """Raises InputError unless each setting is a number with low <= setting <= high.

    An array of JAX, which may be traced, passes.
    """
    for name, value in settings.items():
        if isinstance(value, jax.Array):
            continue
        if isinstance(value, bool) or not isinstance(value, _NUMBER):
            raise InputError(f"{name} is {value!r}; it must be a number")
        if not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise InputError(f"{name} is {value}; it must be {bounds}")


def check_positive(**settings: float) -> None:
    """Raises InputError unless each setting is a number above 0; infinity is none. As above."""
    check_between(-math.inf, math.inf, **settings)
    for name, value in settings.items():
        if not isinstance(value, jax.Array) and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; it must be above 0")


def check_count(least: int, **settings: int) -> None:
    """Raises InputError unless each setting is a whole number, `least` <= setting < 2^31."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, _WHOLE) or value < least:
            raise InputError(f"{name} is {value!r}; it must be a whole number, at least {least}")
        if value >= 2**31:  # those on the device have 31 bits
            raise InputError(f"{name} is {value}; it must be below 2^31, {2**31}")


def check_range(low: float, high: float, **settings: Sequence[float]) -> None:
    """Raises InputError unless each setting is a pair with low <= first <= second <= high."""
    for name, value in settings.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            raise InputError(f"{name} is {value!r}; it must be two numbers, the least and the most")
        check_between(low, high, **{f"{name}[0]": value[0], f"{name}[1]": value[1]})
        if value[0] > value[1]:
            raise InputError(f"{name} is {value}; it must begin with the smaller number")


def check_choice(choices: Collection, **settings: object) -> None:
    """Raises InputError unless each setting is one of the choices."""
    for name, value in settings.items():
        if value not in choices:
            *first, last = map(repr, choices)
            raise InputError(f"{name} is {value!r}; it can be {', '.join(first)} or {last}")


def check_weights(classes: int, **settings: Sequence[float] | jax.Array | None) -> None:
    """Raises InputError unless each setting is None, or a number of 0 or more for each class.

    Of arrays of JAX, which may be traced, only how many they are.
    """
    for name, value in settings.items():
        if value is None:
            continue
        is_known = not isinstance(value, jax.Array)
        if np.ndim(value) != 1 or (is_known and np.asarray(value).dtype.kind not in "iuf"):
            raise InputError(f"{name} is {value!r}; it must be a number for each class")
        if len(value) != classes:
            raise InputError(f"{name} has {len(value)} numbers, but there are {classes} classes")
        if is_known and not np.all(np.asarray(value) >= 0):  # NaN is neither
            raise InputError(f"{name} is {value}; each must be a number of 0 or more")


def check_fill(channels: int, fill: object) -> None:
    """Raises InputError unless `fill` is a value from 0 to 255, or one for each channel."""
    values = fill if isinstance(fill, Sequence) and not isinstance(fill, str) else [fill]
    is_level = [isinstance(v, _NUMBER) and 0 <= v <= 255 for v in values]
    if not all(is_level) or len(values) not in (1, channels):
        raise InputError(f"fill is {fill!r}; it must be in [0, 255], or {channels} such values")


def height_and_width(size: Size, name: str = "size") -> tuple[int, int]:
    """Returns (height, width), for one number that of a square; raises InputError."""
    pair = tuple(size) if isinstance(size, Sequence | np.ndarray) else (size, size)
    if len(pair) != 2 or any(
        isinstance(side, bool) or not isinstance(side, _WHOLE) or side < 1 for side in pair
    ):
        raise InputError(
            f"{name} is {size!r}; it must be a number of pixels, at least 1, or two of them"
        )
    return int(pair[0]), int(pair[1])


@contextlib.contextmanager
def fitting(field: str) -> Iterator[None]:
    """What was given as `field` is called in here: arguments that it does not take are one line."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{field} does not fit: {type(error).__name__}: {message}") from error


def check_call(field: str, function: Callable, *arguments: Any) -> Any:
    """The shapes of what was given as `field` makes of such arguments; nothing is computed.

    Raises InputError where it does not take them.
    """
    with fitting(field):
        return jax.eval_shape(function, *arguments)


def check_unit(
    images: jax.Array | np.ndarray, expected: str = "they must be floats in [0, 1]"
) -> None:
    """Raises InputError for images that are no floats or, outside of jit, not in [0, 1].

    A rounding error outside passes, as bicubic scaling leaves it; 0..255 and -1..1 do not. The line
    ends with what is `expected`.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images have dtype {images.dtype}; {expected}")
    if isinstance(images, jax.core.Tracer) or not images.size:
        return
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN is neither
        raise InputError(f"images have values from {low:.4g} to {high:.4g}; {expected}")


def valid_rows(batch: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The rows of a field that are `valid`, of a batch on the host; not copied where all are."""
    rows, valid = np.asarray(batch[name]), np.asarray(batch["valid"], bool)
    return rows if valid.all() else rows[valid]


def check_unit_images(batch: Mapping[str, np.ndarray]) -> None:
    """Raises InputError unless the valid images [b, h, w, c] of a batch on the host are in [0, 1].

    What `fit` asks a task that has a `check`.
    """
    check_unit(
        valid_rows(batch, "image"),
        "this task takes them in [0, 1]: give uint8, which the loader divides by 255, or rescale",
    )


def check_channels(batch: Mapping[str, np.ndarray], **settings: float | tuple[float, ...]) -> None:
    """Raises InputError unless each setting is a number, or one for each channel of the images.

    One that is called `std` must be above 0.
    """
    channels = np.shape(batch["image"])[-1]
    for name, value in settings.items():
        if np.ndim(value) > 1 or np.size(value) not in (1, channels):
            raise InputError(
                f"{name} is {value}; the images have {channels} channels: it must be a number, or "
                "one for each of them"
            )
        if name == "std" and not np.all(np.asarray(value) > 0):
            raise InputError(f"std is {value}; images are divided by it: it must be above 0")


def check_labels(
    labels: np.ndarray, num_classes: int, name: str = "label", ignored: int | None = None
) -> None:
    """Raises InputError for a label that is no class; 0 classes mean that nobody looks at them."""
    if not num_classes:
        return
    labels = np.asarray(labels)
    if labels.dtype.kind in "US":
        raise InputError(
            f"{name} is {str(labels.flat[0])!r}; classes are numbers, 0..{num_classes - 1}"
        )
    is_wrong = ~((labels >= 0) & (labels < num_classes))
    if labels.dtype.kind not in "iub":  # of those, which masks are, each is a whole number
        is_wrong |= labels != np.floor(labels)
    if ignored is not None:
        is_wrong &= labels != ignored
    if is_wrong.any():
        raise InputError(
            f"{name} is {labels[is_wrong][0]}, but num_classes is {num_classes}: classes are "
            f"0..{num_classes - 1}"
        )


def check_choices(owner: object, **choices: Collection) -> None:
    """Raises InputError unless each field of `owner` that is named is one of its `choices`."""
    for field, known in choices.items():
        check_choice(known, **{_named(owner, field): getattr(owner, field)})


def check_fractions(owner: object, *fields: str) -> None:
    """Raises InputError unless each of these fields of `owner` is a number in [0, 1]."""
    for field in fields:
        check_between(0, 1, **{_named(owner, field): getattr(owner, field)})


def check_at_least(owner: object, **least: float) -> None:
    """Raises InputError for a field of `owner` that is below its `least`, or not a number.

    Those of type `int` or `tuple[int, ...]` must be whole. None is passed over. Of a tuple, which
    cannot be empty, each number counts.
    """
    known = getattr(owner, "__dataclass_fields__", {})
    for field, bound in least.items():
        name, value = _named(owner, field), getattr(owner, field)
        if isinstance(value, tuple | list):
            if not value:
                raise InputError(f"{name} is {value}; it must have at least one number")
            settings = {f"{name}[{i}]": x for i, x in enumerate(value)}
        else:
            settings = {} if value is None else {name: value}
        check_between(bound, math.inf, **settings)
        annotation = str(known[field].type) if field in known else ""
        if "int" in annotation and "float" not in annotation:
            check_count(bound, **settings)


def _named(owner: object, field: str) -> str:
    return f"{type(owner).__name__}: {field}"
