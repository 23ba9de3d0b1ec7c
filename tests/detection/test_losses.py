"""Losses against their formulas in float64, and at their edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection import boxes, losses
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
    edge, t = map(np.ravel, np.meshgrid(np.float32([-1e30, -100, 0, 100, 1e30]), [0, 0.5, 1]))
    slopes = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes(edge, np.float32(t))))


def test_distribution_focal():
    logits = np.random.default_rng(1).normal(size=(2, 5))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = jax.jit(losses.distribution_focal)(logits, np.array([1.25, 4.0]))
    expected = [-0.75 * log_p[0, 1] - 0.25 * log_p[0, 2], -log_p[1, 4]]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    beyond, ends = (
        jax.jit(losses.distribution_focal)(logits, np.array(at)) for at in ([-2.0, 9.0], [0.0, 4.0])
    )
    np.testing.assert_allclose(beyond, ends)


def test_the_focal_loss_of_an_easy_example_does_not_cancel():
    x, p = np.float32([-12.0]), 1 / (1 + np.exp(12.0))
    focal = jax.jit(losses.sigmoid_focal, static_argnames="alpha")
    for found, weight in ((focal(x, 0 * x), 0.75), (focal(x, 0 * x, alpha=None), 1)):
        np.testing.assert_allclose(found, weight * p**2 * -np.log1p(-p), rtol=1e-4)


def test_of_boxes():
    d = np.array([-3, -0.1, 0, 0.05, 2, 1e30], np.float32)
    smooth = jax.jit(losses.smooth_l1, static_argnames="beta")
    out = smooth(d, 0 * d, beta=0.5)
    np.testing.assert_allclose(out, [2.75, 0.01, 0, 0.0025, 1.75, 1e30], rtol=1e-6)
    np.testing.assert_array_equal(smooth(d, 0 * d, beta=0), np.abs(d))
    box = np.array([[0, 0, 4, 2], [1, 1, 1, 1]], np.float32)
    every = (losses.iou_loss, losses.giou_loss, losses.diou_loss, losses.ciou_loss)
    of_all = lambda b: jnp.stack([loss(b, box) for loss in every])  # noqa: E731
    values, slopes = jax.jit(lambda b: (of_all(b), jax.jacrev(lambda b: of_all(b).sum(1))(b)))(box)
    np.testing.assert_allclose(values, [[0, 1]] * 4, atol=1e-6)
    assert np.isfinite(slopes).all()
    half = jax.jit(losses.iou_loss)(box[:1], np.float32([[0, 0, 2, 2]]))
    np.testing.assert_allclose(half, [0.5])
    sides = np.array([[1, 2, 4, 2], [-1, 1, 1, 1], [0, 0, 0, 0]])
    out = jax.jit(losses.centerness)(sides)
    np.testing.assert_allclose(out, [0.5, 0, 0])
    slope = jax.jit(jax.grad(losses.centerness))(np.float32([1, 2, 4, 3]))
    assert not slope.any()


@jax.jit
def of_one_pair(a, b):
    kinds = ("iou", "giou", "diou", "ciou")
    found = [getattr(losses, f"{kind}_loss")(a, b) for kind in kinds]
    return found, [1 - getattr(boxes, f"paired_{kind}")(a, b) for kind in kinds]


def test_each_loss_is_of_its_own_overlap():
    """Of two boxes that overlap in part and are of other shapes the four differ."""
    found, expected = of_one_pair(np.float32([2, 3, 12, 9]), np.float32([4, 1, 11, 13]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(np.unique(np.round(found, 3))) == 4


LOSS = np.array([[1, 2, np.nan], [4, np.inf, np.nan], [np.nan, 3, 3]], np.float32)
WEIGHT = np.array([[1, 1, 0], [0.5, 0, 0], [1, 1, 1]], np.float32)
COUNT = np.array([[True, True, False], [False] * 3, [True] * 3])
VALID = np.array([True, True, False])


@pytest.mark.parametrize("by, expected, slope", [
    ("image", (3 / 2 + 2 / 1) / 2, WEIGHT[:2] / [[4], [2]]),
    ("batch", 5 / 2, WEIGHT[:2] / 2),
    ("global", 5 / 2, WEIGHT[:2] / 2),
])  # fmt: skip
def test_normalized_by_hand(by, expected, slope):
    whole = jax.jit(lambda *given: losses.normalized(*given, by=by))
    assert whole(LOSS[:2], WEIGHT[:2], COUNT[:2]) == expected
    assert whole(LOSS, 0 * WEIGHT, 0 * COUNT) == 0
    if by != "image":  # less than one counts as one
        few = np.float32([[0.25, 0, 0], [0] * 3])
        assert whole(np.ones_like(few), np.ones_like(few), few) == 6
    masked = jax.jit(jax.value_and_grad(functools.partial(losses.normalized, by=by)))
    value, gradient = jax.device_get(masked(LOSS, WEIGHT, COUNT, VALID))
    assert value == expected
    assert masked(LOSS, WEIGHT, COUNT, ~VALID & VALID)[0] == 0
    np.testing.assert_array_equal(gradient[:2], slope)
    assert not gradient[2].any()


def test_normalized_over_devices():
    """Under pmap the mean over devices is that of the whole batch, whoever has the foreground."""
    rng = np.random.default_rng(0)
    loss, count = rng.normal(size=(4, 3, 5)).astype("f"), rng.random((4, 3, 5)) < 0.4
    loss[0] += 3  # the devices differ
    count[1], valid = False, rng.random((4, 3)) < 0.7

    @functools.cache
    def mean(by):
        one = lambda *rows: jax.lax.pmean(  # noqa: E731
            losses.normalized(rows[0], rows[1], rows[1], rows[2], by=by), "data"
        )
        return float(jax.pmap(one, axis_name="data", devices=jax.devices()[:4])(
            loss, count, valid)[0])  # fmt: skip

    merged = [x.reshape(12, *x.shape[2:]) for x in (loss, count, count, valid)]
    normalized = jax.jit(losses.normalized, static_argnames="by")
    whole = normalized(*merged, by="batch")
    assert whole == normalized(*merged, by="global")
    np.testing.assert_allclose(mean("global"), whole, rtol=1e-6)
    each = [normalized(a, c, c, v, by="batch") for a, c, v in zip(loss, count, valid)]  # noqa: B905
    np.testing.assert_allclose(mean("batch"), np.mean(each), rtol=1e-6)
    assert abs(mean("batch") - whole) > 1e-2


def test_another_normalizer():
    with pytest.raises(InputError, match="'btch'; it can be 'image', 'batch', 'global'"):
        losses.normalized(LOSS, WEIGHT, COUNT, by="btch")
