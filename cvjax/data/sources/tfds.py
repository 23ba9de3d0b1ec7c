"""Datasets of TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import pathlib

import numpy as np

from cvjax.data.sources import Example
from cvjax.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A dataset that TensorFlow Datasets has prepared on this machine as ArrayRecord files.

    It reads the prepared files and nothing else: it never downloads, and it needs no TensorFlow.
    Records: image as stored (mostly uint8 [height, width, channels]); label int32 where it is an
    integer.

    Attributes:
        name: "mnist", or "mnist:3.0.1", or "name/config".
        split: "train", or a part of it: "train[:10%]".
        data_dir: where the datasets are; None is the default of TensorFlow Datasets.
        image_key: the feature that is the image.
        label_key: the feature that is the label; None where there is none.

    Raises:
        InputError: tensorflow_datasets is not installed; the dataset is not prepared (the message
            has the command that prepares it); no such split or feature.
    """

    name: str
    split: str = "train"
    data_dir: str | pathlib.Path | None = None
    image_key: str = "image"
    label_key: str | None = "label"

    def __post_init__(self) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise InputError(
                "tensorflow_datasets is not installed: pip install 'cvjax[tfds]'"
            ) from None
        try:
            # From the files alone: `tfds.builder` would ask the network about what is not there.
            builder = tfds.core.read_only_builder.builder_from_files(
                self.name, data_dir=self.data_dir
            )
        except tfds.core.registered.DatasetNotFoundError:
            raise InputError(f"{self.name} is not prepared here{self._remedy()}") from None
        keys = {"image": self.image_key, "label": self.label_key}
        keys = {name: key for name, key in keys.items() if key is not None}
        for key in keys.values():
            if key not in builder.info.features:
                raise InputError(
                    f"{self.name} has no feature {key!r}{nearest(key, builder.info.features)}"
                )
        try:
            data = builder.as_data_source(split=self.split)
        except ValueError as error:
            raise InputError(f"split={self.split!r} of {self.name}: {error}") from None
        except NotImplementedError:
            raise InputError(
                f"{self.name} is prepared, but not as ArrayRecord files{self._remedy()}"
            ) from None
        label = builder.info.features[self.label_key] if self.label_key else None
        object.__setattr__(self, "class_names", tuple(getattr(label, "names", None) or ()))
        object.__setattr__(self, "_keys", keys)
        object.__setattr__(self, "_data", data)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        record = self._data[index]
        example = {name: np.asarray(record[key]) for name, key in self._keys.items()}
        if "label" in example and example["label"].dtype.kind in "iu":
            example["label"] = example["label"].astype(np.int32)
        return example

    def __reduce__(self) -> tuple:
        # A worker process opens the files itself.
        return Tfds, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def _remedy(self) -> str:
        where = f", data_dir={str(self.data_dir)!r}" if self.data_dir else ""
        return (
            '; this downloads and prepares it: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({self.name!r}{where}, file_format='array_record')"
            '.download_and_prepare()"'
        )
