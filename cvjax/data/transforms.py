"""Augmentation of one example at a time, in numpy, on the processor.

A transform is `transform(example, rng) -> example`: it returns a new dict and writes into nothing
it was given. Those here change the field `image`, uint8 [height, width, channels], to another of
the same type, and leave all other fields alone. One that draws nothing takes `rng` all the same.
Settings are bound with `functools.partial`, or by a config.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from cvjax.data.sources import Example


def random_flip(example: Example, rng: np.random.Generator) -> Example:
    """Mirrors the image from left to right, in one of two cases."""
    image = example["image"]
    return {**example, "image": image[:, ::-1] if rng.random() < 0.5 else image}


def random_translate(
    example: Example, rng: np.random.Generator, *, pixels: int = 2, fill: int = 0
) -> Example:
    """Moves the image by up to `pixels` whole pixels each way; what is uncovered becomes `fill`."""
    pad = [(pixels, pixels), (pixels, pixels), (0, 0)]
    padded = np.pad(example["image"], pad, constant_values=fill)
    return {**example, "image": _random_window(padded, example["image"].shape, rng)}


def random_crop(example: Example, rng: np.random.Generator, *, padding: int = 4) -> Example:
    """Pads the image with its own mirror image and cuts out a part of the original size."""
    pad = [(padding, padding), (padding, padding), (0, 0)]
    padded = np.pad(example["image"], pad, mode="reflect")
    return {**example, "image": _random_window(padded, example["image"].shape, rng)}


def random_affine(
    example: Example,
    rng: np.random.Generator,
    *,
    degrees: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    pixels: float = 0.0,
) -> Example:
    """Turns and scales the image about its centre and then moves it; bilinear, black outside.

    Args:
        example: its `image` is uint8 [height, width, channels].
        rng: draws each number uniformly.
        degrees: the largest angle, in degrees, to either side.
        scale: the smallest and the largest factor; above 1 enlarges.
        pixels: the largest move, of each axis, to either side.
    """
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    factor = rng.uniform(*scale)
    move = rng.uniform(-pixels, pixels, size=2)
    height, width = example["image"].shape[:2]
    # Pillow wants, for each pixel of the result, where in the original it comes from.
    inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / factor
    centre = np.array([width, height]) / 2
    offset = centre - inverse @ (centre + move)
    matrix = np.column_stack([inverse, offset]).ravel().tolist()

    def warp(picture: Image.Image) -> Image.Image:
        transform, filtering = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return picture.transform(picture.size, transform, matrix, filtering)

    return {**example, "image": _with_pillow(example["image"], warp)}


def resize(example: Example, rng: np.random.Generator, *, size: int) -> Example:
    """Scales the shorter side to `size` pixels (antialiased) and cuts out the middle square."""

    def fit(picture: Image.Image) -> Image.Image:
        return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)

    return {**example, "image": _with_pillow(example["image"], fit)}


def _random_window(
    image: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Returns a part of `image` of the given [height, width, ...], anywhere with equal chance."""
    top = rng.integers(image.shape[0] - shape[0] + 1)
    left = rng.integers(image.shape[1] - shape[1] + 1)
    return image[top : top + shape[0], left : left + shape[1]]


def _with_pillow(image: np.ndarray, function: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Applies a function of Pillow images to an image of any number of channels."""
    if image.shape[-1] == 3:
        return np.asarray(function(Image.fromarray(np.ascontiguousarray(image))))
    planes = [function(Image.fromarray(image[..., i])) for i in range(image.shape[-1])]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)
