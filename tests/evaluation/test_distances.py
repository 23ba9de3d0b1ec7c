"""The distances against closed forms, scipy and loops."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from cvjax.errors import InputError
from cvjax.evaluation import (
    classifier_score,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)


def sets(n=60, m=45, d=4, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mix, rng.normal(size=(m, d)) * np.arange(1, d + 1) + 0.5


def test_frechet_distance_is_that_of_sqrtm():
    real, fake = sets()
    one, two = np.cov(real.T), np.cov(fake.T)
    root = scipy.linalg.sqrtm(one @ two).real
    expected = np.sum((real.mean(0) - fake.mean(0)) ** 2) + np.trace(one + two - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_in_closed_form():
    x = np.random.default_rng(1).normal(size=(50, 3))
    # The same shape, moved: the distance between the means; scaled by 3: (3 - 1)^2 tr(cov).
    assert frechet_distance(x, x + np.array([1, 2, 2])) == pytest.approx(9.0)
    x -= x.mean(0)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * np.trace(np.cov(x.T)))
    few = np.random.default_rng(2).normal(size=(5, 64))  # singular
    for same in (x, few, 1e6 * few, 0 * few):
        scale = np.var(same, axis=0).sum()
        assert 0 <= frechet_distance(same, same[::-1]) <= 1e-12 * scale
    assert frechet_distance(few, few + 1) == pytest.approx(64, rel=1e-12)
    assert frechet_distance([[0.0], [2.0]], [[1.0], [1.0]]) == pytest.approx(2.0)


def test_kernel_distance_by_loops():
    real, fake = sets(7, 5)
    kernel = lambda x, y: (np.dot(x, y) / 4 + 1) ** 3  # noqa: E731
    within = lambda x: np.mean(  # noqa: E731
        [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    )
    expected = within(real) + within(fake) - 2 * np.mean([kernel(a, b) for a in real for b in fake])
    assert kernel_distance(real, fake) == pytest.approx(expected)


def test_kernel_distance_is_unbiased():
    rng = np.random.default_rng(3)
    values = [kernel_distance(rng.normal(size=(10, 2)), rng.normal(size=(10, 2))) for _ in range(2000)]  # fmt: skip  # noqa: E501
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_precision_recall_density_coverage_by_loops():
    real, fake = sets(20, 15, 2)
    k = 3
    radius = lambda x: [sorted(np.linalg.norm(x - row, axis=1))[k] for row in x]  # noqa: E731
    inside = np.array(
        [[np.linalg.norm(r - f) <= radius_r for f in fake] for r, radius_r in zip(real, radius(real), strict=True)]  # noqa: E501
    )  # fmt: skip
    recalled = [
        any(np.linalg.norm(r - f) <= size for f, size in zip(fake, radius(fake), strict=True))
        for r in real
    ]
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(
        {
            "precision": np.mean([any(column) for column in inside.T]),
            "recall": np.mean(recalled),
            "density": inside.sum() / (k * len(fake)),
            "coverage": np.mean([any(row) for row in inside]),
        }
    )


def test_sets_of_several_parts():
    """Pairs are looked at in parts; ties and copies lie on the borders of balls."""
    rng = np.random.default_rng(4)
    real, fake = rng.integers(0, 6, (300, 3)), rng.integers(1, 7, (270, 3))
    distance = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1)  # noqa: E731
    sizes = [np.sort(distance(x, x), axis=1)[:, 2] for x in (real, fake)]
    in_real, in_fake = distance(real, fake) <= sizes[0][:, None], distance(real, fake) <= sizes[1]
    assert precision_recall_density_coverage(real, fake, 2) == pytest.approx(
        {
            "precision": in_real.any(0).mean(),
            "recall": in_fake.any(1).mean(),
            "density": in_real.sum(0).mean() / 2,
            "coverage": in_real.any(1).mean(),
        }
    )
    kernel = lambda x, y: (x @ y.T / 3 + 1.0) ** 3  # noqa: E731
    within = [(kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
              for x in (real, fake)]  # fmt: skip
    expected = sum(within) - 2 * kernel(real, fake).mean()
    assert kernel_distance(real, fake) == pytest.approx(expected)


def test_many_examples_fit_into_memory():
    """All pairs of them at once would be 3 x 128 MB."""
    x = np.random.default_rng(5).normal(size=(4000, 2))
    tracemalloc.start()
    precision_recall_density_coverage(x, x + 0.01)
    kernel_distance(x, x + 0.01)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


def test_far_away_and_collapsed():
    real, _ = sets()
    assert set(precision_recall_density_coverage(real, real + 1e3).values()) == {0.0}
    found = precision_recall_density_coverage(real, np.repeat(real[:1], 20, 0) + 1e-9)
    assert found["precision"] == 1 and found["recall"] == 0 and found["coverage"] < 0.5


def test_classifier_score():
    assert classifier_score(np.eye(10)) == pytest.approx(10)
    assert all(classifier_score(np.eye(classes)) <= classes for classes in range(1, 30))
    assert classifier_score(np.full((5, 10), 0.1)) == pytest.approx(1)
    assert classifier_score(np.eye(10)[[3, 3, 3]]) == pytest.approx(1)  # one class only
    p = np.array([[0.5, 0.5], [0.9, 0.1]])
    expected = np.exp(np.mean(np.sum(p * np.log(p / [0.7, 0.3]), 1)))
    assert classifier_score(p) == pytest.approx(expected)


def test_what_cannot_be_is_said():
    real, fake = sets()
    with pytest.raises(InputError, match=r"fake features are \[1, 4\]"):
        frechet_distance(real, fake[:1])
    with pytest.raises(InputError, match="they must come from one extractor"):
        kernel_distance(real, fake[:, :3])
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(real * np.nan, fake)
    with pytest.raises(InputError, match=r"n >= 6, d"):
        precision_recall_density_coverage(real, fake[:5])
    with pytest.raises(InputError, match="neighbours is 0"):
        precision_recall_density_coverage(real, fake, 0)
    with pytest.raises(InputError, match="rows summing to 1"):
        classifier_score([[0.2, 0.2]])
