"""Covers a part of the image: cutout and random erasing. No other field is touched."""

import math

import numpy as np

from cvjax.checks import check_between, check_count, check_fill, check_range
from cvjax.data.sources import Example
from cvjax.data.transforms import fields
from cvjax.data.transforms.fields import Fill


def cutout(
    example: Example, rng: np.random.Generator, *, size: int = 16, fill: Fill = 0
) -> Example:
    """Covers a square, whose middle is any pixel with equal chance; its parts outside are lost.

    T. DeVries, G. Taylor: Improved Regularization of CNNs with Cutout
    (https://arxiv.org/abs/1708.04552, section 3.2).
    """
    check_count(1, size=size)
    height, width, channels = fields.image_of(example).shape
    check_fill(channels, fill)
    top = int(rng.integers(height)) - size // 2
    left = int(rng.integers(width)) - size // 2
    bottom, right = max(top + size, 0), max(left + size, 0)
    return _covered(example, max(top, 0), max(left, 0), bottom, right, fill)


def random_erasing(
    example: Example,
    rng: np.random.Generator,
    *,
    p: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    fill: Fill | str = 0,
) -> Example:
    """Covers a rectangle inside the image with probability p.

    Z. Zhong et al.: Random Erasing Data Augmentation (https://arxiv.org/abs/1708.04896, algorithm
    1), as in torchvision: ten attempts to find one that fits, else nothing is covered.

    Args:
        example: `image` is changed.
        rng: draws the area uniformly, the logarithm of the ratio uniformly, and the place.
        p: probability that anything is done.
        scale: least and largest share of the image's area.
        ratio: least and largest height / width.
        fill: a value, one for each channel, or "noise": each value is drawn from 0..255.
    """
    check_between(0, 1, p=p)
    check_range(0, 1, scale=scale)
    check_range(1e-3, 1e3, ratio=ratio)
    height, width, channels = fields.image_of(example).shape
    if fill != "noise":
        check_fill(channels, fill)
    if rng.random() >= p:
        return example
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < high < height and 0 < wide < width:
            top = int(rng.integers(height - high + 1))
            left = int(rng.integers(width - wide + 1))
            if fill == "noise":
                fill = rng.integers(256, size=(high, wide, channels), dtype=np.uint8)
            return _covered(example, top, left, top + high, left + wide, fill)
    return example


def _covered(
    example: Example, top: int, left: int, bottom: int, right: int, fill: Fill | np.ndarray
) -> Example:
    image = example["image"].copy()
    image[top:bottom, left:right] = fill
    return {**example, "image": image}
