"""Changes of colour: functions of an image, and the transforms that draw their strength.

An image is uint8 [h, w, c]; with 3 channels they are red, green and blue, and with any other number
of them hue and saturation are left alone. A factor of 1 changes nothing. The definitions are those
of torchvision, which cuts fractions off where this rounds: no value is further than 1 from it, nor
that of a contrast or a saturation, where it cuts twice, further than 1.5 + |factor - 1|.
"""

import cv2
import numpy as np

from cvjax.checks import check_between, check_count
from cvjax.data.sources import Example
from cvjax.data.transforms import fields

Image = np.ndarray


def _look_up(image: Image, table: np.ndarray) -> Image:
    """Replaces each value v by table[v], or in channel i by table[v, i]; rounds and clips."""
    table = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    if table.ndim == 2:
        return np.stack([_look_up(image[..., i], t) for i, t in enumerate(table.T)], axis=-1)
    return cv2.LUT(image, table).reshape(image.shape)


def _levels() -> np.ndarray:
    return np.arange(256, dtype=np.float64)


def _grey(image: Image) -> Image:
    """Returns the brightness, uint8 [h, w]: 0.299 red + 0.587 green + 0.114 blue."""
    if image.shape[-1] != 3:
        return np.rint(image.mean(axis=-1)).astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _weighted(image: Image, a: float, other: Image, b: float, offset: float = 0.0) -> Image:
    """Returns a * image + b * other + offset, rounded and clipped."""
    return cv2.addWeighted(image, a, other, b, offset).reshape(image.shape)


def brightness(image: Image, factor: float) -> Image:
    """Multiplies all values."""
    return cv2.convertScaleAbs(image, alpha=factor).reshape(image.shape)


def contrast(image: Image, factor: float) -> Image:
    """Multiplies the distance of all values from the image's mean brightness."""
    mean = cv2.mean(_grey(image))[0]
    return _weighted(image, factor, image, 0, mean * (1 - factor))


def saturation(image: Image, factor: float) -> Image:
    """Multiplies the distance of each pixel from its own grey."""
    if image.shape[-1] != 3:
        return image
    grey = cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB)
    return _weighted(image, factor, grey, 1 - factor)


def hue(image: Image, turn: float) -> Image:
    """Turns the circle of colours; 0.5 is half of it, to the complementary colour."""
    if image.shape[-1] != 3 or turn == 0:
        return image
    # In float32: the 8-bit hue of OpenCV or Pillow costs up to five levels.
    pixels = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    pixels[..., 0] += 360 * (turn % 1)  # Degrees: the way back takes any from 0 to 720.
    return cv2.convertScaleAbs(cv2.cvtColor(pixels, cv2.COLOR_HSV2RGB))  # It rounds to uint8.


def grayscale(image: Image) -> Image:
    """Gives all channels the brightness of the pixel."""
    return np.repeat(_grey(image)[..., None], image.shape[-1], axis=-1)


def invert(image: Image) -> Image:
    """Returns the negative."""
    return _look_up(image, 255 - _levels())


def solarize(image: Image, threshold: float) -> Image:
    """Inverts the values that are not below the threshold, 0 to 255."""
    return _look_up(image, np.where(_levels() >= threshold, 255 - _levels(), _levels()))


def posterize(image: Image, bits: int) -> Image:
    """Keeps the highest `bits` bits of each value."""
    return _look_up(image, np.arange(256) & (256 - 2 ** (8 - bits)))


def autocontrast(image: Image) -> Image:
    """Stretches the values of each channel to 0..255; a channel of one value stays."""
    low, high = image.min(axis=(0, 1)).astype(float), image.max(axis=(0, 1)).astype(float)
    spread = high - low
    stretched = (_levels()[:, None] - low) * 255 / np.where(spread, spread, 1)
    return _look_up(image, np.where(spread, stretched, _levels()[:, None]))


def equalize(image: Image) -> Image:
    """Makes the values of each channel equally frequent, as far as a map of values can.

    Pillow's rule: with the highest value left out, n pixels are shared in steps of n // 255, and
    value v goes to (number of pixels below v, plus half a step) // step.
    """
    tables = []
    for channel in np.moveaxis(image, -1, 0):
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        below = np.cumsum(counts) - counts
        tables.append((below + step // 2) // step if step else np.arange(256))
    return _look_up(image, np.stack(tables, axis=-1))


def random_jitter(
    example: Example,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    p: float = 1.0,
) -> Example:
    """Changes brightness, contrast, saturation and hue, in random order.

    Args:
        example: `image` is changed.
        rng: draws the order and the factors, each uniformly.
        brightness: the factor is in [1 - brightness, 1 + brightness], but not below 0.
        contrast: likewise.
        saturation: likewise.
        hue: the turn is in [-hue, hue]; at most 0.5.
        p: probability that anything is done.
    """
    check_between(0, 1e3, brightness=brightness, contrast=contrast, saturation=saturation)
    check_between(0, 0.5, hue=hue)
    check_between(0, 1, p=p)
    image = fields.image_of(example)
    if rng.random() >= p:
        return example
    strengths = (brightness, contrast, saturation, hue)
    for number in rng.permutation(4):
        strength = strengths[number]
        if strength:
            middle = 0.0 if number == 3 else 1.0
            least = -strength if number == 3 else max(0.0, 1.0 - strength)
            image = _JITTER[number](image, rng.uniform(least, middle + strength))
    return {**example, "image": image}


_JITTER = (brightness, contrast, saturation, hue)


def random_grayscale(example: Example, rng: np.random.Generator, *, p: float = 0.1) -> Example:
    """Takes the colour away with probability p; the channels stay."""
    return _sometimes(example, rng, p, grayscale)


def random_invert(example: Example, rng: np.random.Generator, *, p: float = 0.5) -> Example:
    """Shows the negative with probability p."""
    return _sometimes(example, rng, p, invert)


def random_solarize(
    example: Example, rng: np.random.Generator, *, threshold: float = 128, p: float = 0.5
) -> Example:
    """Inverts what is not below `threshold`, 0 to 256, with probability p."""
    check_between(0, 256, threshold=threshold)
    return _sometimes(example, rng, p, solarize, threshold)


def random_posterize(
    example: Example, rng: np.random.Generator, *, bits: int = 4, p: float = 0.5
) -> Example:
    """Keeps the highest `bits` bits, 0 to 8, with probability p."""
    check_count(0, bits=bits)
    check_between(0, 8, bits=bits)
    return _sometimes(example, rng, p, posterize, bits)


def random_autocontrast(example: Example, rng: np.random.Generator, *, p: float = 0.5) -> Example:
    """Stretches the values of each channel to 0..255 with probability p."""
    return _sometimes(example, rng, p, autocontrast)


def random_equalize(example: Example, rng: np.random.Generator, *, p: float = 0.5) -> Example:
    """Equalizes the histogram of each channel with probability p."""
    return _sometimes(example, rng, p, equalize)


def _sometimes(example, rng, p, function, *settings) -> Example:
    check_between(0, 1, p=p)
    image = fields.image_of(example)
    return {**example, "image": function(image, *settings)} if rng.random() < p else example
