"""PASCAL VOC and sets in its format: segmentation, and detection."""

import dataclasses
import os
import pathlib
import re

from cvjax.checks import Size
from cvjax.data.archive import unpack_once
from cvjax.data.sources import Example
from cvjax.data.sources.instances import Faults, LeftOut, check_settings, read_image, record
from cvjax.data.sources.masks import PairReader
from cvjax.data.sources.voc_xml import read_objects
from cvjax.errors import InputError, nearest

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa",
    "train", "tv monitor",
)  # fmt: skip
# As they are written in Annotations.
VOC_OBJECTS = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
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
        root, names = _find(self.path, "Segmentation", self.split)
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


@dataclasses.dataclass(frozen=True)
class VocDetection:
    """Images and boxes of PASCAL VOC, from its folder or from the archive as it is downloaded.

    The names in ImageSets/Main/<split>.txt are those of JPEGImages/<name>.jpg and of
    Annotations/<name>.xml. Records are those of `cvjax.data.sources.instances`, in the order of the
    list: `ignore` is what is "difficult", and there are no crowds. Coordinates in the files count
    pixels from 1 and a box contains its last ones: x1 = xmin - 1, x2 = xmax; with `first_pixel` 0
    they are continuous. All annotations are checked when the source is made.

    Attributes:
        path: a folder, at or above (up to three levels) the one with ImageSets; or a tar archive,
            which is unpacked beside it, once (see `cvjax.data.archive.unpack_once`).
        split: "train", "val", "trainval", or whatever else there is a list for.
        class_names: in the order of the labels; another name in a file is bad.
        first_pixel: 1, as in VOC, or 0, as some tools write its format: then x1 = xmin.
        image_size, max_instances, channels, on_bad, max_pixels: see `cvjax.data.sources.coco.Coco`.

    Raises:
        InputError: there is no such folder, archive or split, or it is empty; several sets are
            below the folder; an annotation is bad: the message names file, image and object. Of a
            record: the image is damaged or of another size. OSError (of a record): it cannot be
            read.
    """

    path: str | pathlib.Path
    split: str = "train"
    class_names: tuple[str, ...] = VOC_OBJECTS
    first_pixel: int = 1
    image_size: Size | None = None
    max_instances: int = 50
    channels: int = 3
    on_bad: str = "error"
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        check_settings(self.channels, self.image_size, self.max_instances, self.max_pixels)
        if self.first_pixel not in (0, 1):
            raise InputError(f"first_pixel is {self.first_pixel!r}; it must be 0 or 1")
        faults = Faults(self.on_bad)
        root, names = _find(self.path, "Main", self.split)
        left_out = LeftOut(f"{root} ({self.split})", self.max_instances)
        images = []
        for name in names:
            file, image = root / "Annotations" / f"{name}.xml", f"image {name}.jpg"
            try:
                content = file.read_bytes()
                if not (root / "JPEGImages" / f"{name}.jpg").is_file():
                    raise ValueError(f"it is not in {root / 'JPEGImages'}")
                truth = read_objects(content, self.class_names, self.first_pixel)
            except FileNotFoundError:
                faults.add(f"{file} does not exist: {image} has no annotation")
                continue
            except (OSError, ValueError) as error:
                faults.add(f"{file}: {image}: {error}")
                continue
            for fault in truth.faults:
                faults.add(f"{file}: {image}, {fault}")
            left_out.add(len(truth.boxes), silent=True)
            images.append((name, truth))
        faults.say(str(root))
        left_out.say()
        if not images:
            raise InputError(f"{root} has no image of {self.split!r} that is not bad")
        for name, value in {
            "skipped": tuple(faults.lines), "_root": root, "_images": tuple(images),
        }.items():  # fmt: skip
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        name, truth = self._images[index]
        file = self._root / "JPEGImages" / f"{name}.jpg"
        return record(
            read_image(file, self.channels, self.max_pixels, truth.size),
            truth.boxes,
            truth.labels,
            ignore=truth.difficult,
            rows=self.max_instances,
            image_size=self.image_size,
        )

    def example_id(self, index: int) -> str:
        """Returns the name of the image in the list."""
        return self._images[index][0]


def _find(path: str | pathlib.Path, kind: str, split: str) -> tuple[pathlib.Path, list[str]]:
    """The folder of a set, unpacked if need be, and the names of one of its lists."""
    path = pathlib.Path(path).expanduser()
    root = _find_root(path if path.is_dir() else unpack_once(path), kind)
    lists = root / "ImageSets" / kind
    splits = [file.stem for file in lists.glob("*.txt")]
    if split not in splits:
        raise InputError(f"split={split!r} does not exist in {lists}{nearest(split, splits)}")
    # What is no text is the name of no file, and that is said where the file is wanted.
    lines = (lists / f"{split}.txt").read_text("utf-8-sig", errors="replace").splitlines()
    names = [_name(line.strip(), root) for line in lines if line.strip()]
    if not names:
        raise InputError(f"{lists / split}.txt names no images")
    return root, names


def _name(line: str, root: pathlib.Path) -> str:
    """The lists of one class have a second column; but a name may have spaces, too."""
    name = re.sub(r"\s+(-1|0|1)$", "", line)
    whole = os.path.join(root, "JPEGImages", f"{line}.jpg")
    return line if name != line and os.path.isfile(whole) else name


def _find_root(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The folder with ImageSets/<kind>, at or up to three levels below `folder`."""
    for level in range(4):
        found = sorted(folder.glob("*/" * level + f"ImageSets/{kind}"))
        if len(found) > 1:
            names = ", ".join(str(one.parents[1]) for one in found)
            raise InputError(f"{folder} has several sets: give the path of one ({names})")
        if found:
            return found[0].parents[1]
    raise InputError(f"{folder} has no ImageSets/{kind}, at or below it")
