"""How all fields of an example move together under one 3x3 matrix.

The fields and the coordinates are described in `cvjax.data.transforms`. Each function pairs a way
to resample pixels with the matrix that says where points go. Flips, quarter turns and crops copy
pixels and are exact; the matrix is applied to boxes and points in double precision.

OpenCV warps (from version 5 on it interpolates without rounding coordinates), and resizes without
antialiasing. With antialiasing Pillow resizes: its filters are the ones that torchvision copies.
"""

from collections.abc import Callable, Sequence

import cv2
import jax
import numpy as np
from PIL import Image

from cvjax.checks import Size, check_choice, check_fill, height_and_width
from cvjax.data.sources import Example
from cvjax.data.transforms.objects import (
    check_objects,
    kept,
    names_of_objects,
    padded,
    real_objects,
)
from cvjax.errors import InputError

IGNORED = 255  # the class of a pixel of `mask` that was not in the image
Fill = int | Sequence[int]  # a value, or one for each channel

# The loader's threads and processes are the parallelism: more threads in each would get in the way.
cv2.setNumThreads(0)

_OPENCV = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_TO_CORNER = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # of its pixel, from the centre
_FROM_CORNER = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def image_of(example: Example) -> np.ndarray:
    """Returns the image; raises InputError unless it is uint8 [h, w, c] and not empty."""
    image = example.get("image")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        found = "missing" if image is None else f"{np.asarray(image).dtype} {np.shape(image)}"
        raise InputError(f"transforms need an image of uint8 [height, width, channels]: {found}")
    if not image.size:
        raise InputError(f"the image has no pixels: its shape is {image.shape}")
    return image


def visible(example: Example) -> Example:
    """Clips boxes to the image, drops objects outside it, and marks points outside as unseen.

    A box is outside when it and the image have no point in common but on their edges. Where there
    are no boxes, an object without any pixel in `masks` is dropped; without those, none is.
    """
    height, width = image_of(example).shape[:2]
    example = dict(example)
    if not names_of_objects(example):
        return example
    check_objects(example)
    if "keypoints" in example:
        x, y, visibility = np.moveaxis(example["keypoints"], -1, 0)
        inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
        points = np.stack([x, y, np.where(inside, visibility, 0)], axis=-1)
        example["keypoints"] = points.astype(np.float32)
    if "boxes" in example:
        x1, y1, x2, y2 = example["boxes"].T
        is_seen = (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)
        boxes = np.clip(example["boxes"], 0, [width, height, width, height])
        example["boxes"] = boxes.astype(np.float32)
        return kept(example, is_seen)
    if "masks" in example:
        return kept(example, example["masks"].any(axis=(1, 2)))
    return example


def moved_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns points [..., 2], x and y, where the 3x3 matrix takes them; float64."""
    homogeneous = np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return homogeneous[..., :2] / homogeneous[..., 2:]


def moved_boxes(matrix: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns the boxes, float32 [n, 4], around the moved corners of boxes [n, 4]."""
    corners = moved_points(matrix, boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)


def _enlarged(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How many times larger a small area is when it was moved, at points [n, 2]; float64 [n]."""
    depth = np.asarray(points, np.float64) @ matrix[2, :2] + matrix[2, 2]
    return abs(np.linalg.det(matrix) / depth**3)


def _share_inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The part of the area of each box that is inside the image; 1 for one without area."""
    inside = np.clip(boxes, 0, [width, height, width, height])
    whole, part = (np.prod(box[:, 2:] - box[:, :2], axis=1) for box in (boxes, inside))
    return np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)


def _moved(
    example: Example,
    matrix: np.ndarray,
    image: Callable[[np.ndarray], np.ndarray],
    area: Callable[[np.ndarray, int], np.ndarray],
) -> Example:
    """Moves each field: `image` and `area` resample pixels as the matrix says.

    `area(array, fill)` takes an array [..., h, w] of classes or of truth.
    """
    picture = image_of(example)
    rows = len(example["box_valid"]) if "box_valid" in example else None
    # What is outside already could come in by a perspective, or as a turned box's corner.
    result = visible(real_objects(example))
    result["image"] = image(picture)
    if "mask" in result:
        mask = np.asarray(result["mask"])
        if mask.shape != picture.shape[:2] or mask.dtype.kind not in "iu" or mask.dtype == np.int8:
            raise InputError(
                f"mask must be integers (uint8, say) {list(picture.shape[:2])}, as the image, "
                f"not {mask.dtype} {list(mask.shape)}"
            )
        result["mask"] = area(mask, IGNORED)
    if "masks" in result:
        masks = result["masks"]
        if masks.dtype != bool or masks.shape[1:] != picture.shape[:2]:
            raise InputError(
                f"masks must be bool [n, {picture.shape[0]}, {picture.shape[1]}], as the image, "
                f"not {masks.dtype} {list(masks.shape)}"
            )
        result["masks"] = area(masks, 0)
        is_lost = masks.any(axis=(1, 2)) & ~result["masks"].any(axis=(1, 2))
    if "scale" in result:
        middle = np.array([[picture.shape[1], picture.shape[0]]]) / 2
        result["scale"] = np.float32(result["scale"] * np.sqrt(_enlarged(matrix, middle)[0]))
    if "boxes" in result:
        boxes = result["boxes"]
        result["boxes"] = moved_boxes(matrix, boxes)
        if "area" in result:
            middles = (boxes[:, :2] + boxes[:, 2:]) / 2
            height, width = result["image"].shape[:2]
            share = _share_inside(result["boxes"], height, width)
            result["area"] = np.float32(result["area"] * _enlarged(matrix, middles) * share)
    if "keypoints" in result:
        points = moved_points(matrix, result["keypoints"][..., :2]).astype(np.float32)
        result["keypoints"] = np.concatenate([points, result["keypoints"][..., 2:]], axis=-1)
    if "masks" in result and "boxes" in result:
        # Of an object that is cut the box may be in view, but no pixel: nobody could find it. One
        # that is whole has become too small for a pixel of its own: it stays.
        height, width = result["image"].shape[:2]
        x1, y1, x2, y2 = result["boxes"].T
        is_whole = (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)
        result = kept(result, is_whole | ~is_lost)
    result = visible(result)
    return result if rows is None else padded(result, rows)


def flip(example: Example, *, vertical: bool = False, swap: Sequence[int] | None = None) -> Example:
    """Mirrors left and right, or with `vertical` top and bottom.

    `swap` names, for each of the k keypoints, the one whose place it takes in the mirror: a left
    eye becomes a right eye. None is that of the example's own field `keypoint_swap`, if it has one.
    """
    height, width = image_of(example).shape[:2]
    if vertical:
        matrix = np.array([[1.0, 0, 0], [0, -1, height], [0, 0, 1]])
    else:
        matrix = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])
    axis = -2 if vertical else -1
    result = _moved(
        example,
        matrix,
        # Several times as fast as a copy of image[:, ::-1].
        lambda image: cv2.flip(image, 0 if vertical else 1).reshape(image.shape),
        lambda array, fill: np.flip(array, axis),
    )
    swap = example.get("keypoint_swap") if swap is None else swap
    if swap is not None and "keypoints" in result:
        points = result["keypoints"].shape[1]
        if sorted(swap) != list(range(points)):
            raise InputError(f"swap={tuple(swap)} must name each of the {points} keypoints once")
        result["keypoints"] = result["keypoints"][:, list(swap)]
    return result


def quarter_turn(example: Example, turns: int) -> Example:
    """Turns by `turns` quarters, counter-clockwise as one sees it."""
    height, width = image_of(example).shape[:2]
    matrix = np.eye(3)
    for _ in range(turns % 4):
        matrix = np.array([[0.0, 1, 0], [-1, 0, width], [0, 0, 1]]) @ matrix
        height, width = width, height
    return _moved(
        example,
        matrix,
        lambda image: np.ascontiguousarray(np.rot90(image, turns)),
        lambda array, fill: np.rot90(array, turns, axes=(-2, -1)),
    )


def crop(
    example: Example, top: int, left: int, height: int, width: int, fill: Fill | str = 0
) -> Example:
    """Cuts out a window that may reach beyond the image, or lie beside it.

    With `fill="reflect"` the picture and its `mask` are continued by their mirror images; objects
    are not.
    """
    if height < 1 or width < 1:
        raise InputError(f"a crop of {height} x {width} pixels has no pixels")
    old_height, old_width, channels = image_of(example).shape
    if fill != "reflect":
        check_fill(channels, fill)
    matrix = np.array([[1.0, 0, -left], [0, 1, -top], [0, 0, 1]])
    rows = slice(max(top, 0), max(min(top + height, old_height), 0))
    columns = slice(max(left, 0), max(min(left + width, old_width), 0))
    is_inside = (rows.stop - rows.start, columns.stop - columns.start) == (height, width)

    def window(array: np.ndarray, fill: Fill, channels: tuple[int, ...]) -> np.ndarray:
        """Of an array [..., h, w, *channels]."""
        axes = len(channels) * (slice(None),)
        if is_inside:
            return array[(..., rows, columns, *axes)]
        shape = (*array.shape[: array.ndim - 2 - len(channels)], height, width, *channels)
        result = np.empty(shape, array.dtype)
        result[...] = fill
        if rows.start < rows.stop and columns.start < columns.stop:
            down, right = rows.start - top, columns.start - left
            target = (
                slice(down, down + rows.stop - rows.start),
                slice(right, right + columns.stop - columns.start),
            )
            result[(..., *target, *axes)] = array[(..., rows, columns, *axes)]
        return result

    def mirrored(array: np.ndarray) -> np.ndarray:
        """Of an array [h, w, ...]."""
        down = mirror_index(np.arange(top, top + height), old_height)
        return array[down][:, mirror_index(np.arange(left, left + width), old_width)]

    def image(array: np.ndarray) -> np.ndarray:
        return mirrored(array) if fill == "reflect" else window(array, fill, array.shape[2:])

    def area(array: np.ndarray, outside: int) -> np.ndarray:
        is_classes = array.ndim == 2
        if fill == "reflect" and is_classes:
            return mirrored(array)
        return window(array, outside, ())

    return _moved(example, matrix, image, area)


def resize(
    example: Example, size: Size, *, interpolation: str = "bilinear", antialias: bool = True
) -> Example:
    """Stretches to a size; classes and masks by the nearest pixel.

    Args:
        example: as all here.
        size: (height, width), or the side of a square.
        interpolation: "nearest", "bilinear" or "bicubic".
        antialias: average over all pixels that one pixel of a smaller result covers; the cubic is
            then Pillow's, with a = -0.5, else a = -0.75, as in torchvision.
    """
    check_choice(_OPENCV, interpolation=interpolation)
    height, width = height_and_width(size)
    old_height, old_width = image_of(example).shape[:2]
    matrix = np.diag([width / old_width, height / old_height, 1.0])

    def nearest() -> tuple[np.ndarray, np.ndarray]:
        rows = (np.arange(height) + 0.5) * old_height / height
        columns = (np.arange(width) + 0.5) * old_width / width
        return np.int64(rows), np.int64(columns)

    def area(array: np.ndarray, fill: int = 0) -> np.ndarray:
        rows, columns = nearest()
        return array[..., rows, :][..., columns]

    def image(array: np.ndarray) -> np.ndarray:
        if (height, width) == (old_height, old_width):
            return array
        if interpolation == "nearest":
            rows, columns = nearest()
            return array[rows][:, columns]
        if antialias:
            return _resize_with_pillow(array, (width, height), _PILLOW[interpolation])
        method = _OPENCV[interpolation]
        return _by_four_channels(
            array, lambda part, first: cv2.resize(part, (width, height), interpolation=method)
        )

    return _moved(example, matrix, image, area)


def warp(
    example: Example,
    matrix: np.ndarray,
    *,
    size: Size | None = None,
    fill: Fill = 0,
    interpolation: str = "bilinear",
) -> Example:
    """Moves all by a matrix; not antialiased where it shrinks.

    Args:
        example: as all here.
        matrix: [3, 3], from coordinates of the old image to those of the new one.
        size: of the new image; None is that of the old one.
        fill: of the image, where there was none.
        interpolation: "nearest", "bilinear" or "bicubic"; next to the edge it blends with `fill`.

    Raises:
        InputError: the matrix is no [3, 3], has no inverse, or folds the image.
    """
    check_sampling(example, fill, interpolation)
    old_height, old_width, channels = image_of(example).shape
    height, width = (old_height, old_width) if size is None else height_and_width(size)
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (3, 3):
        raise InputError(f"the matrix is {list(matrix.shape)}; it must be [3, 3]")
    corners = np.array(
        [[0, 0, 1], [old_width, 0, 1], [0, old_height, 1], [old_width, old_height, 1]]
    )
    depth = corners @ matrix[2]
    is_regular = np.isfinite(matrix).all() and (depth.min() > 0 or depth.max() < 0)
    # Homographies have no scale: of this one the depth in the middle is 1.
    if not is_regular or abs(np.linalg.det(matrix / depth.mean())) <= 1e-12:
        raise InputError(f"the matrix {matrix.tolist()} does not map the image one to one")
    # OpenCV counts from the centre of the first pixel, and wants the way from new to old.
    inverse = _FROM_CORNER @ np.linalg.inv(matrix) @ _TO_CORNER
    inverse /= inverse[2, 2]
    is_affine = max(abs(inverse[2, 0]), abs(inverse[2, 1])) <= 1e-12

    def sample(array: np.ndarray, method: str, fill: Sequence[float]) -> np.ndarray:
        options = dict(
            dsize=(width, height),
            flags=_OPENCV[method] | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=fill,
        )
        if is_affine:
            return cv2.warpAffine(array, inverse[:2], **options)
        return cv2.warpPerspective(array, inverse, **options)

    def image(array: np.ndarray) -> np.ndarray:
        fills = np.broadcast_to(fill, channels).tolist()
        return _by_four_channels(
            array, lambda part, first: sample(part, interpolation, fills[first : first + 4])
        )

    def area(array: np.ndarray, fill: int) -> np.ndarray:
        plain = array.view(np.uint8) if array.dtype == bool else array
        # OpenCV has no integers of 64 bits, nor unsigned ones of 32.
        plain = plain if plain.dtype.itemsize <= 2 else plain.astype(np.int32)
        planes = [
            sample(plane, "nearest", [fill]) for plane in plain.reshape(-1, *array.shape[-2:])
        ]
        result = np.array(planes, plain.dtype).reshape(*array.shape[:-2], height, width)
        return result.view(bool) if array.dtype == bool else result.astype(array.dtype, copy=False)

    return _moved(example, matrix, image, area)


def check_sampling(example: Example, fill: Fill, interpolation: str) -> None:
    """Raises InputError for settings that `warp` cannot use: for those who warp now and then."""
    check_choice(_OPENCV, interpolation=interpolation)
    check_fill(image_of(example).shape[-1], fill)


def mirror_index(index: np.ndarray | jax.Array, length: int) -> np.ndarray | jax.Array:
    """The pixel seen at any place when a row of `length` is continued by its mirror image."""
    last = length - 1
    return last - abs(index % max(2 * last, 1) - last)


def _by_four_channels(
    image: np.ndarray, function: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Applies `function(channels, number of the first)` of OpenCV, which takes four at most.

    Nor two, which OpenCV 5 interpolates by another way, with rounded coordinates.
    """
    parts = []
    first = 0
    while first < image.shape[-1]:
        left = image.shape[-1] - first
        count = 1 if left == 2 else min(left, 4)
        part = function(image[..., first : first + count], first)
        parts.append(part[..., None] if part.ndim == 2 else part)
        first += count
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _resize_with_pillow(
    image: np.ndarray, size: tuple[int, int], method: Image.Resampling
) -> np.ndarray:
    if image.shape[-1] == 3:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, method))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(plane.resize(size, method)) for plane in planes], axis=-1)
