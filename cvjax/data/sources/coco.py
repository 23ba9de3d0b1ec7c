"""Images with boxes, masks and keypoints, described in the JSON format of COCO."""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from cvjax.checks import Size
from cvjax.data.sources import Example
from cvjax.data.sources.coco_masks import Outline, draw_outline, is_numbers, read_outline, short
from cvjax.data.sources.instances import (
    Faults,
    LeftOut,
    check_box,
    check_settings,
    read_image,
    record,
)
from cvjax.errors import InputError

_MOST_AREA = 1e10  # what COCO's own evaluation takes for infinite
_MIRRORED = {"left": "right", "right": "left"}


class _Image(NamedTuple):
    """What the file says of one image."""

    name: str
    height: int
    width: int
    objects: list


class _Object(NamedTuple):
    """What the file says of one object."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int
    crowd: bool
    ignore: bool
    area: float
    outline: Outline | None
    points: np.ndarray | None  # float32 [k, 3]


@dataclasses.dataclass(frozen=True)
class Coco:
    """The images of a folder with the annotations of a file in COCO's format.

    T.-Y. Lin et al.: Microsoft COCO (https://arxiv.org/abs/1405.0312); the format:
    https://cocodataset.org/#format-data. Records are those of `cvjax.data.sources.instances`, in
    the order of the file; images without any object are among them. Labels count the categories in
    the order of their ids. `ignore` is the annotation's field of that name; an `area` that is not
    there is that of the box. Masks are those of pycocotools, pixel for pixel.

    All annotations are checked when the source is made: a box without area or outside of its image,
    an unknown category, an image that is not in the folder, and with `masks` and `keypoints` these.

    Attributes:
        images: the folder of the images.
        annotations: the JSON file.
        image_size: None keeps each image as it is, so that batches need a transform that resizes;
            else it is scaled to fit inside (height, width), or the side of a square, and what
            reaches beyond it is cut off: boxes, and keypoints, which are then not visible.
        max_instances: rows of a record. It is said how many objects are left out for that.
        masks: whether records have masks; then each object needs a segmentation.
        keypoints: whether records have keypoints; an object without has all invisible ones.
        channels: 3 for colour, 1 for grey.
        on_bad: "error" at the first bad image or annotation; "skip" leaves each out, says how many
            there are, and lists them in the field `skipped`. Of an image this is what the file says
            of it; its pixels are read, and their number compared, when its record is.
        max_pixels: an image that claims to be larger is bad, for it would fill the memory.

    Raises:
        InputError: the folder or the file is not there, the file is no such JSON, or something in
            it is bad: the message names file, image and annotation. Of a record: the image is
            damaged or of another size. OSError (of a record): it cannot be read.
    """

    images: str | pathlib.Path
    annotations: str | pathlib.Path
    image_size: Size | None = None
    max_instances: int = 100
    masks: bool = False
    keypoints: bool = False
    channels: int = 3
    on_bad: str = "error"
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        check_settings(self.channels, self.image_size, self.max_instances, self.max_pixels)
        faults = Faults(self.on_bad)
        folder = pathlib.Path(self.images).expanduser()
        file = pathlib.Path(self.annotations).expanduser()
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist")
        data = _load(file)
        categories = _categories(file, data["categories"])
        points = _point_names(file, data["categories"]) if self.keypoints else ()
        labels = {identity: label for label, identity in enumerate(categories)}
        asked = len(points) if self.keypoints else None
        images: dict[Any, _Image | None] = {}
        for number, image in enumerate(data["images"]):
            try:
                identity = _identity(image, number, "images")
                if identity in images:
                    raise ValueError(f"there are two images with the id {identity!r}")
                images[identity] = None  # So that its annotations are no faults of their own.
                images[identity] = _read_image(image, folder, self.max_pixels)
            except ValueError as error:
                faults.add(f"{file}: image {_named(image, 'file_name', number)}: {error}")
        for number, one in enumerate(data["annotations"]):
            image = None
            try:
                image = _image_of(one, images)
                if image is not None:
                    image.objects.append(_read_object(one, image, labels, self.masks, asked))
            except ValueError as error:
                where = f"image {image.name}, " if image else ""
                faults.add(f"{file}: {where}annotation {_named(one, 'id', number)}: {error}")
        faults.say(str(file))
        found = tuple(image for image in images.values() if image is not None)
        if not found:
            raise InputError(f"{file} has no images")
        left_out = LeftOut(str(file), self.max_instances)
        for image in found:
            left_out.add(len(image.objects), silent=True)
        left_out.say()
        for name, value in {
            "class_names": tuple(categories.values()), "keypoint_names": points,
            "skipped": tuple(faults.lines), "_folder": folder, "_images": found,
        }.items():  # fmt: skip
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        image = self._images[index]
        size = image.height, image.width
        pixels = read_image(self._folder / image.name, self.channels, self.max_pixels, size)
        objects = image.objects[: self.max_instances]
        more = {}
        if self.masks:
            more["masks"] = np.zeros((len(objects), *size), bool)
            for mask, one in zip(more["masks"], objects, strict=True):
                mask[:] = draw_outline(one.outline, *size)
        if self.keypoints:
            count = len(self.keypoint_names)
            points = [one.points for one in objects]
            more["keypoints"] = np.array(points, np.float32).reshape(-1, count, 3)
            more["keypoint_swap"] = np.array(mirrored_points(self.keypoint_names), np.int32)
        return record(
            pixels,
            [one.box for one in objects],
            [one.label for one in objects],
            crowd=[one.crowd for one in objects],
            ignore=[one.ignore for one in objects],
            area=[one.area for one in objects],
            rows=self.max_instances,
            image_size=self.image_size,
            **more,
        )

    def example_id(self, index: int) -> str:
        """Returns the path of the image."""
        return str(self._folder / self._images[index].name)


def mirrored_points(names: tuple[str, ...]) -> tuple[int, ...]:
    """For each keypoint the number of that which takes its place in a mirror.

    That of "left_eye", "Left Eye" or "left-eye" is what says "right" in its place, if it is there;
    all others stay what they are.
    """
    words = [tuple(re.split(r"([^a-z]+)", name.lower())) for name in names]
    number = {parts: k for k, parts in enumerate(words)}
    other = [tuple(_MIRRORED.get(part, part) for part in parts) for parts in words]
    return tuple(number.get(parts, k) for k, parts in enumerate(other))


def _load(file: pathlib.Path) -> dict[str, list]:
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"the file {file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(name), list):
            raise InputError(f"{file} has no list {name!r}: it is not in the format of COCO")
    return data


def _categories(file: pathlib.Path, entries: list) -> dict[int, str]:
    """{id: name}, in the order of the ids."""
    names = {}
    for number, entry in enumerate(entries):
        identity, name = _whole(_get(entry, "id")), _get(entry, "name")
        if type(identity) is not int or not isinstance(name, str) or identity in names:
            raise InputError(
                f"{file}: categories[{number}] is {short(entry)}: it must have an id of its own, a "
                "whole number, and a name"
            )
        names[identity] = name
    if not names:
        raise InputError(f"{file} has no categories")
    return dict(sorted(names.items()))


def _point_names(file: pathlib.Path, entries: list) -> tuple[str, ...]:
    found = {
        tuple(map(str, entry["keypoints"]))
        for entry in entries
        if isinstance(entry.get("keypoints"), list) and entry["keypoints"]
    }
    if len(found) != 1:
        raise InputError(
            f"{file}: {len(found)} kinds of keypoints are named in its categories; with "
            "keypoints=True there must be one"
        )
    return found.pop()


def _get(entry: object, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _whole(value: Any) -> Any:
    """90.0, as some tools write it, as 90."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _named(entry: object, key: str, number: int) -> str:
    """How a message calls an entry: by its name, or where it has none by its place."""
    name = _get(entry, key)
    return short(name).strip("'") if isinstance(name, str | int) else f"number {number}"


def _identity(entry: object, number: int, where: str) -> int | str:
    identity = _whole(_get(entry, "id"))
    if type(identity) not in (int, str):  # true would be 1
        raise ValueError(
            f"{where}[{number}] has the id {short(identity)}: it must be a whole number or text"
        )
    return identity


def _read_image(entry: dict, folder: pathlib.Path, max_pixels: int) -> _Image:
    name, height, width = (_whole(entry.get(key)) for key in ("file_name", "height", "width"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"its file_name is {short(name)}: it must be a text")
    if any(type(side) is not int or side < 1 for side in (height, width)):
        raise ValueError(
            f"it is {short(width)} x {short(height)} pixels: both must be whole numbers, at least 1"
        )
    if height * width > max_pixels:
        raise ValueError(f"it has {width} x {height} pixels, more than max_pixels={max_pixels}")
    # Unlike pathlib's, this is False for a name that no file can have.
    if not os.path.isfile(os.path.join(folder, name)):
        raise ValueError(f"it is not in {folder}")
    return _Image(name, height, width, [])


def _image_of(entry: object, images: dict[Any, _Image | None]) -> _Image | None:
    """The image of an annotation; None where that one is bad itself."""
    identity = _whole(_get(entry, "image_id"))
    if type(identity) not in (int, str) or identity not in images:
        raise ValueError(f"there is no image with its image_id {short(identity)}")
    return images[identity]


def _read_object(
    entry: dict,
    image: _Image,
    labels: dict[int, int],
    masks: bool,
    points: int | None,
) -> _Object:
    """Checks an annotation; raises ValueError. `points` is None where they are not asked for."""
    category, box = _whole(entry.get("category_id")), entry.get("bbox")
    if type(category) is not int or category not in labels:
        raise ValueError(f"there is no category with its category_id {short(category)}")
    if not is_numbers(box) or len(box) != 4:
        raise ValueError(f"its bbox is {short(box)}: it must be x, y, width, height")
    corners = box[0], box[1], box[0] + box[2], box[1] + box[3]
    check_box(corners, image.height, image.width, f"its bbox {short(box)} (x, y, width, height)")
    area = entry.get("area", box[2] * box[3])
    if not is_numbers([area]) or not 0 <= area <= _MOST_AREA:
        raise ValueError(f"its area is {short(area)}: it must be a number, at least 0")
    flags = [_whole(entry.get(name, 0)) for name in ("iscrowd", "ignore")]
    for name, flag in zip(("iscrowd", "ignore"), flags, strict=True):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise ValueError(f"its {name} is {short(flag)}: it must be 0 or 1")
    outline = None
    if masks:
        if "segmentation" not in entry:
            raise ValueError("it has no segmentation, which masks=True needs")
        outline = read_outline(entry["segmentation"], image.height, image.width)
    found = None if points is None else _read_points(entry.get("keypoints"), points, image)
    crowd, ignore = map(bool, flags)
    return _Object(corners, labels[category], crowd, ignore, float(area), outline, found)


def _read_points(values: object, count: int, image: _Image) -> np.ndarray:
    if values is None or values == []:
        return np.zeros((count, 3), np.float32)
    if not is_numbers(values) or len(values) != 3 * count:
        raise ValueError(
            f"its keypoints are {short(values)}: they must be x, y and visibility of {count} points"
        )
    points = np.array(values, np.float64).reshape(count, 3)
    if not np.isin(points[:, 2], (0, 1, 2)).all():
        raise ValueError(f"its keypoints {short(values)} have a visibility that is not 0, 1 or 2")
    reach = max(image.height, image.width)
    if points[:, :2].min() < -reach or points[:, :2].max() > 2 * reach:
        raise ValueError(f"its keypoints {short(values)} are far outside of the image")
    return points.astype(np.float32)
