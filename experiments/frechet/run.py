"""How near are generated images to real ones?

    python experiments/frechet/run.py --workdir=runs/conditional_gan
    python experiments/frechet/run.py --workdir=runs/diffusion --config.task.guidance=1.0
    python experiments/frechet/run.py --images=folder
    python experiments/frechet/run.py --images=folder --train=photos/train --held_out=photos/test \\
        --inception=pt_inception-2015-12-05.pth

scores the samples of a trained generator, one for each held-out example, or the images in a folder
(flat, or in sub-folders: where these are named as classes of the real images, agreement is told),
beside held-out real images in their place. The features are those of the judge
(configs/classification.py, another seed), which is trained in runs/judge if it is not there, or
those of the Inception network with weights of your own.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import config as configs
from cvjax import draw
from cvjax.build import build
from cvjax.config import read_changes
from cvjax.data.sources.digits import Digits
from cvjax.data.sources.folder import Folder
from cvjax.data.sources.pictures import SUFFIXES, read_picture, upright
from cvjax.errors import InputError
from cvjax.evaluation.extractor import Extractor
from cvjax.evaluation.samples import SampleQuality
from cvjax.nn.inception import InceptionV3
from cvjax.nn.pretrained import load_pretrained
from cvjax.run import load_run
from cvjax.train.evaluation import evaluate
from cvjax.train.restore import load_params
from experiments.recipes import RUNS, told, trained_judge


def judge(given: Path | None = None) -> Extractor:
    """The features "digits": those of a classifier, trained in runs/judge if none is given."""
    workdir = trained_judge(given)
    task = build(configs.buildable(configs.load_json(workdir / "config.json")))["task"]
    return Extractor(
        "digits", task.model, functools.partial(load_params, path=workdir), mean=task.mean,
        std=task.std,
    )  # fmt: skip


def inception(weights: Path) -> Extractor:
    """The features of the FID, with a user's file of weights (see `cvjax.nn.inception`)."""
    initialize = functools.partial(load_pretrained, path=weights)
    return Extractor("inception", InceptionV3(), initialize, image_shape=(299, 299, 3))


def images_in(
    folder: Path, channels: int, classes: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 [n, h, w, channels], and the labels, where each is in a folder named as its class.

    Raises InputError for a folder without images, one in which not all are of such folders, or
    images that cannot be read or have several sizes.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    entries = sorted(folder.glob("[!.]*"))
    files = [file for file in entries if file.suffix.lower() in SUFFIXES]
    names = [entry.name for entry in entries if entry.is_dir()]
    if not (files or names):
        raise InputError(f"{folder} has no images ({' '.join(SUFFIXES)})")
    if files and names:
        raise InputError(
            f"{folder} has images and folders, {names[0]!r} say; it must have one kind"
        )
    labels = None
    if files:
        images = []
        for file in files:
            try:
                convert = functools.partial(upright, channels=channels)  # as `Folder` does
                images.append(np.asarray(read_picture(file, Folder.max_pixels, convert)))
            except (OSError, InputError) as error:
                raise InputError(f"{file} cannot be read: {error}") from error
    else:
        source = Folder(folder, channels=channels)
        records = [source[i] for i in range(len(source))]
        images = [record["image"] for record in records]
        if set(names) <= set(classes):  # else nobody knows what they should show
            labels = np.array([classes.index(names[record["label"]]) for record in records])
    if len({image.shape for image in images}) != 1:
        raise InputError(f"the images in {folder} must all have one size")
    return np.stack(images).reshape(len(images), *images[0].shape[:2], channels), labels


def score(flags: argparse.Namespace, changes: list[tuple[str, str]]) -> dict[str, float]:
    """The scores, and the samples as a picture beside the run's others."""
    if (flags.workdir is None) == (flags.images is None):
        raise InputError("give either --workdir or --images")
    if (flags.train is None) != (flags.held_out is None):
        raise InputError("give both --train and --held_out, or neither")
    if flags.workdir is not None:
        task, state, train, held_out = load_run(flags.workdir, changes)
        if flags.raw:
            state = state.replace(ema={})
    else:
        if changes:
            raise InputError(f"--config.{changes[0][0]} changes a run: with --images there is none")
        train, held_out = Digits("train"), Digits("test")
    if flags.train is not None:
        # As large as those that are scored: the extractor then scales all alike.
        scored = images_in(flags.images, 3)[0] if flags.images else held_out[0]["image"][None]
        height, width, channels = scored.shape[1:]
        size = height if height == width else None
        train, held_out = (Folder(path, channels, size) for path in (flags.train, flags.held_out))
    channels = train[0]["image"].shape[-1]
    classes = getattr(train, "class_names", ())
    images = images_in(flags.images, channels, classes) if flags.images is not None else None
    extractor = inception(flags.inception) if flags.inception else judge(flags.judge)
    quality = SampleQuality(extractor, train, held_out, cache=flags.cache)
    if images is not None:
        return quality.score(*images)
    found, pictures = evaluate(
        task, state, held_out, batch_size=100, evaluators={"quality": quality}, seed=flags.seed
    )
    draw.save_png(flags.workdir / "samples.png", pictures["samples"])
    return {
        name.removeprefix("quality/"): value
        for name, value in found.items()
        if name.startswith("quality/")
    }


def main_of(arguments: list[str]) -> dict[str, float]:
    """Parses the flags and prints a table: samples, and real images in their place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="of a generator")
    parser.add_argument("--raw", action="store_true", help="its weights, not their average")
    parser.add_argument("--images", type=Path, help="a folder of images, in place of a generator")
    parser.add_argument("--train", type=Path, help="a folder of real images, with classes")
    parser.add_argument("--held_out", type=Path, help="a folder of other real images")
    parser.add_argument("--inception", type=Path, help="weights of the Inception network")
    parser.add_argument("--judge", type=Path, help="a classifier's workdir")
    parser.add_argument("--cache", type=Path, default=RUNS / "features")
    parser.add_argument("--seed", type=int, default=1, help="of the samples")
    flags, others = parser.parse_known_args(arguments)
    found = score(flags, read_changes(others, vars(flags)))
    width = max(map(len, found))
    print(f"{'':{width}}  samples     real")
    for name, value in found.items():
        if not name.endswith("_real"):
            print(f"{name:{width}}  {value:7.4g}  {found.get(f'{name}_real', np.nan):7.4g}")
    if flags.workdir:
        (flags.workdir / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    told(lambda: main_of(sys.argv[1:]))
