"""Image files in folders, one folder per class."""

import dataclasses
import io
import pathlib

import cv2
import numpy as np
from PIL import Image, ImageOps

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example
from cvjax.data.sources.pictures import undecodable, upright
from cvjax.errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files, decoded when they are asked for; the sub-folders of `path` are the classes.

    The sorted names of the sub-folders are the classes, and inside each, at any depth, the files
    are taken in sorted order; hidden files and folders of classes are passed over. A photograph is
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
        ValueError (of a record): the file is damaged or too large. OSError: it cannot be read.
    """

    path: str | pathlib.Path
    channels: int = 3
    image_size: int | None = None
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        root = pathlib.Path(self.path).expanduser()
        check_choices(self, channels=(1, 3))
        check_at_least(self, image_size=1)
        if not root.is_dir():
            raise InputError(f"the folder {root} does not exist")
        classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise InputError(f"{root} has no sub-folders: there must be one for each class")
        files, labels = [], []
        for label, folder in enumerate(classes):
            found = sorted(str(file) for file in folder.rglob("*") if _is_image(file))
            if not found:
                raise InputError(f"{folder} has no images ({' '.join(_SUFFIXES)})")
            files += found
            labels += [label] * len(found)
        object.__setattr__(self, "class_names", tuple(folder.name for folder in classes))
        object.__setattr__(self, "_files", tuple(files))
        object.__setattr__(self, "_labels", np.array(labels, np.int32))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        # Read first, so that an OSError is the store's and may pass, while a ValueError from
        # decoding is the file's and stays.
        content = pathlib.Path(self._files[index]).read_bytes()
        try:
            image = self._decode(content)
        except Exception as error:
            raise ValueError(undecodable(self._files[index], error)) from error
        return {"image": image, "label": self._labels[index]}

    def example_id(self, index: int) -> str:
        """Returns the path of the file."""
        return self._files[index]

    def _decode(self, content: bytes) -> np.ndarray:
        if self.channels == 3 and self.image_size is None and (size := _colour_jpeg(content)):
            self._check_size(*size)
            # The same pixels, upright too, in half of the time.
            array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
            if array is not None:  # Else Pillow says what is wrong.
                return array
        with Image.open(io.BytesIO(content)) as image:  # Reads the header only.
            self._check_size(*image.size)
            picture = upright(image, self.channels)
        if self.image_size is not None:
            square = (self.image_size, self.image_size)
            picture = ImageOps.fit(picture, square, Image.Resampling.BICUBIC)
        array = np.asarray(picture)
        return array[..., None] if array.ndim == 2 else array

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise ValueError(
                f"the header claims {width} x {height} pixels, more than "
                f"max_pixels={self.max_pixels}"
            )


def _colour_jpeg(content: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a JPEG of three channels; None for all else.

    ITU-T T.81, sections B.1.1 and B.2.2. Pillow's reader, which knows all formats, takes a fifth of
    the time of decoding.
    """
    at = 2
    while content[:2] == b"\xff\xd8" and at + 9 < len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the start of the frame
            bits, channels = content[at + 4], content[at + 9]
            height, width = (int.from_bytes(content[at + i : at + i + 2], "big") for i in (5, 7))
            return (width, height) if (bits, channels) == (8, 3) and height else None
        at += 1 if marker == 0xFF else 2 + length  # a marker may have more than one 0xFF before it
    return None


def _is_image(file: pathlib.Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
