"""Losses against their formulas in float64, and at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection import losses
from cvjax.errors import InputError

X = np.random.default_rng(0).normal(size=12) * 3
P = 1 / (1 + np.exp(-X))
T = (np.arange(12) % 3 == 0).astype(float)
Q = np.where(T > 0, np.linspace(0.1, 1, 12), 0)


def entropy(target):
    return -target * np.log(P) - (1 - target) * np.log(1 - P)


@pytest.mark.parametrize("loss, target, expected", [
    (losses.sigmoid_focal, T, np.where(T > 0, 0.25, 0.75)
        * (1 - np.where(T > 0, P, 1 - P)) ** 2 * entropy(T)),
    (losses.quality_focal, Q, np.abs(Q - P) ** 2 * entropy(Q)),
    (losses.varifocal, Q, np.where(Q > 0, Q, 0.75 * P**2) * entropy(Q)),
    (losses.binary_cross_entropy, Q, entropy(Q)),
])  # fmt: skip
def test_of_logits(loss, target, expected):
    np.testing.assert_allclose(jax.jit(loss)(X, target), expected, rtol=1e-4, atol=1e-6)
    for t in (0.0, 0.5, 1.0):
        edge = jnp.array([-1e30, -100, 0, 100, 1e30])
        assert np.isfinite(loss(edge, jnp.full(5, t))).all()
        assert np.isfinite(jax.grad(lambda x: loss(x, jnp.full(5, t)).sum())(edge)).all()  # noqa: B023


def test_distribution_focal():
    logits = np.random.default_rng(1).normal(size=(2, 5))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = losses.distribution_focal(logits, np.array([1.25, 4.0]))
    expected = [-0.75 * log_p[0, 1] - 0.25 * log_p[0, 2], -log_p[1, 4]]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_of_boxes():
    d = np.array([-3, -0.1, 0, 0.05, 2, 1e30], np.float32)
    out = losses.smooth_l1(d, 0 * d, beta=0.5)
    np.testing.assert_allclose(out, [2.75, 0.01, 0, 0.0025, 1.75, 1e30], rtol=1e-6)
    np.testing.assert_array_equal(losses.smooth_l1(d, 0 * d, beta=0), np.abs(d))
    box = jnp.array([[0, 0, 4, 2], [1, 1, 1, 1]], jnp.float32)
    for loss in (losses.iou_loss, losses.giou_loss, losses.diou_loss, losses.ciou_loss):
        np.testing.assert_allclose(loss(box, box), [0, 1], atol=1e-6)
        assert np.isfinite(jax.grad(lambda b: loss(b, box).sum())(box)).all()  # noqa: B023
    half = losses.iou_loss(box[:1], jnp.array([[0, 0, 2, 2.0]]))
    np.testing.assert_allclose(half, [0.5])
    out = losses.centerness(jnp.array([[1, 2, 4, 2], [-1, 1, 1, 1], [0, 0, 0, 0]]))
    np.testing.assert_allclose(out, [0.5, 0, 0])


def test_normalized():
    loss = jnp.array([[1, 2, np.nan], [4, np.inf, np.nan]])
    weight = jnp.array([[1, 1, 0], [0.5, 0, 0]])
    count = jnp.array([[True, True, False], [False] * 3])
    assert losses.normalized(loss, weight, count) == 5 / 2
    assert losses.normalized(loss, weight, count, by="image") == (3 / 2 + 2 / 1) / 2
    assert losses.normalized(loss, 0 * weight, 0 * count) == 0
    gradient = jax.grad(lambda v: losses.normalized(v, weight, count))(loss)
    np.testing.assert_array_equal(gradient, weight / 2)
    with pytest.raises(InputError, match="batch"):
        losses.normalized(loss, weight, count, by="btch")
