"""The usual transforms of each task: each is one transform, made of others, to use or to copy.

    config.data.transforms = dict(usual=dict(type="data.transforms.defaults.detection", size=512))

A name that ends in `_eval` draws nothing: it makes images of one size of a held-out set.
"""

import numpy as np

from cvjax.checks import Size
from cvjax.data.sources import Example
from cvjax.data.transforms import colour, filters, geometry
from cvjax.data.transforms.multi_crop import multi_crop


def classification(example: Example, rng: np.random.Generator, *, size: Size = 224) -> Example:
    """A random part, mirrored or not, in other colours: how ImageNet is trained since 2014."""
    example = geometry.random_resized_crop(example, rng, size=size)
    example = geometry.random_flip(example, rng)
    return colour.random_jitter(example, rng, brightness=0.4, contrast=0.4, saturation=0.4)


def classification_eval(
    example: Example, rng: np.random.Generator, *, size: int = 224, shorter: int | None = None
) -> Example:
    """Makes the shorter side `shorter` (8/7 of `size`) pixels and cuts out the middle square."""
    shorter = round(size * 8 / 7) if shorter is None else shorter
    example = geometry.resize_shorter(example, rng, size=shorter)
    return geometry.center_crop(example, rng, size=size)


def segmentation(example: Example, rng: np.random.Generator, *, size: Size = 512) -> Example:
    """Any scale from half to double, a random window of it, mirrored or not, in other colours.

    As the recipe of DeepLab (https://arxiv.org/abs/1706.05587, section 4.1), with colours.
    """
    example = geometry.random_scale_crop(example, rng, size=size, scale=(0.5, 2.0))
    example = geometry.random_flip(example, rng)
    return colour.random_jitter(
        example, rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.5
    )


def segmentation_eval(example: Example, rng: np.random.Generator, *, size: Size = 512) -> Example:
    """Scales the image to fit inside `size`; the rest of the mask is ignored."""
    return geometry.resize_and_pad(example, rng, size=size)


def detection(
    example: Example,
    rng: np.random.Generator,
    *,
    size: Size = 640,
    scale: tuple[float, float] = (0.1, 2.0),
) -> Example:
    """Large-scale jitter (https://arxiv.org/abs/2012.07177), mirrored or not.

    Boxes of which less than a pixel is left are dropped. In the mirror keypoints swap as the
    example's `keypoint_swap` says. For mosaic and copy-paste see `cvjax.data.sources.composed`.
    """
    example = geometry.random_scale_crop(example, rng, size=size, scale=scale)
    example = geometry.random_flip(example, rng)
    return geometry.drop_small_boxes(example, rng) if "boxes" in example else example


def detection_eval(example: Example, rng: np.random.Generator, *, size: Size = 640) -> Example:
    """Scales the image to fit inside `size`; all boxes stay."""
    return geometry.resize_and_pad(example, rng, size=size)


def diffusion(example: Example, rng: np.random.Generator, *, size: int = 64) -> Example:
    """The middle square, mirrored or not: colours and edges are what is to be learnt."""
    example = geometry.resize_shorter(example, rng, size=size, interpolation="bicubic")
    return geometry.random_flip(geometry.center_crop(example, rng, size=size), rng)


def view(
    example: Example,
    rng: np.random.Generator,
    *,
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    strength: float = 1.0,
    blur: float = 0.5,
    solarize: float = 0.0,
) -> Example:
    """One view of an image, as SimCLR draws it (https://arxiv.org/abs/2002.05709, appendix A).

    Args:
        example: `image` is used.
        rng: draws all.
        size: of the view, a square.
        scale: least and largest share of the image that it shows.
        strength: of the change of colours; 0.5 is used for small images.
        blur: probability of a blur, by 0.1 to 2 pixels in 224.
        solarize: probability of that; 0.2 for the second view of BYOL and DINO.
    """
    example = geometry.random_resized_crop(example, rng, size=size, scale=scale)
    example = geometry.random_flip(example, rng)
    example = colour.random_jitter(
        example,
        rng,
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        p=0.8,
    )
    example = colour.random_grayscale(example, rng, p=0.2)
    sigma = (0.1 * size / 224, 2.0 * size / 224)
    example = filters.random_blur(example, rng, sigma=sigma, p=blur)
    return colour.random_solarize(example, rng, p=solarize)


def contrastive(example: Example, rng: np.random.Generator, *, size: int = 224) -> Example:
    """Two views: fields `image_first` and `image_second`, uint8 [1, size, size, c]."""

    def draw(example: Example, rng: np.random.Generator) -> Example:
        return view(example, rng, size=size)

    return multi_crop(example, rng, views={"first": draw, "second": draw})
