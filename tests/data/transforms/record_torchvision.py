"""Records what torchvision makes of one picture: writes torchvision.npz beside this file.

    pip install torch==2.13.0 && pip install --no-deps torchvision==0.28.0
    python tests/data/transforms/record_torchvision.py

All is computed by its functions of tensors. `cases()` is what the tests repeat.
"""

import sys
import types
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("torchvision.npz")
CORNERS = [[0, 0], [23, 0], [23, 18], [0, 18]]
INWARDS = [[3, 2], [19, 4], [22, 15], [1, 17]]


def picture(height=18, width=23, channels=3):
    """Smooth and rough, dark and light: every branch of the colour conversions."""
    rng = np.random.default_rng(7)
    rows, columns, _ = np.mgrid[:height, :width, :channels]
    waves = 127 + 120 * np.sin(rows / 3 + columns / 5 + np.arange(channels) * 2)
    image = np.where(columns < width // 2, waves, rng.integers(0, 256, waves.shape))
    image[:3, :3] = 90  # grey
    image[-3:, -3:] = 0
    image[-3:, :3] = 255
    return image.astype(np.uint8)


def cases():
    """Yields (name, settings): functions of torchvision.transforms.functional."""
    for factor in (0.0, 0.3, 1.0, 1.7):
        for name in ("brightness", "contrast", "saturation", "sharpness"):
            yield f"adjust_{name}", (factor,)
    for turn in (-0.5, -0.2, -0.02, 0.1, 0.37, 0.5):
        yield "adjust_hue", (turn,)
    for threshold in (0, 100, 255):
        yield "solarize", (threshold,)
    for bits in (1, 3, 8):
        yield "posterize", (bits,)
    for name in ("autocontrast", "equalize", "invert"):
        yield name, ()
    yield "rgb_to_grayscale", (3,)
    for sigma in (0.5, 1.0, 2.0):
        yield "gaussian_blur", (sigma,)
    for size in ((9, 31), (18, 7), (40, 50), (18, 23)):
        for interpolation in ("bilinear", "bicubic"):
            for antialias in (True, False):
                yield "resize", (size, interpolation, antialias)
    for size in (10, 30):
        for longest in (None, 33):
            yield "resize_shorter", (size, longest)
    for size in (5, 8, 20, 30):
        yield "center_crop", (size,)
    for interpolation in ("nearest", "bilinear"):
        for degrees, pixels, scale, shear in (
            (30, (0, 0), 1, (0, 0)),
            (-77, (3, -2), 1.3, (0, 0)),
            (10, (1, 4), 0.7, (12, -8)),
        ):
            yield "affine", (degrees, pixels, scale, shear, interpolation)
        yield "perspective", (interpolation,)
    for name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
        yield "operation", (name, 0.25 if "Shear" in name else 5.6)


def record():
    """Returns the results by the text of the case."""
    # Only a build for the same device brings the compiled operators, which nothing here needs.
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    import torch
    from torchvision.transforms import InterpolationMode, autoaugment
    from torchvision.transforms import functional as F

    image = torch.from_numpy(picture()).permute(2, 0, 1)

    def apply(name, settings):
        *start, last = settings or (None,)
        match name:
            case "gaussian_blur":
                side = 2 * int(np.ceil(4 * last)) + 1
                return F.gaussian_blur(image, [side, side], [last, last])
            case "resize":
                size, interpolation, antialias = settings
                return F.resize(image, size, InterpolationMode(interpolation), antialias=antialias)
            case "resize_shorter":
                return F.resize(image, *start, max_size=last, antialias=True)
            case "affine":
                return F.affine(image, *start, interpolation=InterpolationMode(last))
            case "perspective":
                return F.perspective(image, CORNERS, INWARDS, InterpolationMode(last))
            case "operation":
                return autoaugment._apply_op(image, *settings, InterpolationMode.BILINEAR, None)
            case "center_crop":
                return F.center_crop(image, [last, last])
        return getattr(F, name)(image, *settings)

    results = {repr(case): apply(*case).permute(1, 2, 0).numpy() for case in cases()}
    for policy in (autoaugment.RandAugment, autoaugment.TrivialAugmentWide, autoaugment.AugMix):
        bins = 10 if policy is autoaugment.AugMix else 31
        size = () if policy is autoaugment.TrivialAugmentWide else ((18, 23),)
        for name, (values, _) in policy()._augmentation_space(bins, *size).items():
            results[f"{policy.__name__} {name}"] = values.numpy()
    return results


if __name__ == "__main__":
    np.savez_compressed(FILE, **record())
