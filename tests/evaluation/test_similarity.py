"""Figures of two images, by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.evaluation.similarity import psnr, ssim


def test_figures_by_their_definitions():
    a, b = np.random.default_rng(0).random((2, 3, 12, 12, 1), np.float32)
    expected = [
        10 * np.log10(1 / np.mean((np.float64(x) - y) ** 2)) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-5)
    np.testing.assert_allclose(psnr(a, a), 100.0)
    np.testing.assert_array_equal(jax.grad(lambda x: psnr(x, a).sum())(a), 0)
    half = a.astype(np.float16)  # in which 1e-10 is 0
    np.testing.assert_allclose(psnr(half, half), 100.0)
    np.testing.assert_array_equal(jax.grad(lambda x: psnr(x, half).sum())(jnp.asarray(half)), 0)
    for figure in (psnr, ssim):
        with pytest.raises(InputError, match="they must be alike"):
            figure(a, a[:1])
    for figure in (psnr, ssim):
        for wrong, message in (
            (255 * a, "from .* in .0, 1."),
            ((255 * a).astype(np.uint8), "uint8"),
        ):
            with pytest.raises(InputError, match=message):
                figure(wrong, b)
    # One window of 11 x 11 at four places of a 12 x 12 image, by the definition.
    x, y = np.float64(a)[..., 0], np.float64(b)[..., 0]
    g = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    values = []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        p, q = x[:, i : i + 11, j : j + 11], y[:, i : i + 11, j : j + 11]
        mean = lambda v: (window * v).sum((1, 2))  # noqa: E731
        mp, mq = mean(p), mean(q)
        vp, vq, cov = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
        one, two = 2 * mp * mq + 1e-4, 2 * cov + 9e-4
        values.append(one * two / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    similar = jax.jit(ssim)
    np.testing.assert_allclose(similar(a, b), np.mean(values, axis=0), atol=1e-5)
    np.testing.assert_allclose(similar(a, a), 1.0, atol=1e-6)
    assert jax.eval_shape(ssim, a[:, :4, :4], b[:, :4, :4]).shape == (3,)
