"""Image files in folders, one folder per class."""

import dataclasses
import pathlib
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example
from cvjax.data.sources.pictures import SUFFIXES, files_below, read_picture, upright
from cvjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files, decoded when they are asked for; the sub-folders of `path` are the classes.

    The sorted names of the sub-folders are the classes, and inside each, at any depth, the files
    are taken in sorted order; hidden files and folders are passed over. A photograph is
    turned upright as its EXIF orientation says; of grey levels of 16 bits the higher 8 are kept.
    Records: image uint8 [height, width, channels]; label int32.

    Attributes:
        path: the folder of folders.
        channels: 3 for colour, 1 for grey.
        image_size: None keeps each image as it is; else the shorter side is scaled to this many
            pixels (antialiased) and the middle is cut out, so that all images are squares.
        max_pixels: a file whose header claims more is not decoded, for it would fill the memory.

    Raises:
        InputError: the folder is missing, has no sub-folders, or one of them has no images.
        Of a record: the file is damaged or too large. OSError (of a record): it cannot be read.
    """

    path: str | pathlib.Path
    channels: int = 3
    image_size: int | None = None
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        root = pathlib.Path(self.path).expanduser()
        check_choices(self, channels=(1, 3))
        check_at_least(self, image_size=1, max_pixels=1)
        if not root.is_dir():
            raise InputError(f"the folder {root} does not exist")
        classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise InputError(f"{root} has no sub-folders: there must be one for each class")
        files, labels = [], []
        for label, folder in enumerate(classes):
            found = sorted(map(str, files_below(folder, SUFFIXES)))
            if not found:
                raise InputError(f"{folder} has no images ({' '.join(SUFFIXES)})")
            files += found
            labels += [label] * len(found)
        object.__setattr__(self, "class_names", tuple(folder.name for folder in classes))
        object.__setattr__(self, "_files", tuple(files))
        object.__setattr__(self, "_labels", np.array(labels, np.int32))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        picture = read_picture(
            self._files[index],
            self.max_pixels,
            partial(upright, channels=self.channels),
            opencv=self.channels == 3 and self.image_size is None,
        )
        if self.image_size is not None:
            square = (self.image_size, self.image_size)
            picture = ImageOps.fit(picture, square, Image.Resampling.BICUBIC)
        return {"image": np.atleast_3d(picture), "label": self._labels[index]}

    def example_id(self, index: int) -> str:
        """Returns the path of the file."""
        return self._files[index]
