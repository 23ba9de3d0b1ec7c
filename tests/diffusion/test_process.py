"""Processes: the mathematics of alpha and sigma, and round trips between parameterizations."""

import functools
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
TIMES = np.linspace(0.0, 1.0, 101, dtype=np.float32)
QUANTILES = (np.arange(10_000, dtype=np.float32) + 0.5) / 10_000


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@functools.partial(jax.jit, static_argnums=0)
def along(process, t):
    """alpha, sigma, log SNR, f and g, in one program."""
    return {
        "alpha": process.alpha(t), "sigma": process.sigma(t), "log_snr": log_snr(process, t),
        "drift": drift(process, t), "diffusion": diffusion(process, t),
    }  # fmt: skip


@functools.cache
def noise_of(process):
    """The standard deviation of what sampling starts from."""
    return np.std(jax.jit(lambda key: prior(process, key, (10_000,)))(jax.random.key(0)))


@pytest.mark.parametrize("process", PROCESSES[:2])
def test_variance_is_preserved(process):
    found = along(process, TIMES)
    np.testing.assert_allclose(found["alpha"] ** 2 + found["sigma"] ** 2, 1, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_from_data_to_noise(process):
    found = jax.tree.map(np.asarray, along(process, TIMES))
    assert (np.diff(found["log_snr"]) < 0).all() and np.isfinite(found["log_snr"]).all()
    alpha, sigma = found["alpha"], found["sigma"]
    assert alpha[0] > 0.998 and sigma[-1] > 0.998
    assert alpha[-1] < 0.01
    # The noise that is left in a sample: a tenth of a grey level of 2 / 255, but for the linear
    # schedule, which begins with a standard deviation of sqrt(beta * MARGIN).
    assert sigma[0] < (0.012 if "linear" in str(process) else 0.25 * 2 / 255)
    np.testing.assert_allclose(noise_of(process), sigma[-1], rtol=0.03)


def test_the_linear_schedule_is_that_of_the_sde():
    # beta(t) = 0.1 + 19.9 t and  f = -beta / 2,  g = sqrt(beta): Song et al., equation 11.
    process, t = VariancePreserving("linear"), TIMES
    beta = 0.1 + 19.9 * (MARGIN + (1 - 2 * MARGIN) * t)
    speed = 1 - 2 * MARGIN  # of the clock that alpha and sigma see
    found = along(process, t)
    np.testing.assert_allclose(found["drift"], -beta * speed / 2, rtol=1e-4)
    np.testing.assert_allclose(found["diffusion"] ** 2, beta * speed, rtol=2e-3)
    # Both ends of time may be given as integers.
    ends = np.arange(2, dtype=np.int32)
    jax.tree.map(
        np.testing.assert_array_equal, along(process, ends), along(process, np.float32(ends))
    )


@pytest.mark.parametrize("process", PROCESSES)
def test_drift_and_diffusion_move_the_marginals(process):
    """d mean / dt = f mean and d variance / dt = 2 f variance + g^2, by finite differences."""
    t, h = np.linspace(0.05, 0.95, 19, dtype=np.float32), np.float32(1e-2)
    found = jax.tree.map(np.asarray, along(process, np.stack([t - h, t, t + h])))
    f, g = found["drift"][1], found["diffusion"][1]
    rate = lambda values: (values[2] - values[0]) / (2 * h)  # noqa: E731
    alpha, variance = found["alpha"], found["sigma"] ** 2
    np.testing.assert_allclose(rate(alpha), f * alpha[1], atol=2e-3)
    np.testing.assert_allclose(rate(variance), 2 * f * variance[1] + g**2, atol=5e-3)


PAIRS = list(itertools.permutations(PARAMETERIZATIONS, 2))


def converted(process, x0, eps, t):
    """Every parameterization of x_t, each from each other, and back."""
    x = perturb(process, x0, eps, t)
    values = {name: combine(process, name, x0, eps, t) for name in PARAMETERIZATIONS}
    there = {pair: convert(process, *pair, values[pair[0]], x, t) for pair in PAIRS}
    back = {pair: convert(process, *pair[::-1], there[pair], x, t) for pair in PAIRS}
    return x, values, there, back, process.sigma(t)


@functools.cache
def round_trips(process):
    """At both ends of time too; one program for all pairs."""
    t = np.float32([0.0, 1e-4, 0.01, 0.3, 0.5, 0.7, 0.99, 0.9999, 1.0])
    x0, eps = draw(2, len(t), 4, 3)
    return jax.tree.map(np.asarray, jax.jit(converted, static_argnums=0)(process, x0, eps, t))


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source, target", PAIRS)
def test_round_trips(process, source, target):
    """There and back is the identity, at both ends of time too, for any value and any x."""
    _, values, there, back, sigma = round_trips(process)
    there, back = there[source, target], back[source, target]
    assert np.isfinite(there).all()
    # x0 from eps divides by alpha >= MARGIN (and the other way by sigma): float32 keeps 7 digits,
    # 3 of them may go; what is then found must be right where it is well determined ...
    scale = np.abs(values[target]).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(there / scale, values[target] / scale, atol=2e-3)
    # ... and coming back loses no more than eps = (x - alpha x0) / sigma makes of one rounding.
    value, lost = values[source], max(1e-4, 2e-7 / float(sigma[0]))
    np.testing.assert_allclose(back, value, rtol=1e-4, atol=lost * np.abs(value).max())


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
def test_round_trips_in_double_precision_are_exact(process):
    with jax.enable_x64():
        t = np.array([0.0, 1e-4, 0.5, 0.9999, 1.0])
        x0, eps = draw(2, len(t), 4).astype(float)
        x, values, there, *_ = jax.jit(converted, static_argnums=0)(process, x0, eps, t)
        assert x.dtype == jnp.float64
        for source, target in PAIRS:
            np.testing.assert_allclose(there[source, target], values[target], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_parameterizations_mean_what_they_say(process):
    t, h = np.linspace(0.1, 0.9, 5, dtype=np.float32), np.float32(1e-2)
    x0, eps = draw(2, len(t), 3)

    @jax.jit
    def run(t):
        x = perturb(process, x0, eps, t)
        values = {name: combine(process, name, x0, eps, t) for name in PARAMETERIZATIONS}
        parts = {name: split(process, name, values[name], x, t) for name in values}
        return x, values, parts, process.alpha(t)[:, None], process.sigma(t)[:, None]

    x, values, parts, alpha, sigma = jax.tree.map(np.asarray, run(t))
    np.testing.assert_allclose(x, alpha * x0 + sigma * eps, rtol=1e-6)
    expected = dict(x0=x0, eps=eps, v=alpha * eps - sigma * x0, score=-(x - alpha * x0) / sigma**2)
    later, sooner = (np.asarray(run(t + d)[0]) for d in (h, -h))
    expected["velocity"] = (later - sooner) / (2 * h)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, atol=5e-3)
        np.testing.assert_allclose(parts[name], (x0, eps), atol=1e-4)


def test_the_velocity_of_flow_matching_is_noise_minus_data():
    x0, eps = draw(2, 5, 3)
    velocity = combine(FlowMatching(), "velocity", x0, eps, np.linspace(0.0, 1.0, 5, dtype="f"))
    np.testing.assert_allclose(velocity, (1 - 2 * MARGIN) * (eps - x0), rtol=1e-5)


def test_the_exploding_process_only_adds_noise():
    # f = 0 and g = sigma sqrt(2 log(sigma_max / sigma_min)): Song et al., equation 30.
    process = VarianceExploding(0.02, 30.0)
    speed = 1 - 2 * MARGIN
    found = jax.tree.map(np.asarray, along(process, TIMES))
    np.testing.assert_allclose(found["alpha"], 1)
    np.testing.assert_allclose(found["sigma"][[0, -1]], [0.02, 30.0], rtol=0.01)
    np.testing.assert_allclose(found["drift"], 0)
    expected = found["sigma"] ** 2 * 2 * np.log(30.0 / 0.02) * speed
    np.testing.assert_allclose(found["diffusion"] ** 2, expected, rtol=1e-4)
    np.testing.assert_allclose(noise_of(process), found["sigma"][-1], rtol=0.03)
    with pytest.raises(InputError, match="sigma_min is 2"):
        VarianceExploding(2.0, 1.0)


def test_the_sub_preserving_process_is_that_of_the_sde():
    # f = -beta / 2,  g^2 = beta (1 - exp(-2 int beta)): Song et al., equation 29.
    process, t, speed = SubVariancePreserving(), TIMES, 1 - 2 * MARGIN
    clock = MARGIN + speed * t
    beta, integral = 0.1 + 19.9 * clock, 0.1 * clock + 19.9 * clock**2 / 2
    found = along(process, t)
    np.testing.assert_allclose(found["drift"], -beta * speed / 2, rtol=1e-4)
    expected = -np.expm1(-2 * np.float64(integral)) * beta * speed
    np.testing.assert_allclose(found["diffusion"] ** 2, expected, rtol=2e-3)
    less = along(VariancePreserving("linear"), t)["sigma"]
    np.testing.assert_allclose(found["sigma"], less**2, rtol=1e-4)


def test_the_time_of_edm_is_sigma():
    # f = 0 and g = sqrt(2 sigma) in the time sigma: Karras et al., table 1 and equation 6.
    process = EDM()
    found = jax.tree.map(np.asarray, along(process, TIMES))
    np.testing.assert_array_equal(found["alpha"], 1)
    np.testing.assert_allclose(found["sigma"], 80 * TIMES, atol=1.01e-4)
    np.testing.assert_array_equal(found["drift"], 0)
    np.testing.assert_allclose(found["diffusion"] ** 2, 2 * found["sigma"] * 80, rtol=1e-4)
    np.testing.assert_allclose(noise_of(process), 80, rtol=0.03)
    levels, less, direct = jax.jit(
        lambda u: (
            process.sigma(process.times(u)), EDM(sigma_max=0.5).times(u), log_normal(u, -1.2, 1.2)
        )
    )(QUANTILES)  # fmt: skip
    logs = np.log(levels)
    np.testing.assert_allclose([np.mean(logs), np.std(logs)], [-1.2, 1.2], atol=0.01)
    assert less.max() == 1
    np.testing.assert_allclose(direct, levels, rtol=1e-5)
    for wrong in (dict(sigma_min=2.0, sigma_max=1.0), dict(std=0.0), dict(prediction="D")):
        with pytest.raises(InputError, match=next(iter(wrong))):
            EDM(**wrong)


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
def test_marginals(process):
    t = np.float32([0.0, 0.4, 1.0])
    x0, eps = draw(2, 3, 4, 5)
    x = jax.jit(lambda *of: perturb(process, *of))(x0, eps, t)
    levels = along(process, t)
    alpha, sigma = (np.asarray(levels[name])[:, None, None] for name in ("alpha", "sigma"))
    np.testing.assert_allclose(x, alpha * x0 + sigma * eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", ROUND, ids=lambda p: type(p).__name__)
def test_the_time_of_a_noise_level(process):
    t = np.float32([0.0, 1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0])
    ratio_at = lambda t: process.sigma(t) / process.alpha(t)  # noqa: E731

    @jax.jit
    def run(t):
        ratio = ratio_at(t)
        found = time_at(process, ratio)
        return ratio, found, ratio_at(found), time_at(process, jnp.array([0.0, 1e9]))

    ratio, found, again, ends = run(t)
    np.testing.assert_allclose(found, t, atol=2e-6)  # of t, with sigma of 7 digits
    np.testing.assert_allclose(again, ratio, rtol=2e-4)
    np.testing.assert_array_equal(ends, [0.0, 1.0])
    assert jax.eval_shape(lambda: time_at(process, 1.0)).shape == ()


def test_quantiles_of_the_times():
    np.testing.assert_array_equal(uniform(QUANTILES), QUANTILES)
    t = np.asarray(jax.jit(lambda u: logit_normal(u, mean=0.5, std=2.0))(QUANTILES))
    logits = np.log(t) - np.log1p(-t)
    np.testing.assert_allclose([np.mean(logits), np.std(logits)], [0.5, 2.0], atol=0.01)


def test_misspellings_are_one_line():
    with pytest.raises(InputError, match="'epsilon'.*eps"):
        FlowMatching(prediction="epsilon")
    with pytest.raises(InputError, match="'cosin'.*'cosine' or 'linear'"):
        VariancePreserving("cosin")


def test_a_prediction_of_other_channels_is_not_broadcast():
    x, t = draw(2, 4, 4, 1), np.zeros(2, np.float32)
    with pytest.raises(InputError, match=r"eps is \[2, 4, 4, 2\], but x is \[2, 4, 4, 1\]"):
        split(FlowMatching(), "eps", draw(2, 4, 4, 2), x, t)
