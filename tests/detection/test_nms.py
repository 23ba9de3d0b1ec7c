"""Suppression against loops over detections."""

import jax
import numpy as np
import pytest

from cvjax.detection import boxes as geometry
from cvjax.detection.nms import matrix_nms, nms, soft_nms


def scene(seed, count, ties=False):
    rng = np.random.default_rng(seed)
    low = rng.integers(-30, 30, (count, 2))
    box = np.concatenate([low, low + rng.integers(1, 30, (count, 2))], 1).astype(np.float32)
    score = rng.integers(0, 5, count) / 5 if ties else rng.uniform(0.05, 1, count)
    return box, score.astype(np.float32), rng.integers(0, 3, count), rng.random(count) < 0.9


overlaps = jax.jit(geometry.iou)


def brute(box, score, label, valid, threshold):
    overlap = np.asarray(overlaps(box, box))
    kept = []
    for i in sorted(np.flatnonzero(valid), key=lambda i: (-score[i], i)):
        if not any(label[i] == label[j] and overlap[i, j] > threshold for j in kept):
            kept.append(i)
    return kept


compiled = jax.jit(nms, static_argnames=("iou_threshold", "max_outputs"))


def fast(*scene, **settings):
    return jax.tree.map(np.asarray, compiled(*scene, **settings))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_nms_is_greedy(seed, ties):
    box, score, label, valid = scene(seed, 60, ties)
    expected = brute(box, score, label, valid, 0.25)
    kept = fast(box, score, label, valid, iou_threshold=0.25, max_outputs=70)
    assert list(kept.index[kept.valid]) == expected
    np.testing.assert_array_equal(kept.scores[: len(expected)], score[expected])
    assert not kept.valid[len(expected) :].any() and not kept.index[len(expected) :].any()
    few = fast(box, score, label, valid, iou_threshold=0.25, max_outputs=4)
    assert list(few.index) == expected[:4]


def test_the_threshold_is_strict_and_garbage_changes_nothing():
    box = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.1]], np.float32)
    score = np.array([0.9, 0.8, 0.7], np.float32)
    kept = fast(box, score, iou_threshold=0.5, max_outputs=3)
    np.testing.assert_array_equal(kept.valid, [True, True, False])
    box, score, label, _ = scene(0, 20)
    valid = np.arange(20) < 12
    clean = fast(box, score, label, valid, iou_threshold=0.3, max_outputs=20)
    for junk in (np.nan, np.inf, -np.inf):
        box[12:], score[12:] = junk, junk
        dirty = fast(box, score, label, valid, iou_threshold=0.3, max_outputs=20)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    many = jax.vmap(lambda b: compiled(b, score, label, valid, iou_threshold=0.3, max_outputs=20))
    found = np.asarray(jax.jit(many)(np.stack([box, box])).index)
    np.testing.assert_array_equal(found[1], clean.index)
    assert not fast(box[:0], score[:0], iou_threshold=0.3, max_outputs=2).valid.any()
    nobody = fast(box, score, label, valid & False, iou_threshold=0.3, max_outputs=20)
    assert not nobody.valid.any()


@pytest.mark.parametrize("sigma", [0.5, None])
def test_soft_nms(sigma):
    box, score, label, valid = scene(3, 40)
    overlap, left, expected = np.asarray(overlaps(box, box)), score * valid, []
    while left.max() >= 0.1:
        i = int(left.argmax())
        expected.append((i, left[i]))
        factor = np.exp(-(overlap[i] ** 2) / sigma) if sigma else np.where(
            overlap[i] >= 0.3, 1 - overlap[i], 1
        )  # fmt: skip
        left = np.where(label == label[i], left * factor, left)
        left[i] = 0
    settings = dict(sigma=sigma, min_score=0.1, max_outputs=40)
    kept = jax.jit(lambda *scene: soft_nms(*scene, **settings))(box, score, label, valid)
    kept = jax.tree.map(np.asarray, kept)
    assert list(kept.index[kept.valid]) == [i for i, _ in expected]
    np.testing.assert_allclose(kept.scores[kept.valid], [s for _, s in expected], rtol=1e-5)


soft = jax.jit(soft_nms, static_argnames=("sigma", "iou_threshold", "min_score", "max_outputs"))


def test_soft_nms_at_its_borders():
    twins = np.float32([[0, 0, 10, 10], [0, 0, 10, 5]])  # an IoU of exactly 1 / 2
    kept = soft(twins, np.float32([1, 0.5]), sigma=None, iou_threshold=0.5, min_score=0.25,
                max_outputs=2)  # fmt: skip
    assert kept.valid.tolist() == [True, True] and kept.scores.tolist() == [1, 0.25]
    apart = np.float32([[0, 0, 1, 1], [5, 5, 6, 6], [9, 9, 10, 10]])
    for scores, valid in (([0.5, 0.25, 0.2], [True, True, False]), ([0.2, 0.1, 0.2], [False] * 3)):
        kept = soft(apart, np.float32(scores), min_score=0.25, max_outputs=3)
        assert kept.valid.tolist() == valid


def test_a_box_of_nan_lowers_nobody_softly():
    box = np.float32([[np.nan] * 4, [0, 0, 9, 9], [50, 50, 60, 60]])
    kept = soft(box, np.float32([0.9, 0.8, 0.7]), min_score=0.25, max_outputs=3)
    np.testing.assert_allclose(kept.scores, [0.9, 0.8, 0.7])


matrix = jax.jit(matrix_nms, static_argnames=("sigma", "max_outputs"))


def ranked(*scene, **settings):
    return jax.tree.map(np.asarray, matrix(*scene, **settings))


@pytest.mark.parametrize("sigma", [2.0, None])
def test_matrix_nms(sigma):
    box, score, label, valid = scene(4, 30)
    overlap = np.asarray(overlaps(box, box))
    better = {
        j: [i for i in range(30) if valid[i] and score[i] > score[j] and label[i] == label[j]]
        for j in np.flatnonzero(valid)
    }
    f = (lambda v: np.exp(-sigma * v**2)) if sigma else (lambda v: 1 - v)
    worst = {j: max((overlap[i, j] for i in better[j]), default=0.0) for j in better}
    expected = np.zeros(30)
    for j in better:
        factors = [f(overlap[i, j]) / f(worst[i]) for i in better[j]]
        expected[j] = score[j] * min([1.0, *factors])
    kept = ranked(overlap, score, label, valid, sigma=sigma, max_outputs=35)
    assert kept.valid.sum() == valid.sum()
    index = kept.index[kept.valid]
    np.testing.assert_allclose(kept.scores[kept.valid], expected[index], rtol=1e-5)
    assert (np.diff(kept.scores) <= 0).all()
    junk = np.where(valid[:, None] & valid, overlap, np.nan)
    again = ranked(junk, score, label, valid, sigma=sigma, max_outputs=35)
    jax.tree.map(np.testing.assert_array_equal, kept, again)


@pytest.mark.parametrize("sigma", [2.0, None])
def test_matrix_nms_of_overlaps_and_scores_without_a_value(sigma):
    """What is not valid stands last, and an overlap of NaN (0 / 0, say) is none."""
    overlap = np.array([[1, 1, 0], [1, 1, 0], [0, 0, np.nan]], np.float32)
    scores = np.array([np.inf, np.inf, 0.5], np.float32)
    kept = ranked(overlap, scores, max_outputs=3, sigma=sigma)
    # Without a width of the Gaussian a copy has nothing left.
    order, expected = ([0, 1, 2], [np.inf, np.inf, 0.5]) if sigma else ([0, 2, 1], [np.inf, 0.5, 0])
    assert kept.valid.all() and kept.index.tolist() == order
    np.testing.assert_array_equal(kept.scores, expected)
    overlap, scores = np.full((3, 3), np.nan, np.float32), np.float32([np.nan, 0.3, 0.9])
    kept = ranked(overlap, scores, max_outputs=3, sigma=sigma)
    assert kept.valid.tolist() == [True, True, False] and kept.index.tolist() == [2, 1, 0]
    np.testing.assert_allclose(kept.scores, [0.9, 0.3, 0])
