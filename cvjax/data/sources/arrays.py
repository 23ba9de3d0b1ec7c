"""Sources in memory: arrays from a notebook, or the arrays of an .npz file."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from cvjax.checks import check_unit
from cvjax.data.sources import Example, frozen
from cvjax.errors import InputError, nearest


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays whose first axis counts the examples: `Arrays({"image": x, "label": y})`.

    Attributes:
        fields: arrays [n, ...] by name. `image` is uint8, or float in [0, 1], of shape
            [n, height, width, channels] or [n, height, width]. Integers of 64 bits become int32
            and float64 becomes float32, as they would in JAX.

    Raises:
        InputError: no fields, unequal lengths, or an image of another type, range or shape, or
            with its channels first.
    """

    fields: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        fields = {name: _narrow(np.asarray(value)) for name, value in self.fields.items()}
        if not fields or any(not value.ndim for value in fields.values()):
            raise InputError("arrays need at least one field, and each field an axis of examples")
        lengths = {name: len(value) for name, value in fields.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InputError(f"the arrays must be of equal length, but there are: {found}")
        if "image" in fields:
            fields["image"] = _images(fields["image"])
        object.__setattr__(self, "fields", {name: frozen(value) for name, value in fields.items()})

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: value[index] for name, value in self.fields.items()}


@dataclasses.dataclass(frozen=True)
class Npz:
    """The arrays `image` and `label` of an .npz file, under whatever names they have there.

    Attributes:
        path: the file.
        image_key: the name of the images in it (types and shapes as in `Arrays`).
        label_key: the name of the labels; None where there are none.

    Raises:
        InputError: no such file, not an .npz file, no such name in it, or what `Arrays` refuses.
    """

    path: str | pathlib.Path
    image_key: str = "image"
    label_key: str | None = "label"

    def __post_init__(self) -> None:
        keys = {"image": self.image_key, "label": self.label_key}
        file = pathlib.Path(self.path).expanduser()
        if file.exists() and not zipfile.is_zipfile(file):
            raise InputError(
                f"{self.path} cannot be read as an .npz file: it is none, or is cut off"
            )
        try:
            with np.load(file) as file:
                for key in keys.values():
                    if key is not None and key not in file.files:
                        raise InputError(f"{self.path} has no {key!r}{nearest(key, file.files)}")
                fields = {name: file[key] for name, key in keys.items() if key is not None}
        except FileNotFoundError:
            raise InputError(f"the file {self.path} does not exist") from None
        except InputError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise ten kinds for damaged files
            reason = str(error) or "it is damaged"
            raise InputError(f"{self.path} cannot be read as an .npz file: {reason}") from error
        try:
            arrays = Arrays(fields)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        object.__setattr__(self, "_arrays", arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Example:
        return self._arrays[index]

    def __reduce__(self) -> tuple:
        # A worker process reads the file itself rather than be sent all of it.
        return Npz, (self.path, self.image_key, self.label_key)


def _narrow(array: np.ndarray) -> np.ndarray:
    narrow = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}
    return array.astype(narrow.get(array.dtype, array.dtype), copy=False)


def _images(images: np.ndarray) -> np.ndarray:
    """Returns [n, h, w, c]; raises InputError unless uint8, or float in [0, 1]."""
    if images.ndim not in (3, 4):
        raise InputError(
            f"images are [n, height, width, channels] or [n, height, width], not "
            f"{list(images.shape)}"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise InputError(
            f"images are {list(images.shape)}: channels come last, [n, height, width, channels]; "
            "np.moveaxis(images, 1, -1) puts them there"
        )
    if images.dtype != np.uint8:
        check_unit(images, "they must be uint8, or floats in [0, 1]")
    return images[..., None] if images.ndim == 3 else images
