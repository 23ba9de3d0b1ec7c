"""Policies that draw from a set of operations: RandAugment, TrivialAugment, AugMix.

The operations and their strengths are those of torchvision. Those that move the image move boxes,
masks and points with it; those that change colours leave them.
"""

import math

import numpy as np

from cvjax.checks import check_between, check_count
from cvjax.data.sources import Example
from cvjax.data.transforms import colour, fields, filters
from cvjax.data.transforms.fields import Fill
from cvjax.data.transforms.geometry import affine_matrix
from cvjax.errors import InputError

Space = dict[str, np.ndarray]  # the strengths of each operation, from weakest to strongest

_SHEAR_X, _SHEAR_Y, _ROTATE = "shear x", "shear y", "rotate"
_TRANSLATE_X, _TRANSLATE_Y = "translate x", "translate y"
_MOVES = (_SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y, _ROTATE)
_FACTORS = {
    "brightness": colour.brightness,
    "saturation": colour.saturation,
    "contrast": colour.contrast,
    "sharpness": filters.sharpness,
}
_LEVELS = {"posterize": colour.posterize, "solarize": colour.solarize}
_FIXED = {"autocontrast": colour.autocontrast, "equalize": colour.equalize}


def rand_augment(
    example: Example,
    rng: np.random.Generator,
    *,
    operations: int = 2,
    magnitude: int = 9,
    bins: int = 31,
    fill: Fill = 0,
    interpolation: str = "nearest",
) -> Example:
    """Applies some operations, each drawn anew, all with the same strength.

    E. Cubuk et al.: RandAugment (https://arxiv.org/abs/1909.13719).

    Args:
        example: fields as in `cvjax.data.transforms`.
        rng: draws the operations, and the sign of those that have one.
        operations: how many, one after the other.
        magnitude: the strength, from 0 to bins - 1.
        bins: into how many steps the range of strengths is divided.
        fill: of what comes into view.
        interpolation: of the operations that move the image.
    """
    check_count(0, operations=operations, magnitude=magnitude)
    check_count(2, bins=bins)
    check_between(0, bins - 1, magnitude=magnitude)
    fields.check_sampling(example, fill, interpolation)
    height, width = fields.image_of(example).shape[:2]
    reach = 150 / 331  # of 331 pixels, the size of the paper's images
    space = _space(bins, 0.3, (reach * width, reach * height), 30, 0.9, bits=(8, 4))
    for name in rng.choice([*space, "identity"], size=operations):
        if name != "identity":
            strength = space[name][magnitude]
            example = _apply(example, rng, str(name), strength, fill, interpolation)
    return example


def trivial_augment(
    example: Example,
    rng: np.random.Generator,
    *,
    bins: int = 31,
    fill: Fill = 0,
    interpolation: str = "nearest",
) -> Example:
    """Applies one operation of any strength.

    S. Müller, F. Hutter: TrivialAugment (https://arxiv.org/abs/2103.10158), the wide space.

    Args:
        example: fields as in `cvjax.data.transforms`.
        rng: draws the operation, the strength, and the sign where it has one.
        bins: into how many steps the range of strengths is divided.
        fill: of what comes into view.
        interpolation: of the operations that move the image.
    """
    check_count(2, bins=bins)
    fields.check_sampling(example, fill, interpolation)
    space = _space(bins, 0.99, (32, 32), 135, 0.99, bits=(8, 2))
    name = str(rng.choice([*space, "identity"]))
    if name == "identity":
        return example
    return _apply(example, rng, name, rng.choice(space[name]), fill, interpolation)


def augmix(
    example: Example,
    rng: np.random.Generator,
    *,
    severity: int = 3,
    width: int = 3,
    depth: int | None = None,
    alpha: float = 1.0,
    fill: Fill = 0,
    interpolation: str = "bilinear",
) -> Example:
    """Blends the image with several chains of weak operations on it.

    D. Hendrycks et al.: AugMix (https://arxiv.org/abs/1912.02781, algorithm 1). All operations
    take part, as is the default of torchvision.

    Args:
        example: `image` is changed.
        rng: draws operations, strengths and weights.
        severity: from 1 to 10, above all strengths that are drawn.
        width: how many chains.
        depth: operations in a chain; None draws 1, 2 or 3.
        alpha: of the Dirichlet and Beta distributions of the weights.
        fill: of what comes into view.
        interpolation: of the operations that move the image.

    Raises:
        InputError: the example has boxes, points or masks: they cannot follow several pictures.
    """
    check_count(1, severity=severity, width=width, depth=1 if depth is None else depth)
    check_between(1, 10, severity=severity)
    check_between(1e-3, 1e3, alpha=alpha)
    fields.check_sampling(example, fill, interpolation)
    if tied := {"boxes", "masks", "keypoints", "mask"} & example.keys():
        raise InputError(f"augmix cannot move {', '.join(sorted(tied))} with several pictures")
    image = fields.image_of(example)
    reach = image.shape[1] / 3, image.shape[0] / 3
    space = _space(10, 0.3, reach, 30, 0.9, bits=(4, 0))
    own, mixed = rng.dirichlet((alpha, alpha))
    blend = own * image
    for weight in rng.dirichlet((alpha,) * width):
        chain: Example = {"image": image}
        for _ in range(rng.integers(1, 4) if depth is None else depth):
            name = str(rng.choice(list(space)))
            strength = rng.choice(space[name][:severity])
            chain = _apply(chain, rng, name, strength, fill, interpolation)
        blend += mixed * weight * chain["image"]
    return {**example, "image": np.rint(blend).astype(np.uint8)}


def _space(
    bins: int,
    shear: float,
    pixels: tuple[float, float],
    degrees: float,
    factor: float,
    bits: tuple[int, int],
) -> Space:
    """Returns the strengths: up to these tangents, pixels, degrees and distances from factor 1."""
    ends = {
        _SHEAR_X: shear,
        _SHEAR_Y: shear,
        _TRANSLATE_X: pixels[0],
        _TRANSLATE_Y: pixels[1],
        _ROTATE: degrees,
        **dict.fromkeys(_FACTORS, factor),
    }
    return {
        **{name: np.linspace(0, end, bins) for name, end in ends.items()},
        "posterize": np.rint(np.linspace(*bits, bins)),
        "solarize": np.linspace(255, 0, bins),
        **{name: np.zeros(bins) for name in _FIXED},
    }


def _apply(
    example: Example,
    rng: np.random.Generator,
    name: str,
    strength: float,
    fill: Fill,
    interpolation: str,
) -> Example:
    """Applies the operation; one that has two directions goes either way."""
    if name in _MOVES or name in _FACTORS:
        strength = float(strength * rng.choice((-1, 1)))
    if name in _MOVES:
        matrix = _matrix(name, strength, fields.image_of(example).shape[:2])
        return fields.warp(example, matrix, fill=fill, interpolation=interpolation)
    image = fields.image_of(example)
    if name in _FACTORS:
        image = _FACTORS[name](image, 1 + strength)
    elif name in _LEVELS:
        image = _LEVELS[name](image, int(strength) if name == "posterize" else strength)
    else:
        image = _FIXED[name](image)
    return {**example, "image": image}


def _matrix(name: str, strength: float, image_size: tuple[int, int]) -> np.ndarray:
    if name in (_SHEAR_X, _SHEAR_Y):  # about the top left corner
        angle = math.degrees(math.atan(strength))
        shear = (angle, 0.0) if name == _SHEAR_X else (0.0, angle)
        return affine_matrix(image_size, shear=shear, center=(0, 0))
    if name == _ROTATE:
        return affine_matrix(image_size, degrees=-strength)
    whole = float(int(strength))
    return affine_matrix(image_size, pixels=(whole, 0) if name == _TRANSLATE_X else (0, whole))
