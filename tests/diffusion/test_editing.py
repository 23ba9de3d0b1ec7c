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
from tests.diffusion.mixture import exact, points

MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[0.5, 0.35], [0.35, 0.4]])


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
    known = jnp.full((count, 2), value).at[:, 1].set(77.0)  # what is not known does not matter
    is_known, keys = jnp.array([True, False]), example_keys(jax.random.key(0), count)

    @functools.partial(jax.jit, static_argnames="repeats")
    def run(keys, known, repeats):
        return repaint(gaussian(process), process, keys, known, is_known, 100, repeats=repeats)

    x = run(keys, known, 8)
    np.testing.assert_array_equal(x[:, 0], np.float32(value))
    # p(x_1 given x_0): the regression of a Gaussian.
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    mean = MEAN[1] + slope * (value - MEAN[0])
    variance = COVARIANCE[1, 1] - slope * COVARIANCE[0, 1]
    # 4 standard errors of 500 draws are 0.07 and 25 %; the rest is for finite steps and repeats:
    # of 8,000 draws at 60 steps the mean is off by 0.023, the variance by 19 %; at 240 by 6 %.
    np.testing.assert_allclose(jnp.mean(x[:, 1]), mean, atol=0.07 + 0.03)
    np.testing.assert_allclose(jnp.var(x[:, 1]), variance, rtol=0.25 + 0.15)
    # Without repeats the known part counts too little.
    assert jnp.mean(run(keys, known, 1)[:, 1]) < mean - 0.1


def test_repaint_of_all_or_nothing():
    process = FlowMatching()
    known = jax.random.normal(jax.random.key(1), (3, 2, 2, 1))
    denoise = lambda x, t: x  # noqa: E731
    keys = example_keys(jax.random.key(0), 3)
    whole = repaint(denoise, process, keys, known, jnp.ones((2, 2, 1), bool), 3, repeats=2)
    np.testing.assert_array_equal(whole, known)
    half = jnp.arange(4).reshape(2, 2, 1) < 2
    part = jax.jit(lambda *of: repaint(denoise, process, *of, half, 3, repeats=2))
    np.testing.assert_array_equal(part(keys, known)[:, 0], known[:, 0])
    np.testing.assert_allclose(part(keys[::-1], known[::-1])[::-1], part(keys, known), atol=1e-6)
    none = repaint(denoise, process, keys, known, jnp.zeros((3, 2, 2, 1), bool), 3, repeats=2)
    assert none.shape == known.shape and not jnp.any(none == known)
    for wrong, message in (
        (dict(repeats=0), "repeats is 0"),
        (dict(is_known=jnp.ones((2, 2, 1))), "it must be bool"),
        (dict(is_known=jnp.ones((5, 3, 2, 2, 1), bool)), "broadcast to"),
        (dict(is_known=jnp.ones((3, 2, 2), bool)), r"bool \[3, 2, 2\]; it must"),
        (dict(steps=0), "steps is 0"),
    ):
        settings = dict(is_known=jnp.ones((2, 2, 1), bool), steps=2) | wrong
        with pytest.raises(InputError, match=message):
            repaint(denoise, process, keys, known, **settings)


@pytest.mark.parametrize(
    "process", [FlowMatching(), VariancePreserving("linear")], ids=lambda p: type(p).__name__
)
def test_inversion_and_back(process):
    x = jnp.asarray(points(500), jnp.float32)
    keys = example_keys(jax.random.key(9), len(x))
    settings = dict(times=grids.log_snr)

    @functools.partial(jax.jit, static_argnames="steps")
    def there_and_back(steps):
        noise = invert(exact(process), process, x, steps, **settings)
        return noise, unipc(exact(process), process, keys, (2,), steps, start=noise, **settings)

    noise, back = there_and_back(128)
    away = jnp.linalg.norm(back - x, axis=-1)
    assert jnp.median(away) < 2e-3 and jnp.quantile(away, 0.95) < 2e-2
    # It is noise: 4 standard errors of 500 draws.
    scale = process.sigma(jnp.ones(()))
    np.testing.assert_allclose(jnp.mean(noise, axis=0) / scale, 0, atol=0.18)
    np.testing.assert_allclose(jnp.cov(noise, rowvar=False) / scale**2, np.eye(2), atol=0.26)


def test_slerp():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 32, 32, 3))
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, jnp.ones(3)), b, atol=1e-6)
    middle = slerp(a, b, 0.5)
    norm = lambda x: jnp.linalg.norm(x.reshape(3, -1), axis=-1)  # noqa: E731
    np.testing.assert_allclose(norm(middle), norm(a), rtol=0.03)
    assert jnp.all(norm((a + b) / 2) < 0.75 * norm(a))
    np.testing.assert_allclose(slerp(a, a, 0.3), a, atol=1e-5)
    # A quarter of a right angle, on the circle.
    x, y = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    angle = np.pi / 8
    np.testing.assert_allclose(slerp(x, y, 0.25)[0], [np.cos(angle), np.sin(angle)], atol=1e-6)


def test_interpolated_noise_makes_samples():
    process = FlowMatching()
    noise = jax.random.normal(jax.random.key(0), (2, 2))
    between = slerp(noise[:1], noise[1:], 0.5)
    keys = example_keys(jax.random.key(0), 1)
    run = jax.jit(lambda start: heun(exact(process), process, keys, (2,), 12, start=start))
    assert jnp.all(jnp.isfinite(run(between)))
