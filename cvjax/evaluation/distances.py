"""How near generated examples are to real ones, in the space of some extractor's features.

Features are [n, d] arrays, one row for each example; all is computed in float64 by NumPy. With the
features of an Inception network trained on ImageNet the first is the FID; with any others it is not
and should be called by the name of what extracted them. Values depend on n: compare sets of equal
size, and give the value of real against real beside them.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from cvjax.checks import check_count
from cvjax.errors import InputError

Array = np.ndarray[Any, np.dtype[np.float64]]


def frechet_distance(real: ArrayLike, fake: ArrayLike) -> float:
    """The squared Wasserstein distance between normal fits: means and unbiased covariances.

    |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (M. Heusel et al., arXiv:1706.08500, equation 6).
    With A = R'R and B = S'S the trace of that root is the sum of the singular values of R S'. No
    root of a matrix is taken, so that singular covariances, as of fewer examples than features,
    need no correction and lose no digits. Raises InputError for fewer than 2 examples.
    """
    real, fake = _pair(real, fake, 2)
    between = np.sum((real.mean(0) - fake.mean(0)) ** 2)
    one, two = (np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (real, fake))
    cross = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    # Of equal sets it may be below 0 by rounding.
    return max(float(between + np.sum(one**2) + np.sum(two**2) - 2 * cross), 0.0)


def kernel_distance(real: ArrayLike, fake: ArrayLike) -> float:
    """The unbiased squared MMD of the kernel (x y / d + 1)^3, over all pairs; may be below 0.

    M. Binkowski et al., https://arxiv.org/abs/1801.01401, section 4; of Inception features the
    KID. Raises InputError for fewer than 2 examples.
    """
    real, fake = _pair(real, fake, 2)
    kernel = lambda product: (product / real.shape[1] + 1) ** 3  # noqa: E731
    total = lambda x, y: sum(kernel(part @ y.T).sum() for part in _parts(x))  # noqa: E731

    def within(x: Array) -> float:
        itself = kernel(np.sum(x**2, axis=1)).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    between = total(real, fake) / (len(real) * len(fake))
    return float(within(real) + within(fake) - 2 * between)


def precision_recall_density_coverage(
    real: ArrayLike, fake: ArrayLike, neighbours: int = 5
) -> dict[str, float]:
    """How many fakes lie among real examples, and how many real ones among fakes.

    The ball of an example reaches to its k-th neighbour in its own set. `precision`: fakes in any
    real ball; `recall`: real ones in any fake's ball (T. Kynkäänniemi et al., arXiv:1904.06991);
    `density`: real balls that hold a fake, over k, mean, may pass 1; `coverage`: real balls with a
    fake in them (M. Naeem et al., https://arxiv.org/abs/2002.09797, equations 3 and 4).
    Raises InputError unless each set has more than `neighbours` examples.
    """
    check_count(1, neighbours=neighbours)
    real, fake = _pair(real, fake, neighbours + 1)
    # Each example is its own neighbour 0.
    sorted_to = lambda part, x: np.partition(cdist(part, x), neighbours, axis=1)  # noqa: E731
    real_radius, fake_radius = (
        np.concatenate([sorted_to(part, x)[:, neighbours].copy() for part in _parts(x)])
        for x in (real, fake)
    )
    holders = np.zeros(len(fake), np.int64)  # in how many real balls each fake is
    is_recalled, is_covered = [], []
    for part, size in zip(_parts(real), _parts(real_radius), strict=True):
        distance = cdist(part, fake)
        in_real = distance <= size[:, None]
        holders += in_real.sum(0)
        is_covered.append(in_real.any(1))
        is_recalled.append((distance <= fake_radius).any(1))
    return {
        "precision": float((holders > 0).mean()),
        "recall": float(np.concatenate(is_recalled).mean()),
        "density": float(holders.mean() / neighbours),
        "coverage": float(np.concatenate(is_covered).mean()),
    }


def classifier_score(probabilities: ArrayLike) -> float:
    """exp of the mutual information of example and class, in [1, classes].

    `probabilities` [n, classes], rows that sum to 1. With an Inception network it is the Inception
    score (T. Salimans et al., https://arxiv.org/abs/1606.03498, section 4).
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not len(p) or (p < 0).any() or not np.allclose(p.sum(1), 1, atol=1e-3):
        raise InputError(f"probabilities {list(p.shape)} must be [n, classes], rows summing to 1")
    marginal = p.mean(0)
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)
    score = np.exp((p * np.log(ratio)).sum(1).mean())
    return float(np.clip(score, 1, p.shape[1]))  # rounding leads out of it


def nearest_distances(real: ArrayLike, fake: ArrayLike) -> Array:
    """Returns the Euclidean distance [n] of each fake [n, d] to the nearest real example [m, d].

    Of pixels it shows memorization: fakes nearer to the training examples than other real ones are.
    Raises InputError for an empty set.
    """
    real, fake = _pair(real, fake, 1)
    square, found = np.sum(real**2, axis=1), []
    for part in _parts(fake):
        distance = square + np.sum(part**2, axis=1)[:, None] - 2 * part @ real.T
        found.append(distance.min(1).clip(0))
    return np.sqrt(np.concatenate(found))


def _parts(x: Array) -> list[Array]:
    """Rows in parts of at most 256: distances between all pairs would not fit into memory."""
    return np.array_split(x, -(-len(x) // 256))


def _pair(real: ArrayLike, fake: ArrayLike, least: int) -> tuple[Array, Array]:
    real, fake = (np.asarray(x, np.float64) for x in (real, fake))
    for name, x in (("real", real), ("fake", fake)):
        if x.ndim != 2 or len(x) < least:
            raise InputError(f"{name} features are {list(x.shape)}; [n >= {least}, d] is needed")
        if not np.isfinite(x).all():
            raise InputError(f"{name} features have values that are not finite")
    if real.shape[1] != fake.shape[1]:
        raise InputError(
            f"real features have {real.shape[1]} numbers, fake ones {fake.shape[1]}; they must "
            "come from one extractor"
        )
    return real, fake
