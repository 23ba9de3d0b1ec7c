"""The likelihood of a mixture by the ODE and by the bound, against its closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion.likelihood import (
    bits_per_dimension,
    dequantize,
    exact_divergence,
    hutchinson,
    ode_log_likelihood,
    vlb,
)
from cvjax.diffusion.process import (
    EDM,
    FlowMatching,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    combine,
)
from cvjax.diffusion.samplers import example_keys
from cvjax.errors import InputError
from tests.diffusion.mixture import exact, log_density, points

PROCESSES = [
    VariancePreserving("cosine"),
    VariancePreserving("linear", "eps"),
    SubVariancePreserving(),
    FlowMatching(),
    VarianceExploding(),
    EDM(),
]
X = points(400)
POINTS = np.asarray(X, np.float32)


def closed_form(process):
    """log p of the mixture blurred by what noise is left at t = 0."""
    left = float(process.sigma(0.0) / process.alpha(0.0))
    return np.asarray(log_density(POINTS, 1.0, left))


@pytest.fixture(scope="module")
def keys():
    return example_keys(jax.random.key(0), len(X))


@functools.partial(jax.jit, static_argnames=("process", "steps", "divergence"))
def by_ode(process, keys, steps=96, divergence=exact_divergence, x=POINTS):
    return ode_log_likelihood(
        exact(process), process, jnp.asarray(x), keys, steps, divergence=divergence
    )


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_ode_is_the_closed_form(process, keys):
    found = by_ode(process, keys)
    difference = np.asarray(found) - closed_form(process)
    assert abs(difference.mean()) < 2e-3, difference.mean()
    assert np.median(np.abs(difference)) < 5e-3
    # And nearly the mixture itself, which the noise at t = 0 blurs no more than this.
    sharp = np.asarray(log_density(POINTS))
    assert abs((np.asarray(found) - sharp).mean()) < 2e-3 + 1e-2 * ("linear" in str(process))


def test_hutchinson_is_right_on_average(keys):
    process = FlowMatching()
    found = np.asarray(by_ode(process, keys, 48, hutchinson))
    difference = found - np.asarray(by_ode(process, keys, 48))
    error = difference.std() / np.sqrt(len(X))
    assert difference.std() > 1e-2 and abs(difference.mean()) < 4 * error
    # Of a linear field: the trace, exact where it is diagonal, else on average over the signs.
    matrix = np.array([[2.0, 1.0], [0.5, -0.7]], np.float32)
    x, field = np.ones((4000, 2), np.float32), lambda x: x @ matrix.T

    @jax.jit
    def both():
        rngs = example_keys(jax.random.key(0), 4000)
        return exact_divergence(field, x, None), hutchinson(field, x, rngs)[1]

    (value, exactly), roughly = jax.device_get(both())
    np.testing.assert_allclose(value, x @ matrix.T)
    np.testing.assert_allclose(exactly, 1.3, rtol=1e-6)
    np.testing.assert_allclose(np.unique(np.round(roughly, 4)), [-0.2, 2.8])  # 1.3 +- 1.5
    np.testing.assert_allclose(roughly.mean(), 1.3, atol=4 * 1.5 / np.sqrt(4000))


@functools.partial(jax.jit, static_argnames=("process", "steps", "wrong"))
def bound(process, keys, steps=64, wrong=0.0, x=POINTS):
    denoise = lambda x, t: (1 - wrong) * exact(process)(x, t)  # noqa: E731
    return vlb(denoise, process, jnp.asarray(x), keys, steps)


@pytest.mark.parametrize("process", [FlowMatching(), EDM()], ids=lambda p: type(p).__name__)
def test_bound_is_tight_for_the_exact_denoiser_and_lower_for_a_worse_one(process, keys):
    fold = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))

    def mean_and_error(keys, wrong):
        """Of its difference from the truth, over 16 draws of each point's noise."""
        runs = [bound(process, fold(keys, k), wrong=wrong) for k in range(16)]
        away = np.stack(runs) - closed_form(process)
        means = away.mean(axis=0)
        return means.mean(), means.std() / np.sqrt(len(X))

    # The bound of one point may be above its own log p, but with the exact denoiser the mean over
    # points of the mixture is at most that of log p; these 400 points are a sample of them.
    mean, error = mean_and_error(keys, 0.0)
    assert abs(mean) < 4 * error + 5e-3, (mean, error)
    assert error < 0.05
    worse, error = mean_and_error(keys, 0.3)
    assert worse < mean - 4 * error
    few = bound(process, keys, steps=8)  # unbiased, but of a larger spread
    assert np.std(few) > np.std(bound(process, keys, steps=64))


def test_rows_do_not_see_each_other(keys):
    process, x = FlowMatching(), POINTS
    for function in (functools.partial(by_ode, divergence=hutchinson, steps=8), bound):
        whole = function(process, keys, x=x)
        np.testing.assert_allclose(
            np.asarray(function(process, keys[::-1], x=x[::-1]))[::-1], whole, rtol=1e-3
        )


def test_offsets():
    # Uniform noise in [-1, 1) is 8 bits a pixel: its density is 1 / 2 for each number.
    density = np.full(3, -12 * np.log(2.0), np.float32)
    np.testing.assert_allclose(bits_per_dimension(density, 12), 8, rtol=1e-6)
    np.testing.assert_allclose(
        bits_per_dimension(np.zeros(3, np.float32), 12, width=1.0), 8, rtol=1e-6
    )
    # One grey level for certain: no bits.
    certain = np.float32(12 * np.log(128.0))
    np.testing.assert_allclose(bits_per_dimension(certain, 12), 0, atol=1e-6)


def test_the_bound_of_one_step_is_right_on_average():
    """Of a denoiser that says 0: (1/low^2 - 1/high^2) / 2 more than the decoder and the prior."""
    process, n = EDM(sigma_max=2.0), 20_000
    run = jax.jit(lambda keys: vlb(lambda x, t: 0 * x, process, jnp.ones((n, 1)), keys, 1))
    found = run(example_keys(jax.random.key(0), n))
    low, high = (float(process.sigma(t)) for t in (0.0, 1.0))
    decoder = -0.5 * (1 + np.log(2 * np.pi * low**2))
    lost = decoder - float(np.mean(np.asarray(found, np.float64)))
    np.testing.assert_allclose(lost, (low**-2 - high**-2) / 2 + high**-2 / 2, rtol=0.1)


def test_the_bound_pays_for_what_is_left_of_the_image_at_the_end():
    process, x = EDM(sigma_max=2.0), jnp.full((2, 3), 5.0)
    run = jax.jit(lambda keys: vlb(lambda noisy, t: x, process, x, keys, 4))
    found = run(example_keys(jax.random.key(0), 2))
    decoder = -1.5 * (1 + np.log(2 * np.pi) + 2 * np.log(float(process.sigma(0.0))))
    np.testing.assert_allclose(found, decoder - 3 * 25 / (2 * 4), rtol=1e-3)


def test_ode_of_many_numbers():
    """An error of each in log alpha is 256 times as large in their sum."""
    process, numbers = FlowMatching(), 256

    def denoise(x, t):
        a, s = process.alpha(t)[:, None], process.sigma(t)[:, None]
        total = a**2 + s**2
        return combine(process, "velocity", a * x / total, s * x / total, t)

    x = np.random.default_rng(0).normal(size=(2, numbers)).astype(np.float32)
    run = jax.jit(lambda keys: ode_log_likelihood(denoise, process, jnp.asarray(x), keys, 64))
    found = run(example_keys(jax.random.key(0), 2))
    variance = 1 + float(process.sigma(0.0) / process.alpha(0.0)) ** 2
    expected = -(x**2).sum(1) / 2 / variance - numbers / 2 * np.log(2 * np.pi * variance)
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_dequantization_never_reaches_the_next_level(monkeypatch):
    highest = np.nextafter(np.float32(1), np.float32(0))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, highest))
    pixels = np.arange(256, dtype=np.uint8)[None]
    x = dequantize(pixels, example_keys(jax.random.key(0), 1))
    np.testing.assert_array_equal(np.floor((np.asarray(x) + 1) * 128), pixels)


def test_dequantization():
    pixels = np.tile(np.array([0, 17, 255], np.uint8), (500, 1))
    keys = example_keys(jax.random.key(0), 500)
    x = np.asarray(dequantize(pixels, keys))
    np.testing.assert_array_equal(np.floor((x + 1) * 128), pixels)
    assert x.min() >= -1 and x.max() < 1
    np.testing.assert_allclose(np.mean((x + 1) * 128 - pixels, axis=0), 0.5, atol=4 * 0.29 / 22)
    np.testing.assert_array_equal(dequantize(pixels[3:5], keys[3:5]), x[3:5])
    assert np.all(dequantize(np.array([[1]]), keys[:1], levels=2) >= 0)
    with pytest.raises(InputError, match="float32; they must be integers"):
        dequantize(pixels / np.float32(255), keys)
    with pytest.raises(InputError, match=r"from 0 to 255; of 16 levels they must be in \[0, 15\]"):
        dequantize(pixels, keys, levels=16)
    with pytest.raises(InputError, match="from -1 to 0"):
        dequantize(np.array([[-1, 0]]), keys[:1])


def test_images_in_half_precision_and_integers(keys):
    """The first are taken as they are, the second are no images in [-1, 1]."""
    half = POINTS.astype(jnp.bfloat16)
    for function in (functools.partial(by_ode, steps=8), functools.partial(bound, steps=8)):
        whole = function(FlowMatching(), keys, x=half.astype(np.float32))
        np.testing.assert_array_equal(function(FlowMatching(), keys, x=half), whole)
        with pytest.raises(InputError, match="x is uint8; a density is of floats"):
            function(FlowMatching(), keys, x=np.zeros((400, 2), np.uint8))


def test_no_images_and_another_number_of_keys(keys):
    for function in (functools.partial(by_ode, steps=2), functools.partial(bound, steps=2)):
        assert function(FlowMatching(), keys[:0], x=POINTS[:0]).shape == (0,)
        with pytest.raises(InputError, match=r"keys are \[1\], of 2 images"):
            function(FlowMatching(), keys[:1], x=POINTS[:2])


def test_no_steps(keys):
    for function in (by_ode, bound):
        with pytest.raises(InputError, match="steps is 0"):
            function(FlowMatching(), keys, 0)
        with pytest.raises(InputError, match="steps is 2.5; it must be a whole number"):
            function(FlowMatching(), keys, 2.5)
