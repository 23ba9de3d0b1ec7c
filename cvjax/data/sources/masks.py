"""Images with a mask each: two folders of files with equal names."""

import dataclasses
import pathlib
import re
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example
from cvjax.data.sources.pictures import SUFFIXES, files_below, read_picture, upright
from cvjax.errors import InputError

IGNORE = 255  # in a mask: a pixel without truth
_MASKS = (".png", ".bmp", ".tif", ".tiff")  # Those that give back the numbers put in.


@dataclasses.dataclass(frozen=True)
class PairReader:
    """Decodes an image and its mask and brings both to one size.

    Records: image uint8 [height, width, channels]; mask uint8 [height, width], a class or 255. A
    mask is a file of palette indices, of grey levels, or of two levels (0 and 1): its numbers are
    the classes, whatever its colours. Each file is turned upright as its own EXIF orientation says.

    Attributes:
        channels: of the image: 3 for colour, 1 for grey.
        image_size: None keeps each pair as it is; else the shorter side is scaled to this many
            pixels (the image antialiased, the mask by its nearest pixels) and the middle is cut
            out, so that all are squares.
        pad_to: None, or the side of a square into whose upper left corner each pair is laid as it
            is, beside it black and 255: pairs of different sizes fit into one batch, and metrics
            are those of the originals. Not together with `image_size`.
        max_pixels: a file whose header claims more is not decoded, for it would fill the memory.

    Raises:
        InputError: a number makes no sense.
    """

    channels: int = 3
    image_size: int | None = None
    pad_to: int | None = None
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        check_choices(self, channels=(1, 3))
        check_at_least(self, image_size=1, pad_to=1, max_pixels=1)
        if self.image_size is not None and self.pad_to is not None:
            raise InputError(
                f"image_size={self.image_size} and pad_to={self.pad_to}: give only one of them"
            )

    def read(self, image: pathlib.Path, mask: pathlib.Path) -> Example:
        """Reads one pair.

        Raises ValueError for a file that is damaged, no mask, too large or of another size than
        its partner; OSError for one that cannot be read.
        """
        picture = read_picture(image, self.max_pixels, partial(upright, channels=self.channels))
        classes = read_picture(mask, self.max_pixels, _classes)
        if picture.size != classes.size:
            raise ValueError(
                f"{image} is {picture.size[0]} x {picture.size[1]} pixels, but {mask} is "
                f"{classes.size[0]} x {classes.size[1]}"
            )
        if self.image_size is not None:
            square = (self.image_size, self.image_size)
            picture = ImageOps.fit(picture, square, Image.Resampling.BICUBIC)
            classes = ImageOps.fit(classes, square, Image.Resampling.NEAREST)
        pixels, labels = np.atleast_3d(picture), np.asarray(classes)
        if self.pad_to is not None:
            rows, columns = (self.pad_to - side for side in labels.shape)
            if rows < 0 or columns < 0:
                raise ValueError(
                    f"{image} is {labels.shape[1]} x {labels.shape[0]} pixels, more than "
                    f"pad_to={self.pad_to}"
                )
            pixels = np.pad(pixels, ((0, rows), (0, columns), (0, 0)))
            labels = np.pad(labels, ((0, rows), (0, columns)), constant_values=IGNORE)
        return {"image": pixels, "mask": labels}


@dataclasses.dataclass(frozen=True)
class Masks:
    """Files in `path`/images and `path`/masks whose names are equal but for the suffix.

    Sub-folders may be in both, and belong to the name; hidden files and folders are passed over.
    Records are those of `PairReader`, in the order of their names.

    Attributes:
        path: the folder with the two folders.
        class_names: of the classes, for people.
        channels, image_size, pad_to, max_pixels: see `PairReader`.

    Raises:
        InputError: a folder is missing or empty; an image has no mask or a mask no image; two files
            have one name; a number makes no sense.
        ValueError, OSError (of a record): see `PairReader.read`.
    """

    path: str | pathlib.Path
    class_names: tuple[str, ...] = ()
    channels: int = 3
    image_size: int | None = None
    pad_to: int | None = None
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        reader = PairReader(self.channels, self.image_size, self.pad_to, self.max_pixels)
        root = pathlib.Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError(f"the folder {root} does not exist")
        images, masks = _by_stem(root / "images", SUFFIXES), _by_stem(root / "masks", _MASKS)
        for lonely, here, there in (
            (images.keys() - masks.keys(), images, "masks"),
            (masks.keys() - images.keys(), masks, "images"),
        ):
            if lonely:
                raise InputError(
                    f"{len(lonely)} files have no partner in {root / there}, the first is "
                    f"{here[min(lonely)]}"
                )
        object.__setattr__(self, "_reader", reader)
        object.__setattr__(self, "_files", tuple((images[s], masks[s]) for s in sorted(images)))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        return self._reader.read(*self._files[index])

    def example_id(self, index: int) -> str:
        """Returns the path of the image."""
        return str(self._files[index][0])


def _by_stem(folder: pathlib.Path, suffixes: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """{name inside the folder, without suffix: file}."""
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist: there must be images/ and masks/")
    found: dict[str, pathlib.Path] = {}
    for file in sorted(files_below(folder, suffixes)):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise InputError(f"{found[stem]} and {file} have one name: which is meant?")
        found[stem] = file
    if not found:
        raise InputError(f"{folder} has no files ({' '.join(suffixes)})")
    return found


def _classes(mask: Image.Image) -> Image.Image:
    """A mask's numbers, as a picture of 8 bits."""
    if mask.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
        raise ValueError(f"a mask has palette indices or grey levels, but this is {mask.mode}")
    # Pillow spreads grey of 2 or 4 bits over 0..255, and turns that of a TIFF around whose 0 is
    # white. As what it reads a file, stands in the tile, say "L;4I".
    args = mask.tile[0].args if mask.tile else ""
    kind = args if isinstance(args, str) else str((*args, "")[0])
    numbers = np.asarray(ImageOps.exif_transpose(mask))
    if grey := re.fullmatch("(1|L);?([24]?)(I?)R?", kind):
        most = 1 if grey[1] == "1" else 2 ** int(grey[2] or 8) - 1
        numbers = numbers // (1 if grey[1] == "1" else 255 // most)
        numbers = most - numbers if grey[3] else numbers
    if numbers.max() > 255 or numbers.min() < 0:
        raise ValueError(
            f"a mask has classes in 0..255, but this has {numbers.min()}..{numbers.max()}"
        )
    return Image.fromarray(numbers.astype(np.uint8))
