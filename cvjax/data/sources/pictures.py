"""Image files of any kind as the pictures of 8 bits that records have."""

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def upright(image: Image.Image, channels: int) -> Image.Image:
    """An opened file with 1 or 3 channels of 8 bits, turned as its EXIF orientation says.

    Of grey levels of 16 bits the higher 8 are kept, as Pillow does with colours of 16 bits;
    its own conversion would make white of all that is above 255.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return image.convert({1: "L", 3: "RGB"}[channels])


def undecodable(file: str | os.PathLike, error: Exception) -> str:
    """The line for a file that Pillow cannot decode; its own may hold an address in memory."""
    is_none = isinstance(error, UnidentifiedImageError)
    return f"cannot decode {file}: {'it is no image' if is_none else error}"
