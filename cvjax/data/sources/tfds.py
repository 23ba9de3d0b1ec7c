"""Datasets of TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from cvjax.checks import Size
from cvjax.data.sources import Example
from cvjax.data.sources.instances import Faults, LeftOut, check_box, check_settings, record
from cvjax.errors import InputError, nearest

_FIELDS = {"crowd": "is_crowd", "ignore": "is_difficult", "area": "area"}


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
        keys = {"image": self.image_key, "label": self.label_key}
        keys = {name: key for name, key in keys.items() if key is not None}
        features, data = _open(self.name, self.split, self.data_dir, tuple(keys.values()))
        label = features[self.label_key] if self.label_key else None
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


@dataclasses.dataclass(frozen=True)
class TfdsDetection:
    """A dataset with boxes, as "voc/2007" or "coco/2017", prepared as ArrayRecord files.

    Records are those of `cvjax.data.sources.instances`. The boxes are `bbox` in the feature
    `objects`, ymin, xmin, ymax, xmax in parts of the image; `is_crowd` and `area` are taken from
    there, and what `is_difficult` is ignored, where the dataset has these.

    Attributes:
        name, split, data_dir: as in `Tfds`.
        image_size: None keeps each image as it is, so that batches need a transform that resizes;
            else it is scaled to fit inside (height, width), or the side of a square.
        max_instances: rows of a record. As records are read, it is said how many objects are left
            out for that.
        first_pixel: 1 where x1 and y1 count pixels from 1, 0 where they are continuous. None is 1
            for "voc", whose coordinates TFDS divides as they stand in VOC's files, and else 0.
        on_bad: "error" at a bad object, one whose box has no area or whose label is no class;
            "skip" leaves each out. As records are read, it is said how many these were, and
            `skipped` lists them.

    Raises:
        InputError: as in `Tfds`; a setting makes no sense. Of a record: a bad object.
    """

    name: str
    split: str = "train"
    data_dir: str | pathlib.Path | None = None
    image_size: Size | None = None
    max_instances: int = 100
    first_pixel: int | None = None
    on_bad: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_faults", Faults(self.on_bad))
        if self.first_pixel not in (None, 0, 1):
            raise InputError(f"first_pixel is {self.first_pixel!r}; it must be 0, 1 or None")
        check_settings(3, self.image_size, self.max_instances, 1)
        features, data = _open(self.name, self.split, self.data_dir, ("image", "objects"))
        objects = features["objects"].feature
        for key in ("bbox", "label"):
            if key not in objects:
                raise InputError(
                    f"the objects of {self.name} have no {key!r}{nearest(key, objects)}"
                )
        object.__setattr__(self, "class_names", tuple(objects["label"].names))
        object.__setattr__(self, "_data", data)
        left_out = LeftOut(f"{self.name} ({self.split})", self.max_instances)
        object.__setattr__(self, "_left_out", left_out)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        stored = self._data[index]
        image, objects = np.asarray(stored["image"]), stored["objects"]
        height, width = image.shape[:2]
        labels = np.asarray(objects["label"], np.int64).reshape(-1)
        relative = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)
        first = self.first_pixel
        if first is None:
            first = int(re.split("[/:]", self.name)[0] == "voc")
        boxes = relative[:, [1, 0, 3, 2]] * [width, height, width, height] - [first, first, 0, 0]
        keep = np.ones(len(boxes), bool)
        for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            try:
                if not np.isfinite(box).all():
                    raise ValueError(f"its box {box.tolist()} is not finite")
                if not 0 <= label < len(self.class_names):
                    raise ValueError(f"its label {label} is no class")
                check_box(box, height, width, f"its box {box.round(3).tolist()} (x1, y1, x2, y2)")
            except ValueError as error:
                keep[number] = False
                self._note(f"record {index}, object {number}: {error}")
        self._left_out.add(int(keep.sum()))
        flags = {ours: objects.get(theirs) for ours, theirs in _FIELDS.items()}
        return record(
            image,
            boxes[keep],
            labels[keep],
            rows=self.max_instances,
            image_size=self.image_size,
            **{k: None if v is None else np.asarray(v)[keep] for k, v in flags.items()},
        )

    @property
    def skipped(self) -> tuple[str, ...]:
        """The bad objects of the records that were read."""
        return tuple(self._faults.lines)

    def _note(self, fault: str) -> None:
        name = f"{self.name} ({self.split})"
        line = f"{name}, {fault}"
        if line in self._faults.lines:  # A record is read in each epoch.
            return
        self._faults.add(line)
        count = len(self._faults.lines)
        if count & (count - 1) == 0:
            self._faults.say(name)

    def __reduce__(self) -> tuple:
        # A worker process opens the files itself.
        return TfdsDetection, tuple(getattr(self, one.name) for one in dataclasses.fields(self))


def _open(
    name: str, split: str, data_dir: str | pathlib.Path | None, keys: tuple[str, ...]
) -> tuple[Any, Any]:
    """The features of a prepared dataset, which must have these, and the records of a split."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(
            "tensorflow_datasets is not installed: pip install 'cvjax[tfds]'"
        ) from None
    remedy = _remedy(name, data_dir)
    try:
        # From the files alone: `tfds.builder` would ask the network about what is not there.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        raise InputError(f"{name} is not prepared here{remedy}") from None
    features = builder.info.features
    for key in keys:
        if key not in features:
            raise InputError(f"{name} has no feature {key!r}{nearest(key, features)}")
    try:
        return features, builder.as_data_source(split=split)
    except ValueError as error:
        raise InputError(f"split={split!r} of {name}: {error}") from None
    except NotImplementedError:
        raise InputError(f"{name} is prepared, but not as ArrayRecord files{remedy}") from None


def _remedy(name: str, data_dir: str | pathlib.Path | None) -> str:
    where = f", data_dir={str(data_dir)!r}" if data_dir else ""
    return (
        '; this downloads and prepares it: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}, file_format='array_record')"
        '.download_and_prepare()"'
    )
