"""The fields with a row for each object, of an example that may be padded.

They are described in `cvjax.data.transforms`.
"""

import numpy as np

from cvjax.data.sources import Example
from cvjax.errors import InputError


def names_of_objects(example: Example) -> list[str]:
    """Returns the names of the fields with a row for each object."""
    named = ("boxes", "masks", "keypoints", "crowd", "ignore", "area")
    return [name for name in example if name in named or name.startswith("box_")]


def check_objects(example: Example) -> None:
    """Raises InputError unless fields with a row for each object agree and boxes are finite."""
    shapes = {"boxes": (2, 4), "keypoints": (3, 3), "masks": (3, None)}
    for name, (axes, last) in shapes.items():
        if name in example:
            shape = np.shape(example[name])
            if len(shape) != axes or last not in (None, shape[-1]):
                wanted = {"boxes": "[n, 4]", "keypoints": "[n, k, 3]", "masks": "[n, h, w]"}[name]
                raise InputError(f"{name} must be {wanted}, not {list(shape)}")
            if not isinstance(example[name], np.ndarray):
                kind = type(example[name]).__name__
                raise InputError(f"{name} must be an array of NumPy, not a {kind}")
    broken = ~np.isfinite(example.get("boxes", np.zeros((0, 4)))).all(axis=1)
    if broken.any():  # it would be outside, and dropped without a word
        raise InputError(f"a box is {example['boxes'][broken][0].tolist()}; it must be finite")
    rows = {name: len(example[name]) for name in names_of_objects(example)}
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(f"these fields must have one row for each object: {found}")


def kept(example: Example, keep: np.ndarray) -> Example:
    """Returns the example with those objects alone for which `keep`, bool [n], is True.

    One with `box_valid` keeps its number of rows: at their end come rows of zeros.
    """
    if "box_valid" in example:
        keep = keep & example["box_valid"]
    if keep.all():
        return example
    chosen = {name: np.asarray(example[name])[keep] for name in names_of_objects(example)}
    return padded({**example, **chosen}, len(keep)) if "box_valid" in example else example | chosen


def real_objects(example: Example) -> Example:
    """Returns the example without the rows that `box_valid` says are padding."""
    valid = example.get("box_valid")
    if valid is None or np.all(valid):
        return example
    rows = {name: np.asarray(example[name])[valid] for name in names_of_objects(example)}
    return {**example, **rows}


def padded(example: Example, rows: int) -> Example:
    """Returns the example with so many rows of objects: its first ones, then rows of zeros.

    `box_valid`, bool [rows], says which are objects.
    """
    example = dict(real_objects(example))
    for name in names_of_objects(example):
        value = np.asarray(example[name])[:rows]
        example[name] = np.zeros((rows, *value.shape[1:]), value.dtype)
        example[name][: len(value)] = value
        count = len(value)
    return {**example, "box_valid": np.arange(rows) < count}
