"""One example of several: mosaic, and copy-paste. Images, boxes, masks and points go together.

These take several examples and so are no transforms: `cvjax.data.sources.composed` draws the others
from the source. Objects are rows of padded or unpadded examples; the results are not padded.
"""

from collections.abc import Sequence

import numpy as np

from cvjax.checks import Size, check_between, check_range, height_and_width
from cvjax.data.sources import Example
from cvjax.data.transforms import fields, geometry
from cvjax.data.transforms.fields import Fill
from cvjax.data.transforms.objects import names_of_objects, real_objects
from cvjax.errors import InputError


def mosaic(
    examples: Sequence[Example],
    rng: np.random.Generator,
    *,
    size: Size,
    scale: tuple[float, float] = (0.7, 1.5),
    fill: Fill = 0,
) -> Example:
    """Four examples in the four parts of one image.

    A. Bochkovskiy et al.: YOLOv4 (https://arxiv.org/abs/2004.10934, section 3.3).

    Args:
        examples: four of them, for upper left, upper right, lower left and lower right.
        rng: draws the point where the parts meet, in the middle half of each side, and then for
            each part what `geometry.random_scale_crop` needs.
        size: of the image.
        scale: of each example; at 1 it just fits inside its part.
        fill: of what no example covers.

    Raises:
        InputError: there are not four, or a setting makes no sense.
    """
    if len(examples) != 4:
        raise InputError(f"a mosaic needs 4 examples, not {len(examples)}")
    check_range(1e-3, 1e3, scale=scale)
    height, width = height_and_width(size)
    if min(height, width) < 2:
        raise InputError(f"a mosaic of {height} x {width} pixels has no four parts")
    channels = [fields.image_of(example).shape[-1] for example in examples]
    if len(set(channels)) > 1:
        raise InputError(f"a mosaic needs images of as many channels, not {channels}")
    row, column = (round(side * rng.uniform(0.25, 0.75)) for side in (height, width))
    row, column = min(max(row, 1), height - 1), min(max(column, 1), width - 1)
    parts = []
    for number, example in enumerate(examples):
        top, bottom = (row, height) if number >= 2 else (0, row)
        left, right = (column, width) if number % 2 else (0, column)
        part = geometry.random_scale_crop(
            example, rng, size=(bottom - top, right - left), scale=scale, fill=fill
        )
        parts.append(fields.crop(part, -top, -left, height, width, fill))
        window = slice(top, bottom), slice(left, right)
        for name in ("image", "mask"):
            if number and name in part:
                parts[0][name][window] = parts[-1][name][window]
    return _joined(parts)


def copy_paste(
    example: Example, other: Example, rng: np.random.Generator, *, share: float = 0.5
) -> Example:
    """Copies objects of another example into this one, as they lie there.

    G. Ghiasi et al.: Simple Copy-Paste (https://arxiv.org/abs/2012.07177, section 3). What a copy
    covers is taken from the masks below it; a box of which something was covered shrinks to the
    rest of its mask, its area with it, and an object without rest is gone. A keypoint that is
    covered has visibility 1. No crowd is copied, and nothing that is ignored.

    Args:
        example: fields as in `cvjax.data.transforms`, with `boxes` and `masks`.
        other: likewise, with an image of the same size.
        rng: draws the objects to be copied.
        share: the probability of each object to be copied.

    Raises:
        InputError: there are no masks, only the first example has a `mask` of classes, the images
            differ in size, or `share` makes no sense.
    """
    check_between(0, 1, share=share)
    for one in (example, other):
        if "masks" not in one or "boxes" not in one:
            raise InputError("copy_paste needs boxes and masks (a source with masks=True)")
    if fields.image_of(example).shape != fields.image_of(other).shape:
        raise InputError(
            f"copy_paste needs images of one size, not {list(example['image'].shape)} and "
            f"{list(other['image'].shape)}"
        )
    if "mask" in example and "mask" not in other:
        raise InputError("copy_paste: the other example needs a mask of classes, as the first has")
    example, other = real_objects(example), real_objects(other)
    count = len(other["boxes"])
    chosen = rng.random(count) < share
    for name in ("crowd", "ignore"):
        chosen &= ~np.asarray(other.get(name, np.zeros(count, bool)), bool)
    copied = fields.kept({k: v for k, v in other.items() if k != "box_valid"}, chosen)
    if "box_valid" in other:
        copied["box_valid"] = np.ones(chosen.sum(), bool)
    cover = copied["masks"].any(axis=0)

    below = dict(example)
    below["masks"] = example["masks"] & ~cover
    before, after = (one["masks"].sum(axis=(1, 2)) for one in (example, below))
    boxes = example["boxes"].copy()
    for k in np.flatnonzero((after < before) & (after > 0)):
        y, x = np.nonzero(below["masks"][k])
        rest = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        least, most = np.maximum(boxes[k, :2], rest[:2]), np.minimum(boxes[k, 2:], rest[2:])
        # Masks may reach a little beyond their boxes, and the rest may lie only there.
        boxes[k] = [*least, *most] if (least < most).all() else rest
    below["boxes"] = boxes
    if "area" in below:
        left = np.divide(after, before, out=np.ones(len(after)), where=before > 0)
        below["area"] = np.float32(below["area"] * left)
    if "keypoints" in below:
        points = below["keypoints"].copy()
        height, width = cover.shape
        x, y = (np.floor(points[..., i]).astype(int) for i in (0, 1))
        is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        is_covered = is_inside & cover[y.clip(0, height - 1), x.clip(0, width - 1)]
        points[..., 2] = np.where(is_covered, np.minimum(points[..., 2], 1), points[..., 2])
        below["keypoints"] = points
    for name in ("image", "mask"):
        if name in below:
            where = cover[..., None] if name == "image" else cover
            below[name] = np.where(where, other[name], below[name])
    is_gone = (after == 0) & (before > 0)
    if is_gone.any():
        rows = {name: np.asarray(below[name])[~is_gone] for name in names_of_objects(below)}
        below |= rows
    return _joined([below, copied])


def _joined(examples: Sequence[Example]) -> Example:
    """The first example with the objects of all, in their order and without padding."""
    examples = [real_objects(example) for example in examples]
    names = names_of_objects(examples[0])
    for example in examples[1:]:
        if set(names_of_objects(example)) != set(names):
            raise InputError(
                f"the objects of one example have {', '.join(names)}, those of another "
                f"{', '.join(names_of_objects(example))}"
            )
    rows = {name: np.concatenate([np.asarray(one[name]) for one in examples]) for name in names}
    return {**examples[0], **rows}
