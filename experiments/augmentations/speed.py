"""Images per second of one core: decode, random resized crop, flip, colours, normalize, at 224.

    pip install torch==2.13.0 albumentations && pip install --no-deps torchvision==0.28.0
    taskset -c 0 python experiments/augmentations/speed.py

All read the same JPEG files (windows of two photographs, 500x375, quality 90) in batches of 16 and
end with normalized float32 arrays. They take turns in every round; the time is that of the
processor, so that other programs disturb little. What is not installed is left out.
"""

import argparse
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from cvjax.data.loader import Loader
from cvjax.data.sources.folder import Folder
from cvjax.data.transforms import Transform, colour, geometry

BATCH = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
Batches = Callable[[], Iterator[np.ndarray]]


def write_jpegs(folder: Path, count: int) -> list[str]:
    """Writes windows of two photographs; returns the files."""
    rng, files = np.random.default_rng(0), []
    (folder / "photographs").mkdir()
    for number in range(count):
        image = load_sample_images().images[number % 2]
        example = {"image": image}
        window = geometry.random_resized_crop(
            example, rng, size=(375, 500), scale=(0.6, 1.0), interpolation="bicubic"
        )
        files.append(str(folder / "photographs" / f"{number}.jpg"))
        Image.fromarray(window["image"]).save(files[-1], quality=90)
    return files


def our_transforms(antialias: bool) -> list[Transform]:
    """Random resized crop, flip and colours."""
    return [
        partial(geometry.random_resized_crop, size=224, antialias=antialias),
        geometry.random_flip,
        partial(colour.random_jitter, **JITTER),
    ]


def ours(files: list[str], antialias: bool = True) -> Batches:
    """A source and transforms, called by hand; normalized image by image, as the others are."""
    source, rng = Folder(Path(files[0]).parents[1]), np.random.default_rng(0)
    transforms = our_transforms(antialias)
    # Whole rows: NumPy is slow where the last axis has three entries.
    scale = np.tile(1 / (255 * np.float32(STD)), 224)
    offset = np.tile(-np.float32(MEAN) / np.float32(STD), 224)

    def load(index: int) -> np.ndarray:
        example = source[index]
        for transform in transforms:
            example = transform(example, rng)
        rows = example["image"].reshape(224, -1).astype(np.float32)
        rows *= scale
        rows += offset
        return rows.reshape(224, 224, 3)

    return by_image(range(len(files)), load)


def our_loader(files: list[str]) -> Batches:
    """As a run does it: the loader, and the normalization inside jit."""
    source = Folder(Path(files[0]).parents[1])
    transforms = our_transforms(antialias=True)
    # Grain's shuffle, which costs time for a set as small as this, is left out here only.
    loader = Loader(source, BATCH, shuffle=False, transforms=transforms, epochs=1, prefetch=0)
    normalize = jax.jit(lambda images: (images - np.float32(MEAN)) / np.float32(STD))

    def batches() -> Iterator[np.ndarray]:
        for batch in loader.iterate():
            yield np.asarray(normalize(batch["image"]))

    return batches


def by_image(files: Sequence, load: Callable[..., np.ndarray]) -> Batches:
    """Batches of a function that gives one finished image of one file."""

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, len(files), BATCH):
            yield np.stack([load(file) for file in files[first : first + BATCH]])

    return batches


def torchvision_pillow(files: list[str]) -> Batches:
    """The transforms of torchvision's own ImageNet recipe, on Pillow images."""
    from torchvision import transforms as T

    transform = T.Compose(
        [T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ColorJitter(**JITTER),
         T.ToTensor(), T.Normalize(MEAN, STD)]
    )  # fmt: skip
    return by_image(files, lambda file: transform(Image.open(file).convert("RGB")).numpy())


def torchvision_tensors(files: list[str]) -> Batches:
    """Its second version, on uint8 tensors, as its documentation advises."""
    import torch
    from torchvision.transforms import v2 as T

    transform = T.Compose(
        [T.PILToTensor(), T.RandomResizedCrop(224, antialias=True), T.RandomHorizontalFlip(),
         T.ColorJitter(**JITTER), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)]
    )  # fmt: skip
    return by_image(files, lambda file: transform(Image.open(file).convert("RGB")).numpy())


def albumentations(files: list[str], decoder: str = "OpenCV") -> Batches:
    """It cannot antialias; decoded by OpenCV, or by Pillow."""
    import albumentations as A

    transform = A.Compose(
        [A.RandomResizedCrop((224, 224), p=1.0), A.HorizontalFlip(p=0.5),
         A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=1.0),
         A.Normalize(MEAN, STD)]
    )  # fmt: skip

    def load(file: str) -> np.ndarray:
        if decoder == "OpenCV":
            return transform(image=cv2.imread(file, cv2.IMREAD_COLOR_RGB))["image"]
        return transform(image=np.asarray(Image.open(file).convert("RGB")))["image"]

    return by_image(files, load)


PIPELINES = {
    "cvjax": ours,
    "cvjax, its loader": our_loader,
    "torchvision, Pillow": torchvision_pillow,
    "torchvision v2, tensors": torchvision_tensors,
    "cvjax, not antialiased": partial(ours, antialias=False),
    "albumentations": albumentations,
    "albumentations, Pillow decodes": partial(albumentations, decoder="Pillow"),
}


def main(rounds: int, images: int) -> None:
    """Prints a table: the median over the rounds, the spread, and the ratio to ours."""
    # Only a build for the same device brings torchvision's compiled operators: not needed here.
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    with tempfile.TemporaryDirectory() as folder:
        files = write_jpegs(Path(folder), images)
        pipelines = {}
        for name, make in PIPELINES.items():
            try:
                pipelines[name] = make(files)
                next(pipelines[name]())
            except ImportError as error:
                print(f"{name}: left out ({error})")
        speeds: dict[str, list[float]] = {name: [] for name in pipelines}
        for _ in range(rounds):
            for name, batches in pipelines.items():
                began = time.process_time()
                for batch in batches():
                    assert batch.shape[0] == BATCH and batch.dtype == np.float32
                speeds[name].append(images / (time.process_time() - began))
    print("| pipeline | images/s, median | least to most | cvjax / it |\n|---|---|---|---|")
    for name, values in speeds.items():
        peer = "cvjax, not antialiased" if name.startswith("albumentations") else "cvjax"
        ratio = np.median(np.array(speeds[peer]) / values)
        print(
            f"| {name} | {np.median(values):.0f} | {min(values):.0f} to {max(values):.0f} | "
            f"{ratio:.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=64)
    flags = parser.parse_args()
    if min(flags.rounds, flags.images) < 1:
        parser.error("--rounds and --images must be at least 1")
    main(**vars(flags))
