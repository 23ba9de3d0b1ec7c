"""Inpainting, inversion and interpolation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion import grids
from cvjax.diffusion.editing import invert, repaint, slerp
from cvjax.diffusion.process import FlowMatching, VariancePreserving, combine
from cvjax.diffusion.samplers import example_keys, heun, unipc
from cvjax.errors import InputError
from tests.diffusion.mixture import assert_is_mixture, exact, points

MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[0.5, 0.35], [0.35, 0.4]])


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def gaussian(process):
    """E[x_0 | x_t] of one Gaussian."""

    def denoise(x, t):
        alpha, sigma = process.alpha(t)[0], process.sigma(t)[0]
        total = alpha**2 * COVARIANCE + sigma**2 * np.eye(2)
        towards = jnp.linalg.solve(total, (x - alpha * MEAN).T).T
        return combine(process, process.prediction, MEAN + alpha * towards @ COVARIANCE,
                       sigma * towards, t)  # fmt: skip

    return denoise


def test_repaint_draws_from_the_conditional_and_keeps_what_is_known():
    process, count, value = FlowMatching(), 500, 0.9
    known = np.tile(np.float32([value, 77.0]), (count, 1))  # what is not known does not matter
    is_known, keys = np.array([True, False]), example_keys(jax.random.key(0), count)

    @functools.partial(jax.jit, static_argnames="repeats")
    def run(keys, known, repeats):
        return repaint(gaussian(process), process, keys, known, is_known, 100, repeats=repeats)

    x = np.asarray(run(keys, known, 8))
    np.testing.assert_array_equal(x[:, 0], np.float32(value))
    # p(x_1 given x_0): the regression of a Gaussian.
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    mean = MEAN[1] + slope * (value - MEAN[0])
    variance = COVARIANCE[1, 1] - slope * COVARIANCE[0, 1]
    # 4 standard errors of 500 draws are 0.07 and 25 %; the rest is for finite steps and repeats:
    # of 8,000 draws at 60 steps the mean is off by 0.023, the variance by 19 %; at 240 by 6 %.
    np.testing.assert_allclose(np.mean(x[:, 1]), mean, atol=0.07 + 0.03)
    np.testing.assert_allclose(np.var(x[:, 1]), variance, rtol=0.25 + 0.15)
    # Without repeats the known part counts too little.
    assert np.mean(np.asarray(run(keys, known, 1))[:, 1]) < mean - 0.1


def test_repaint_of_all_or_nothing():
    process = FlowMatching()
    known = normal(3, 2, 2, 1)
    denoise = lambda x, t: x  # noqa: E731
    keys = example_keys(jax.random.key(0), 3)
    run = jax.jit(lambda *of: repaint(denoise, process, *of, 3, repeats=2))
    whole = run(keys, known, np.ones((2, 2, 1), bool))
    np.testing.assert_array_equal(whole, known)
    half = np.arange(4).reshape(2, 2, 1) < 2
    part = np.asarray(run(keys, known, half))
    np.testing.assert_array_equal(part[:, 0], known[:, 0])
    turned = np.asarray(run(keys[::-1], known[::-1], half))
    np.testing.assert_allclose(turned[::-1], part, atol=1e-6)
    none = np.asarray(run(keys, known, np.zeros((3, 2, 2, 1), bool)))
    assert none.shape == known.shape and not np.any(none == known)
    for wrong, message in (
        (dict(repeats=0), "repeats is 0"),
        (dict(is_known=np.ones((2, 2, 1))), "it must be bool"),
        (dict(known=np.full((3, 2, 2, 1), 200, np.uint8)), r"known is uint8 \[3, 2, 2, 1\]"),
        (dict(known=np.zeros((2, 2, 2, 1), np.float32)), "for 3 keys"),
        (dict(is_known=np.ones((5, 3, 2, 2, 1), bool)), "broadcast to"),
        (dict(is_known=np.ones((3, 2, 2), bool)), r"bool \[3, 2, 2\]; it must"),
        (dict(steps=0), "steps is 0"),
    ):
        settings = dict(known=known, is_known=np.ones((2, 2, 1), bool), steps=2) | wrong
        with pytest.raises(InputError, match=message):
            repaint(denoise, process, keys, **settings)


@pytest.mark.parametrize(
    "process", [FlowMatching(), VariancePreserving("linear")], ids=lambda p: type(p).__name__
)
def test_inversion_and_back(process):
    x = points(500).astype(np.float32)
    keys = example_keys(jax.random.key(9), len(x))
    settings = dict(times=grids.log_snr)

    @functools.partial(jax.jit, static_argnames="steps")
    def there_and_back(steps):
        noise = invert(exact(process), process, x, steps, **settings)
        return noise, unipc(exact(process), process, keys, (2,), steps, start=noise, **settings)

    with pytest.raises(InputError, match="invert: x is int32; it must be floating"):
        invert(exact(process), process, np.int32(x), 5)
    noise, back = jax.device_get(there_and_back(128))
    away = np.linalg.norm(back - x, axis=-1)
    assert np.median(away) < 2e-4 and np.quantile(away, 0.95) < 2e-2
    # It is noise: 4 standard errors of 500 draws.
    scale = float(process.sigma(1.0))
    np.testing.assert_allclose(np.mean(noise, axis=0) / scale, 0, atol=0.18)
    np.testing.assert_allclose(np.cov(noise, rowvar=False) / scale**2, np.eye(2), atol=0.26)


def test_slerp():
    a, b = normal(2, 3, 32, 32, 3)
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, np.ones(3, np.float32)), b, atol=1e-6)
    middle = np.asarray(slerp(a, b, 0.5))
    norm = lambda x: np.linalg.norm(x.reshape(3, -1), axis=-1)  # noqa: E731
    np.testing.assert_allclose(norm(middle), norm(a), rtol=0.03)
    assert np.all(norm((a + b) / 2) < 0.75 * norm(a))
    np.testing.assert_allclose(slerp(a, a, 0.3), a, atol=1e-5)
    many = np.random.default_rng(0).standard_normal((500, 7)).astype(np.float32)
    np.testing.assert_allclose(slerp(many, many, 0.3), many, rtol=1e-3)
    # Nothing has no direction.
    np.testing.assert_array_equal(slerp(a, 0 * a, 0.0), a)
    np.testing.assert_allclose(slerp(0 * a, a, 0.25), 0.25 * a, atol=1e-6)
    # Without an angle the slope is that of a straight line.
    for b in (a, 2 * a, 0 * a):
        slopes = jax.grad(lambda a, b: jnp.sum(slerp(a, b, 0.25)), (0, 1))(a, b)
        for slope, expected in zip(slopes, (0.75, 0.25), strict=True):
            np.testing.assert_allclose(slope, expected, atol=1e-2)
    # A quarter of a right angle, on the circle.
    x, y = np.float32([[1.0, 0.0]]), np.float32([[0.0, 1.0]])
    angle = np.pi / 8
    np.testing.assert_allclose(slerp(x, y, 0.25)[0], [np.cos(angle), np.sin(angle)], atol=1e-6)


def test_interpolated_noise_makes_samples():
    """Noise between two draws of many numbers is a draw: what comes of it is the mixture."""
    process, count = FlowMatching(), 4000
    between = slerp(*normal(2, 1, count * 2), 0.4)
    keys = example_keys(jax.random.key(0), count)
    run = jax.jit(lambda start: heun(exact(process), process, keys, (2,), 32, start=start))
    bias = dict(weights=0.01, means=0.01, covariances=0.01)
    assert_is_mixture(run(between.reshape(count, 2)), bias)
