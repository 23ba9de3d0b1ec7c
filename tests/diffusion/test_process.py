"""Processes: the mathematics of alpha and sigma, and round trips between parameterizations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion.process import (
    EDM,
    MARGIN,
    PARAMETERIZATIONS,
    FlowMatching,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    combine,
    convert,
    diffusion,
    drift,
    log_normal,
    log_snr,
    logit_normal,
    marginal,
    perturb,
    prior,
    split,
    time_at,
    uniform,
)
from cvjax.errors import InputError

PROCESSES = [
    VariancePreserving("cosine"),
    VariancePreserving("linear"),
    SubVariancePreserving(),
    FlowMatching(),
]
ROUND = [*PROCESSES, VarianceExploding(), EDM()]
TIMES = jnp.linspace(0.0, 1.0, 101)


@pytest.mark.parametrize("process", PROCESSES[:2])
def test_variance_is_preserved(process):
    np.testing.assert_allclose(process.alpha(TIMES) ** 2 + process.sigma(TIMES) ** 2, 1, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_from_data_to_noise(process):
    assert jnp.all(jnp.diff(log_snr(process, TIMES)) < 0)
    assert jnp.all(jnp.isfinite(log_snr(process, TIMES)))
    assert process.alpha(0.0) > 0.998 and process.sigma(1.0) > 0.998
    assert process.alpha(1.0) < 0.01
    # The noise that is left in a sample: a tenth of a grey level of 2 / 255, but for the linear
    # schedule, which begins with a standard deviation of sqrt(beta * MARGIN).
    assert process.sigma(0.0) < (0.012 if "linear" in str(process) else 0.25 * 2 / 255)
    noise = prior(process, jax.random.key(0), (10_000,))
    np.testing.assert_allclose(jnp.std(noise), process.sigma(1.0), rtol=0.03)


def test_the_linear_schedule_is_that_of_the_sde():
    # beta(t) = 0.1 + 19.9 t and  f = -beta / 2,  g = sqrt(beta): Song et al., equation 11.
    process, t = VariancePreserving("linear"), TIMES
    beta = 0.1 + 19.9 * (MARGIN + (1 - 2 * MARGIN) * t)
    speed = 1 - 2 * MARGIN  # of the clock that alpha and sigma see
    np.testing.assert_allclose(drift(process, t), -beta * speed / 2, rtol=1e-4)
    np.testing.assert_allclose(diffusion(process, t) ** 2, beta * speed, rtol=2e-3)
    # Both ends of time may be given as integers.
    np.testing.assert_array_equal(drift(process, jnp.arange(2)), drift(process, jnp.arange(2.0)))


@pytest.mark.parametrize("process", PROCESSES)
def test_drift_and_diffusion_move_the_marginals(process):
    """d mean / dt = f mean and d variance / dt = 2 f variance + g^2, by finite differences."""
    t, h = jnp.linspace(0.05, 0.95, 19), 1e-2
    f, g = drift(process, t), diffusion(process, t)
    rate = lambda function: (function(t + h) - function(t - h)) / (2 * h)  # noqa: E731
    np.testing.assert_allclose(rate(process.alpha), f * process.alpha(t), atol=2e-3)
    variance = lambda t: process.sigma(t) ** 2  # noqa: E731
    np.testing.assert_allclose(rate(variance), 2 * f * variance(t) + g**2, atol=5e-3)


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source, target", list(itertools.permutations(PARAMETERIZATIONS, 2)))
def test_round_trips(process, source, target):
    """There and back is the identity, at both ends of time too, for any value and any x."""
    t = jnp.array([0.0, 1e-4, 0.01, 0.3, 0.5, 0.7, 0.99, 0.9999, 1.0])
    x0, eps = jax.random.normal(jax.random.key(0), (2, len(t), 4, 3))
    x = perturb(process, x0, eps, t)
    value = combine(process, source, x0, eps, t)
    there = convert(process, source, target, value, x, t)
    assert jnp.all(jnp.isfinite(there))
    # x0 from eps divides by alpha >= MARGIN (and the other way by sigma): float32 keeps 7 digits,
    # 3 of them may go; what is then found must be right where it is well determined ...
    scale = jnp.max(jnp.abs(combine(process, target, x0, eps, t)), axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(
        there / scale, combine(process, target, x0, eps, t) / scale, atol=2e-3
    )
    # ... and coming back loses no more than eps = (x - alpha x0) / sigma makes of one rounding.
    back = convert(process, target, source, there, x, t)
    lost = max(1e-4, 2e-7 / float(process.sigma(0.0)))
    np.testing.assert_allclose(back, value, rtol=1e-4, atol=lost * float(jnp.abs(value).max()))


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
def test_round_trips_in_double_precision_are_exact(process):
    with jax.enable_x64():
        t = jnp.array([0.0, 1e-4, 0.5, 0.9999, 1.0])
        x0, eps = jax.random.normal(jax.random.key(0), (2, len(t), 4))
        x = perturb(process, x0, eps, t)
        assert x.dtype == jnp.float64
        values = {name: combine(process, name, x0, eps, t) for name in PARAMETERIZATIONS}
        for source, target in itertools.permutations(values, 2):
            there = convert(process, source, target, values[source], x, t)
            np.testing.assert_allclose(there, values[target], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_parameterizations_mean_what_they_say(process):
    t = jnp.linspace(0.1, 0.9, 5)
    x0, eps = jax.random.normal(jax.random.key(0), (2, len(t), 3))
    x = perturb(process, x0, eps, t)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    np.testing.assert_allclose(x, alpha * x0 + sigma * eps, rtol=1e-6)
    expected = dict(x0=x0, eps=eps, v=alpha * eps - sigma * x0, score=-(x - alpha * x0) / sigma**2)
    h = 1e-2
    later, sooner = (perturb(process, x0, eps, t + d) for d in (h, -h))
    expected["velocity"] = (later - sooner) / (2 * h)
    for name, value in expected.items():
        np.testing.assert_allclose(combine(process, name, x0, eps, t), value, atol=5e-3)
        found = split(process, name, combine(process, name, x0, eps, t), x, t)
        np.testing.assert_allclose(found, (x0, eps), atol=1e-4)


def test_the_velocity_of_flow_matching_is_noise_minus_data():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 5, 3))
    velocity = combine(FlowMatching(), "velocity", x0, eps, jnp.linspace(0.0, 1.0, 5))
    np.testing.assert_allclose(velocity, (1 - 2 * MARGIN) * (eps - x0), rtol=1e-5)


def test_the_exploding_process_only_adds_noise():
    # f = 0 and g = sigma sqrt(2 log(sigma_max / sigma_min)): Song et al., equation 30.
    process = VarianceExploding(0.02, 30.0)
    speed = 1 - 2 * MARGIN
    np.testing.assert_allclose(process.alpha(TIMES), 1)
    np.testing.assert_allclose(process.sigma(TIMES[jnp.array([0, -1])]), [0.02, 30.0], rtol=0.01)
    np.testing.assert_allclose(drift(process, TIMES), 0)
    expected = process.sigma(TIMES) ** 2 * 2 * np.log(30.0 / 0.02) * speed
    np.testing.assert_allclose(diffusion(process, TIMES) ** 2, expected, rtol=1e-4)
    noise = prior(process, jax.random.key(0), (10_000,))
    np.testing.assert_allclose(jnp.std(noise), process.sigma(1.0), rtol=0.03)
    with pytest.raises(InputError, match="sigma_min is 2"):
        VarianceExploding(2.0, 1.0)


def test_the_sub_preserving_process_is_that_of_the_sde():
    # f = -beta / 2,  g^2 = beta (1 - exp(-2 int beta)): Song et al., equation 29.
    process, t, speed = SubVariancePreserving(), TIMES, 1 - 2 * MARGIN
    clock = MARGIN + speed * t
    beta, integral = 0.1 + 19.9 * clock, 0.1 * clock + 19.9 * clock**2 / 2
    np.testing.assert_allclose(drift(process, t), -beta * speed / 2, rtol=1e-4)
    expected = -np.expm1(-2 * np.float64(integral)) * beta * speed
    np.testing.assert_allclose(diffusion(process, t) ** 2, expected, rtol=2e-3)
    less = VariancePreserving("linear").sigma(t)
    np.testing.assert_allclose(process.sigma(t), less**2, rtol=1e-4)


def test_the_time_of_edm_is_sigma():
    # f = 0 and g = sqrt(2 sigma) in the time sigma: Karras et al., table 1 and equation 6.
    process = EDM()
    np.testing.assert_array_equal(process.alpha(TIMES), 1)
    np.testing.assert_allclose(process.sigma(TIMES), 80 * TIMES, atol=1.01e-4)
    np.testing.assert_array_equal(drift(process, TIMES), 0)
    expected = 2 * process.sigma(TIMES) * 80
    np.testing.assert_allclose(diffusion(process, TIMES) ** 2, expected, rtol=1e-4)
    noise = prior(process, jax.random.key(0), (10_000,))
    np.testing.assert_allclose(jnp.std(noise), 80, rtol=0.03)
    u = (jnp.arange(10_000) + 0.5) / 10_000
    logs = jnp.log(80 * process.times(u))
    np.testing.assert_allclose([jnp.mean(logs), jnp.std(logs)], [-1.2, 1.2], atol=0.01)
    assert EDM(sigma_max=0.5).times(u).max() == 1
    np.testing.assert_allclose(log_normal(u, -1.2, 1.2), jnp.exp(logs), rtol=1e-5)
    for wrong in (dict(sigma_min=2.0, sigma_max=1.0), dict(std=0.0), dict(prediction="D")):
        with pytest.raises(InputError, match=next(iter(wrong))):
            EDM(**wrong)


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
def test_marginals(process):
    t = jnp.array([0.0, 0.4, 1.0])
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    mean, std = marginal(process, x0, t)
    assert mean.shape == x0.shape and std.shape == t.shape
    np.testing.assert_allclose(mean + std[:, None, None] * eps, perturb(process, x0, eps, t))
    np.testing.assert_allclose(mean, process.alpha(t)[:, None, None] * x0)


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
def test_the_time_of_a_noise_level(process):
    t = jnp.array([0.0, 1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0])
    ratio = process.sigma(t) / process.alpha(t)
    found = time_at(process, ratio)
    np.testing.assert_allclose(found, t, atol=2e-6)  # of t, with sigma of 7 digits
    np.testing.assert_allclose(process.sigma(found) / process.alpha(found), ratio, rtol=2e-4)
    np.testing.assert_array_equal(time_at(process, jnp.array([0.0, 1e9])), [0.0, 1.0])
    assert time_at(process, 1.0).shape == ()


def test_quantiles_of_the_times():
    u = (jnp.arange(10_000) + 0.5) / 10_000
    np.testing.assert_array_equal(uniform(u), u)
    t = logit_normal(u, mean=0.5, std=2.0)
    logits = jnp.log(t) - jnp.log1p(-t)
    np.testing.assert_allclose([jnp.mean(logits), jnp.std(logits)], [0.5, 2.0], atol=0.01)


def test_misspellings_are_one_line():
    with pytest.raises(InputError, match="'epsilon'.*eps"):
        FlowMatching(prediction="epsilon")
    with pytest.raises(InputError, match="'cosin'.*'cosine' or 'linear'"):
        VariancePreserving("cosin")
