"""Image files of any kind as the pictures of 8 bits that records have."""

import io
import os
import pathlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cvjax.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def files_below(folder: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """The files with one of these suffixes in a folder, at any depth, but for what is hidden.

    A tool's hidden folder, as .ipynb_checkpoints, can have copies of the pictures beside it.
    """
    return [
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def read_picture(
    file: str | os.PathLike,
    max_pixels: int,
    convert: Callable[[Image.Image], Image.Image],
    *,
    opencv: bool = False,
) -> Image.Image | np.ndarray:
    """Reads an image file: what `convert` makes of it.

    With `opencv` a JPEG in colour is not converted but uint8 [h, w, 3], upright, in half of the
    time. Where annotations must fit, leave it to Pillow: the pixels are the same, but OpenCV shows
    some files that are damaged.

    Raises InputError for a file that is damaged, whose header claims more than `max_pixels`, or
    that `convert` refuses; OSError for one that cannot be read.
    """
    # Read first, so that an OSError is the store's and may pass, while an error from decoding is
    # the file's and stays.
    content = pathlib.Path(file).read_bytes()
    try:
        if opencv and (size := _colour_jpeg(content)):
            _check_size(*size, max_pixels)
            array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
            if array is not None:  # Else Pillow says what is wrong.
                return array
        with Image.open(io.BytesIO(content)) as image:  # Reads the header only.
            _check_size(*image.size, max_pixels)
            return convert(image)
    except Exception as error:
        # Pillow's own line for what is no image may hold an address in memory.
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"cannot decode {file}: {reason}") from error


def upright(image: Image.Image, channels: int) -> Image.Image:
    """An opened file with 1 or 3 channels of 8 bits, turned as its EXIF orientation says.

    Of grey levels of 16 bits the higher 8 are kept, as Pillow does with colours of 16 bits;
    its own conversion would make white of all that is above 255. Floats, which may have any range,
    are a ValueError.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its levels are floats; they must be whole numbers of 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return image.convert({1: "L", 3: "RGB"}[channels])


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"the header claims {width} x {height} pixels, more than max_pixels={max_pixels}"
        )


def _colour_jpeg(content: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a JPEG of three channels; None for all else.

    None also for one whose XMP states an orientation, of which OpenCV does not know. ITU-T T.81,
    sections B.1.1 and B.2.2. Pillow's reader, which knows all formats, takes a fifth of the time of
    decoding.
    """
    at = 2
    while content[:2] == b"\xff\xd8" and at + 9 < len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the start of the frame
            bits, channels = content[at + 4], content[at + 9]
            height, width = (int.from_bytes(content[at + i : at + i + 2], "big") for i in (5, 7))
            is_turned = b"tiff:Orientation" in content[:at]
            is_plain = (bits, channels) == (8, 3) and height and not is_turned
            return (width, height) if is_plain else None
        at += 1 if marker == 0xFF else 2 + length  # a marker may have more than one 0xFF before it
    return None
