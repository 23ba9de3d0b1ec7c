"""An evaluator of generated images: how near to real ones, how varied, whether they are copies."""

import copy
import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cvjax import files
from cvjax.checks import check_count, check_labels
from cvjax.errors import InputError
from cvjax.evaluation.distances import (
    classifier_score,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision_recall_density_coverage,
)
from cvjax.evaluation.extractor import Extractor, unit


class Real(NamedTuple):
    """Real images with what the extractor makes of them: [n, h, w, c], [n, d], [n, classes]."""

    images: np.ndarray
    features: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray | None


class SampleQuality:
    """Scores generated images against real ones, and other real images beside them.

    `fit` and `evaluate` hand it what `task.predict` gives. Every figure comes twice: that of the
    samples, and with `_real` behind its name that of held-out real images in their place: what is
    within reach. `score` gives, for an extractor called "digits":

      FD-digits: the Frechet distance to the training images. A classifier's features have no scale
        of their own; they are divided by one number, so that the variance of a feature is 1 in the
        mean over all (those of Inception are as they are). The distance depends on the number of
        images: n held-out ones, a fixed choice, stand beside n samples (`count_real`: all that
        there are, if fewer).
      KD-digits: the kernel distance, unbiased; precision, recall, density, coverage.
      score: `classifier_score`; with Inception, the three are FID, KID and IS.
      agreement: the share of images that are taken for what they should be, given the labels; not
        of Inception, which knows other classes.
      classes: how many classes images are taken for.
      nearest: the median distance of an image's pixels in [0, 1] to the nearest training image.
        Copies are nearer than `nearest_real`.

    Args:
      extractor: whose features.
      train: the source of the images that the generator was trained on.
      held_out: the source of real images that it was not trained on.
      cache: a folder for the features of real images, kept under a hash of all pixels and the
        extractor; None keeps nothing.
      output: what `task.predict` calls the images.
      neighbours: k of precision, recall, density and coverage.
    """

    def __init__(
        self,
        extractor: Extractor,
        train: Any,
        held_out: Any,
        cache: str | os.PathLike | None = None,
        output: str = "sample",
        neighbours: int = 5,
    ):
        check_count(1, neighbours=neighbours)
        self.extractor, self.output, self.neighbours = extractor, output, neighbours
        self.train = real_features(extractor, train, cache)
        self.held_out = real_features(extractor, held_out, cache)
        for name, real in (("training", self.train), ("held-out", self.held_out)):
            if len(real.images) <= neighbours:
                raise InputError(
                    f"there are {len(real.images)} {name} images; with neighbours={neighbours} "
                    f"there must be at least {neighbours + 1}"
                )
        shapes = self.train.images.shape[1:], self.held_out.images.shape[1:]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"training images are {list(shapes[0])}, held-out ones {list(shapes[1])}; "
                "they must be alike"
            )
        variance = self.train.features.astype(np.float64).var(axis=0).mean()
        self.scale = 1.0 if extractor.is_fid else float(np.sqrt(variance))
        if not self.scale > 0:
            raise InputError(f"features {extractor.name!r} are the same for all real images")
        self.floors: dict[int, dict[str, float]] = {}
        self.images: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def __deepcopy__(self, memo: dict) -> "SampleQuality":
        """Of every evaluation's own: real images and their scores are the same for all."""
        own = copy.copy(self)
        own.images, own.labels = list(self.images), list(self.labels)
        return own

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Takes a batch's images, and the labels that they were made for where there are."""
        if self.output not in outputs:
            raise InputError(
                f"the task predicts {', '.join(outputs)}; output={self.output!r} is not among them"
            )
        self.images.append(np.asarray(outputs[self.output])[batch["valid"]])
        if "label" in outputs:
            self.labels.append(np.asarray(outputs["label"])[batch["valid"]])

    def result(self) -> dict[str, float]:
        """The scores of all that was added; InputError if nothing was."""
        if not self.images:
            raise InputError("no images were added: the evaluation data has no batch")
        labels = np.concatenate(self.labels) if self.labels else None
        return self.score(np.concatenate(self.images), labels)

    def score(self, images: ArrayLike, labels: ArrayLike | None = None) -> dict[str, float]:
        """The scores of images [n, h, w, c], uint8 or float in [0, 1], and of real ones.

        `labels` int [n]: what the images were asked to be.

        Raises:
          InputError: fewer than `neighbours` + 1 images, images of another shape than real ones,
            another number of labels, or one that is no class of the extractor's.
        """
        images = unit(images)
        if len(images) <= self.neighbours:
            raise InputError(
                f"there are {len(images)} images; with neighbours={self.neighbours} there must be "
                f"at least {self.neighbours + 1}"
            )
        shape = self.train.images.shape[1:]
        if images.shape[1:] != shape:
            raise InputError(
                f"images are {list(images.shape[1:])}, real ones {list(shape)}; they must be equal"
            )
        labels = None if labels is None else np.asarray(labels)
        if labels is not None and labels.shape != (len(images),):
            raise InputError(f"labels are {list(labels.shape)}; they must be [{len(images)}]")
        features, probabilities = self.extractor(images)
        if labels is not None and not self.extractor.is_fid:
            name = f"label, which must be a class of the extractor {self.extractor.name!r},"
            check_labels(labels, probabilities.shape[1], name)
        found = self._compare(Real(images, features, probabilities, labels))
        if len(images) not in self.floors:
            # Not the first ones: a source may have class after class.
            some = np.random.default_rng(0).permutation(len(self.held_out.images))[: len(images)]
            real = Real(*(None if x is None else x[some] for x in self.held_out))
            self.floors[len(images)] = self._compare(real)
        floor = self.floors[len(images)]
        return found | {f"{name}_real": floor[name] for name in found if name in floor}

    def _compare(self, some: Real) -> dict[str, float]:
        fid, name, train = self.extractor.is_fid, self.extractor.name, self.train
        features = train.features / self.scale, some.features / self.scale
        flat = lambda images: unit(images).reshape(len(images), -1)  # noqa: E731
        found = {
            "count": float(len(some.images)),
            "FID" if fid else f"FD-{name}": frechet_distance(*features),
            "KID" if fid else f"KD-{name}": kernel_distance(*features),
            **precision_recall_density_coverage(*features, self.neighbours),
            "IS" if fid else "score": classifier_score(some.probabilities),
            "classes": float(len(np.unique(some.probabilities.argmax(1)))),
            "nearest": float(np.median(nearest_distances(flat(train.images), flat(some.images)))),
        }
        if some.labels is not None and not fid:
            found["agreement"] = float(np.mean(some.probabilities.argmax(1) == some.labels))
        return found


def real_features(extractor: Extractor, source: Any, cache: str | os.PathLike | None) -> Real:
    """The images of a source, uint8 [n, h, w, c], and their features, from the cache if there.

    The file's name is a hash of every pixel and of the extractor. It is written under another name
    first, and one that cannot be read is made anew.
    """
    records = [source[i] for i in range(len(source))]
    if not records:
        raise InputError("there are no real images: the source is empty")
    for field in ("image", *(f for f in ("label",) if f in records[0])):
        missing = [i for i, record in enumerate(records) if field not in record]
        if missing:
            raise InputError(f"record {missing[0]} of the real images has no field {field}")
    if cache is not None and Path(cache).is_file():
        raise InputError(f"cache={str(cache)!r} is a file; it must be a folder")
    shapes = {np.shape(record["image"]) for record in records}
    if len(shapes) != 1:
        raise InputError(
            f"real images have {len(shapes)} shapes; all must have one (set image_size of a folder)"
        )
    images = np.stack([record["image"] for record in records])
    labels = np.stack([record["label"] for record in records]) if "label" in records[0] else None
    if cache is None:
        return Real(images, *extractor(images), labels)
    digest = hashlib.sha256(extractor.fingerprint().encode())
    digest.update(f"{images.dtype} {images.shape}".encode())
    digest.update(images.tobytes())
    path = Path(cache) / f"{extractor.name}-{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            return Real(images, saved["features"], saved["probabilities"], labels)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
    features, probabilities = extractor(images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache {str(cache)!r} cannot be made: {error.strerror}") from error

    def write(new: Path) -> None:
        with new.open("wb") as file:
            np.savez(file, features=features, probabilities=probabilities)

    files.replace(path, write)
    return Real(images, features, probabilities, labels)
