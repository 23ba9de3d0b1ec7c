"""What looks at more than one pixel, or adds to each: sharpness, blur, noise.

An image is uint8 [h, w, c]; results are rounded. No other field is touched.
"""

import math

import cv2
import numpy as np

from cvjax.checks import check_between, check_range
from cvjax.data.sources import Example
from cvjax.data.transforms import fields

# Pillow's SMOOTH, which torchvision uses too.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the distance of the image from a smoothed one: 0 smooths, 2 sharpens.

    The outermost pixels stay, as in torchvision.
    """
    if min(image.shape[:2]) < 3:
        return image
    smooth = image.copy()
    inner = cv2.filter2D(image, -1, _SMOOTH).reshape(image.shape)
    smooth[1:-1, 1:-1] = inner[1:-1, 1:-1]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, 0).reshape(image.shape)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Convolves with a Gaussian of standard deviation `sigma` in pixels.

    It is cut off at four sigma; beyond the edges the image goes on as its mirror image.
    """
    if sigma <= 0:
        return image
    reach = math.ceil(4 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    # cv2.GaussianBlur would round the weights to 8 bits.
    blurred = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    return blurred.reshape(image.shape)


def noise(image: np.ndarray, rng: np.random.Generator, std: float) -> np.ndarray:
    """Adds to each value one of its own from a normal distribution, `std` in levels of 0..255."""
    added = rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image + std * added), 0, 255).astype(np.uint8)


def random_sharpness(
    example: Example, rng: np.random.Generator, *, strength: float = 0.9, p: float = 0.5
) -> Example:
    """Smooths or sharpens, with probability p, by a factor in [1 - strength, 1 + strength]."""
    check_between(0, 1, strength=strength, p=p)
    image = fields.image_of(example)
    if rng.random() >= p:
        return example
    return {**example, "image": sharpness(image, rng.uniform(1 - strength, 1 + strength))}


def random_blur(
    example: Example,
    rng: np.random.Generator,
    *,
    sigma: tuple[float, float] = (0.1, 2.0),
    p: float = 0.5,
) -> Example:
    """Blurs, with probability p, by a Gaussian of `sigma` pixels, drawn uniformly in between."""
    check_range(0, 1e3, sigma=sigma)
    check_between(0, 1, p=p)
    image = fields.image_of(example)
    if rng.random() >= p:
        return example
    return {**example, "image": blur(image, rng.uniform(*sigma))}


def random_noise(
    example: Example,
    rng: np.random.Generator,
    *,
    std: tuple[float, float] = (0.0, 10.0),
    p: float = 0.5,
) -> Example:
    """Adds normal noise, with probability p, of `std` levels of 0..255, drawn in between."""
    check_range(0, 1e3, std=std)
    check_between(0, 1, p=p)
    image = fields.image_of(example)
    if rng.random() >= p:
        return example
    return {**example, "image": noise(image, rng, rng.uniform(*std))}
