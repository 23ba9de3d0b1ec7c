"""Draws every transform on a photograph, with its boxes, masks and points: sheet.png.

    python experiments/augmentations/run.py

The photographs are those of scikit-learn (china.jpg by Yann Forget, flower.jpg by dany13).
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from cvjax import draw
from cvjax.data.transforms import (
    batched,
    colour,
    composing,
    defaults,
    erasing,
    fields,
    filters,
    geometry,
    mixing,
    policies,
)
from cvjax.data.transforms.multi_crop import multi_crop

HEIGHT, WIDTH, COLUMNS = 107, 160, 6
CAPTION = 13

# Outlines in pixels of the photograph, 640 x 427: a tower, a tree, and three points of each.
OUTLINES = (
    [(205, 30), (222, 62), (320, 122), (296, 162), (330, 182), (320, 228), (352, 252), (344, 310),
     (372, 335), (320, 375), (322, 427), (285, 427), (190, 360), (73, 340), (62, 268), (98, 232),
     (84, 172), (118, 150), (95, 115), (188, 66)],
    [(607, 137), (640, 180), (640, 427), (560, 427), (568, 300), (547, 225), (575, 190)],
)  # fmt: skip
POINTS = [[(205, 40), (100, 120), (316, 122)], [(607, 142), (552, 228), (600, 400)]]

EXAMPLE_TRANSFORMS = {
    "flip": partial(geometry.random_flip, p=1.0),
    "vertical flip": partial(geometry.random_vertical_flip, p=1.0),
    "quarter turn": lambda example, rng: fields.quarter_turn(example, 1),
    "center crop": partial(geometry.center_crop, size=80),
    "random crop, reflect": partial(geometry.random_crop, padding=30, fill="reflect"),
    "random crop": partial(geometry.random_crop, size=(80, 100)),
    "resize": partial(geometry.resize, size=(107, 60)),
    "resize, not antialiased": partial(geometry.resize, size=(53, 80), antialias=False),
    "resize shorter": partial(geometry.resize_shorter, size=70),
    "resize and pad": partial(geometry.resize_and_pad, size=107, fill=128),
    "scale crop": partial(geometry.random_scale_crop, size=107),
    "resized crop": partial(geometry.random_resized_crop, size=107, scale=(0.2, 0.8)),
    "rotation": partial(geometry.random_rotation, degrees=40),
    "affine": partial(
        geometry.random_affine, degrees=20, scale=(0.7, 1.2), pixels=20, shear=15, fill=128
    ),
    "perspective": partial(geometry.random_perspective, p=1.0),
    "brightness": partial(colour.random_jitter, brightness=0.9),
    "contrast": partial(colour.random_jitter, contrast=0.9),
    "saturation": partial(colour.random_jitter, saturation=1.0),
    "hue": partial(colour.random_jitter, hue=0.5),
    "grayscale": partial(colour.random_grayscale, p=1.0),
    "invert": partial(colour.random_invert, p=1.0),
    "solarize": partial(colour.random_solarize, p=1.0),
    "posterize": partial(colour.random_posterize, bits=2, p=1.0),
    "autocontrast": partial(colour.random_autocontrast, p=1.0),
    "equalize": partial(colour.random_equalize, p=1.0),
    "sharpness": partial(filters.random_sharpness, strength=1.0, p=1.0),
    "blur": partial(filters.random_blur, sigma=(1.5, 2.0), p=1.0),
    "noise": partial(filters.random_noise, std=(15, 25), p=1.0),
    "cutout": partial(erasing.cutout, size=40),
    "random erasing": partial(erasing.random_erasing, p=1.0, fill="noise"),
    "RandAugment": policies.rand_augment,
    "RandAugment, magnitude 20": partial(policies.rand_augment, magnitude=20),
    "TrivialAugment": policies.trivial_augment,
    "classification": partial(defaults.classification, size=107),
    "segmentation": partial(defaults.segmentation, size=107),
    "detection": partial(defaults.detection, size=107),
    "diffusion": partial(defaults.diffusion, size=107),
    "contrastive view": partial(defaults.view, size=107),
}


def photograph(name: str) -> np.ndarray:
    """A photograph of scikit-learn, uint8 [HEIGHT, WIDTH, 3]."""
    image = {"image": load_sample_image(name)}
    return fields.resize(image, (HEIGHT, WIDTH))["image"]


def annotated() -> dict[str, np.ndarray]:
    """The photograph of a tower with masks, boxes and points of two objects."""
    masks, scale = [], WIDTH / 640
    for outline in OUTLINES:
        canvas = Image.new("1", (WIDTH, HEIGHT))
        ImageDraw.Draw(canvas).polygon([(x * scale, y * scale) for x, y in outline], fill=1)
        masks.append(np.asarray(canvas))
    boxes = [(*np.min(outline, axis=0), *np.max(outline, axis=0)) for outline in OUTLINES]
    points = np.array(POINTS, np.float32) * scale
    return {
        "image": photograph("china.jpg"),
        "masks": np.stack(masks),
        "boxes": np.float32(boxes) * scale,
        "box_labels": np.arange(2),
        "keypoints": np.concatenate([points, np.ones((2, 3, 1), np.float32)], axis=-1),
    }


def annotated_flower() -> dict[str, np.ndarray]:
    """The photograph of a flower with its mask, its box and three points: what has its colour."""
    image = photograph("flower.jpg")
    red, green = image[..., 0].astype(int), image[..., 1]
    # The blooms are the only things in it that are red; that below is another one.
    mask = (red > 120) & (red > 1.3 * green) & (np.arange(HEIGHT)[:, None] < 77)
    y, x = np.nonzero(mask)
    corners = [(x.min(), y.min()), (x.max(), y.max())]
    points = np.array([(x[y.argmin()], y.min()), (x.mean(), y.mean()), (x[y.argmax()], y.max())])
    return {
        "image": image,
        "masks": mask[None],
        "boxes": np.float32([[*corners[0], corners[1][0] + 1, corners[1][1] + 1]]),
        "box_labels": np.array([2]),
        "keypoints": np.float32(np.concatenate([points + 0.5, np.ones((3, 1))], axis=1)[None]),
    }


def drawn(example: dict[str, np.ndarray]) -> np.ndarray:
    """The image with everything that is known of it, float [h, w, 3]."""
    picture, labels = example["image"] / 255, example.get("box_labels")
    if "masks" in example:
        picture = draw.masks(picture, example["masks"], labels, opacity=0.35)
        picture = draw.boxes(picture, example["boxes"], labels, width=2)
        seen = example["keypoints"][example["keypoints"][..., 2] > 0]
        picture = draw.points(picture, seen[:, :2], labels=np.full(len(seen), 3))
    return picture


def tiles(seed: int) -> dict[str, np.ndarray]:
    """All pictures by their captions, float [h, w, 3]."""
    given, rng = annotated(), np.random.default_rng(seed)
    result = {"given": drawn(given)}
    result |= {name: drawn(f(given, rng)) for name, f in EXAMPLE_TRANSFORMS.items()}
    plain = {"image": given["image"]}
    result["AugMix"] = policies.augmix(plain, rng, severity=8)["image"] / 255

    views = multi_crop(
        plain, rng,
        views={"large": partial(defaults.view, size=72), "small": partial(defaults.view, size=33)},
        counts={"small": 6},
    )  # fmt: skip
    small = draw.grid(views["image_small"] / 255, columns=2, padding=1)
    large = np.pad(views["image_large"][0] / 255, ((0, len(small) - 72), (0, 0), (0, 0)))
    result["multi-crop"] = np.concatenate([large, small], axis=1)

    others = [given, fields.flip(given), fields.quarter_turn(given, 1)]
    composed = composing.mosaic([given, *others], rng, size=(HEIGHT, WIDTH), fill=128)
    result["mosaic"] = drawn(composed)
    flower, jitter = annotated_flower(), partial(geometry.random_scale_crop, size=(HEIGHT, WIDTH))
    result["flower"] = drawn(flower)
    result["copy-paste"] = drawn(composing.copy_paste(given, flower, rng, share=1.0))
    result["copy-paste, jitter"] = drawn(
        composing.copy_paste(
            jitter(given, rng, scale=(0.6, 1.2)),
            jitter(flower, rng, scale=(0.5, 1.0)),
            rng,
            share=1.0,
        )
    )

    pair = np.stack([photograph("china.jpg"), photograph("flower.jpg")]).astype(np.float32) / 255
    key = jax.random.key(seed)
    for name, mix in {
        "mixup": partial(mixing.mixup, alpha=5.0), "cutmix": partial(mixing.cutmix, alpha=5.0),
    }.items():  # fmt: skip
        mixed = jax.jit(mix)(pair, key)
        result[f"{name} on device: {mixed.share[0]:.2f}"] = mixed.images[0]
    for name, transform in {
        "crop": partial(batched.random_crop, padding=30),
        "flip": partial(batched.random_flip, p=1.0),
        "cutout": partial(batched.cutout, size=40),
        "erasing": partial(batched.random_erasing, p=1.0, fill=0.5),
    }.items():  # fmt: skip
        result[f"{name} on device"] = jax.jit(transform)(pair, key)[1]
    return {name: np.asarray(picture) for name, picture in result.items()}


def sheet(seed: int) -> Image.Image:
    """All tiles with their captions, in 256 colours to keep the file small."""
    pictures = tiles(seed)
    rows = -(-len(pictures) // COLUMNS)
    # A quarter turn is as high as the photograph is wide: all tiles fit into WIDTH x HEIGHT.
    cell = (WIDTH + 6, HEIGHT + CAPTION + 4)
    canvas = Image.new("RGB", (COLUMNS * cell[0], rows * cell[1]), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (name, picture) in enumerate(pictures.items()):
        corner = (number % COLUMNS * cell[0] + 3, number // COLUMNS * cell[1])
        tile = Image.fromarray(np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8))
        tile.thumbnail((WIDTH, HEIGHT))
        canvas.paste(tile, (corner[0], corner[1] + CAPTION))
        pen.text(corner, name, fill="black", font_size=10)
    return canvas.quantize(256)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=3)
    sheet(parser.parse_args().seed).save(Path(__file__).with_name("sheet.png"), optimize=True)
