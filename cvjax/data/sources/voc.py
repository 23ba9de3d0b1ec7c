"""PASCAL VOC and sets in its format: the segmentation part."""

import dataclasses
import pathlib

from cvjax.data.archive import unpack_once
from cvjax.data.sources import Example
from cvjax.data.sources.masks import PairReader
from cvjax.errors import InputError, nearest

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa",
    "train", "tv monitor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VocSegmentation:
    """Images and masks of PASCAL VOC, from its folder or from the archive as it is downloaded.

    M. Everingham et al.: The PASCAL Visual Object Classes Challenge, IJCV 2010. The names in
    ImageSets/Segmentation/<split>.txt are those of JPEGImages/<name>.jpg and of
    SegmentationClass/<name>.png, whose palette indices are the classes: 0 is the background, 255
    the outline that does not count. No VOC image is higher or wider than 500 pixels: pad_to=500
    evaluates them at their own sizes. Records are those of `PairReader`, in the order of the list.

    Attributes:
        path: a folder, at or above (up to three levels) the one with ImageSets; or a tar archive,
            which is unpacked beside it, once (see `cvjax.data.archive.unpack_once`).
        split: "train", "val", "trainval", or whatever else there is a list for.
        class_names: in the order of the classes.
        channels, image_size, pad_to, max_pixels: see `PairReader`.

    Raises:
        InputError: there is no such folder, archive or split, or it is empty; an image or mask is
            missing; several sets are below the folder; a number makes no sense.
        ValueError, OSError (of a record): see `PairReader.read`.
    """

    path: str | pathlib.Path
    split: str = "train"
    class_names: tuple[str, ...] = VOC_CLASSES
    channels: int = 3
    image_size: int | None = None
    pad_to: int | None = None
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        reader = PairReader(self.channels, self.image_size, self.pad_to, self.max_pixels)
        path = pathlib.Path(self.path).expanduser()
        root = _find_root(path if path.is_dir() else unpack_once(path))
        lists = root / "ImageSets" / "Segmentation"
        splits = [file.stem for file in lists.glob("*.txt")]
        if self.split not in splits:
            raise InputError(
                f"split={self.split!r} does not exist in {lists}{nearest(self.split, splits)}"
            )
        names = (lists / f"{self.split}.txt").read_text().split()
        if not names:
            raise InputError(f"{lists / self.split}.txt names no images")
        for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
            there = {file.name for file in (root / folder).glob(f"*{suffix}")}
            missing = [name + suffix for name in names if name + suffix not in there]
            if missing:
                raise InputError(
                    f"{len(missing)} of the {len(names)} files of {self.split!r} are not in "
                    f"{root / folder}, the first is {missing[0]}"
                )
        object.__setattr__(self, "_reader", reader)
        object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_names", tuple(names))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        return self._reader.read(
            self._root / "JPEGImages" / f"{name}.jpg",
            self._root / "SegmentationClass" / f"{name}.png",
        )

    def example_id(self, index: int) -> str:
        """Returns the name of the image in the list."""
        return self._names[index]


def _find_root(folder: pathlib.Path) -> pathlib.Path:
    """The folder with ImageSets/Segmentation, at or up to three levels below `folder`."""
    for level in range(4):
        found = sorted(folder.glob("*/" * level + "ImageSets/Segmentation"))
        if len(found) > 1:
            names = ", ".join(str(one.parents[1]) for one in found)
            raise InputError(f"{folder} has several sets: give the path of one ({names})")
        if found:
            return found[0].parents[1]
    raise InputError(f"{folder} has no ImageSets/Segmentation, at or below it")
