"""Augmentation: `transform(example, rng) -> example`, one example at a time, on the processor.

A transform returns a new dict and writes into nothing it was given. One that draws nothing takes
`rng` all the same. Settings are bound with `functools.partial`, or by a config
(`dict(type="data.transforms.geometry.random_affine", degrees=15.0)`); a setting that makes no sense
is an `InputError` at the first example.

The fields that transforms know of, all other fields they pass on:

    image       uint8 [h, w, c], of any number of channels
    boxes       float32 [n, 4], x1 y1 x2 y2 in pixels
    box_...     [n, ...], any field whose name begins so: what is known of each box (`box_label`)
    masks       bool [n, h, w], one for each object
    keypoints   float32 [n, k, 3], x and y in pixels and visibility, k for each object
    crowd, ignore  bool [n]: the object is many in one; it shall not count
    area        float32 [n], of each object in pixels of this image
    mask        integer [h, w], the class of each pixel; 255 is ignored
    label       of the whole image: none here changes it
    scale       float32: how long a pixel of the image that was annotated is in this one
    keypoint_swap  integers [k]: the point that each becomes in a mirror, left and right

Coordinates are continuous: x goes right from 0, the left edge of the image, to w, its right edge;
y goes down; the centre of the first pixel is (0.5, 0.5). A 3x3 matrix maps the coordinates of the
old image to those of the new one, and one such matrix moves all fields (`fields.py`). Where the
new image shows what the old one did not have, `image` has the fill that was asked for, `mask` 255
and `masks` False. Boxes are clipped to the new image. An object that is outside of it is gone, and
its row with it in all fields that have one for each object; so is one that was cut, if of its mask
no pixel is left, though the box reach in. A point that is outside has visibility 0. `area` becomes
that of the part of its box that is left. An example with `box_valid`, bool [n], is padded: it keeps
its number of rows, and the objects that are left come before rows of zeros.

| file | what is in it |
|---|---|
| `fields.py` | flip, turn, crop, resize and warp of all fields together |
| `geometry.py` | the transforms that draw how to do so |
| `colour.py`, `filters.py`, `erasing.py` | what changes the image alone |
| `composing.py` | mosaic and copy-paste: one example of several |
| `policies.py` | RandAugment, TrivialAugment, AugMix |
| `multi_crop.py` | several views of one image |
| `defaults.py` | the usual row of transforms for each task |
| `batched.py`, `mixing.py` | whole batches on the device, inside jit; mixup and cutmix |
"""

from collections.abc import Callable

import numpy as np

from cvjax.data.sources import Example

Transform = Callable[[Example, np.random.Generator], Example]


def in_order(example: Example, rng: np.random.Generator, **transforms: Transform) -> Example:
    """Applies several transforms, one after the other, as one transform."""
    for transform in transforms.values():
        example = transform(example, rng)
    return example
