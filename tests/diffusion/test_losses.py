"""Weightings, sliced score matching, optimal coupling, preconditioning, learned variances."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linear_sum_assignment

from cvjax.diffusion import losses
from cvjax.diffusion.coupling import optimal_coupling
from cvjax.diffusion.learned_variance import (
    ddpm_learned,
    log_probability_of_level,
    log_variances,
    variational_bound,
)
from cvjax.diffusion.preconditioning import Preconditioned, coefficients
from cvjax.diffusion.process import (
    EDM,
    PARAMETERIZATIONS,
    FlowMatching,
    VariancePreserving,
    combine,
    convert,
    log_snr,
    perturb,
    posterior,
    renewed,
    split,
)
from cvjax.diffusion.samplers import example_keys
from cvjax.errors import InputError

PROCESSES = [VariancePreserving("linear"), VariancePreserving("cosine"), FlowMatching(), EDM()]
WEIGHTINGS = [losses.simple, losses.likelihood, losses.min_snr, losses.edm, losses.sigmoid]
T = np.linspace(0.05, 0.95, 10, dtype=np.float32)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_weights_in_every_parameterization(process):
    """The weighted loss of one and the same guess does not depend on how it is expressed."""
    x0, eps, wrong = normal(3, len(T), 6)
    guess = eps + np.float32(0.1) * wrong

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def both(weighting, name):
        x = perturb(process, x0, eps, T)
        value = convert(process, "eps", name, guess, x, T)
        errors = jnp.mean((value - combine(process, name, x0, eps, T)) ** 2, axis=1)
        other = dataclasses.replace(process, prediction=name)
        weighted = losses.of_prediction(weighting, other, T) * errors
        return weighted, weighting(process, T) * jnp.mean((guess - eps) ** 2, axis=1)

    for weighting, name in itertools.product((losses.simple, losses.min_snr), PARAMETERIZATIONS):
        # Differences of nearly equal float32 numbers: three digits are left.
        np.testing.assert_allclose(*both(weighting, name), rtol=2e-2)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_weightings_as_their_papers_write_them(process):
    snr = jnp.exp(log_snr(process, T))
    of_x0 = {
        name: losses.of_prediction(
            functools.partial(weighting, **settings),
            dataclasses.replace(process, prediction="x0"),
            T,
        )
        for name, weighting, settings in (
            ("simple", losses.simple, {}),
            ("min_snr", losses.min_snr, dict(gamma=3.0)),
            ("edm", losses.edm, dict(sigma_data=0.7)),
            ("likelihood", losses.likelihood, {}),
            ("sigmoid", losses.sigmoid, dict(bias=-2.0)),
        )
    }
    np.testing.assert_allclose(of_x0["simple"], snr, rtol=1e-4)
    np.testing.assert_allclose(of_x0["min_snr"], np.minimum(snr, 3.0), rtol=1e-4)
    sigma = snr**-0.5
    np.testing.assert_allclose(of_x0["edm"], (sigma**2 + 0.49) / (sigma * 0.7) ** 2, rtol=1e-4)
    # -SNR'(t) / 2 by finite differences.
    h = 1e-3
    slope = (jnp.exp(log_snr(process, T + h)) - jnp.exp(log_snr(process, T - h))) / (2 * h)
    np.testing.assert_allclose(of_x0["likelihood"], -slope / 2, rtol=1e-2)
    falls = -slope / snr * snr * jax.nn.sigmoid(-2.0 - jnp.log(snr))
    np.testing.assert_allclose(of_x0["sigmoid"], falls, rtol=1e-2)


def test_weights_are_finite_at_both_ends():
    ends = np.array([0.0, 1.0], np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(process):
        named = [dataclasses.replace(process, prediction=name) for name in PARAMETERIZATIONS]
        return [
            losses.of_prediction(weighting, one, ends)
            for weighting, one in itertools.product(WEIGHTINGS, named)
        ]

    for process in PROCESSES:
        weights = np.stack(all_of(process))
        assert np.all(np.isfinite(weights)) and np.all(weights >= 0)


@pytest.mark.parametrize("process", PROCESSES[:3], ids=lambda p: str(p)[:24])
def test_the_likelihood_weighting_is_the_bound(process):
    """Of data N(0, s^2) with the exact denoiser, in closed form.

    The error of eps is 1 / (1 + s^2 SNR) x s^2 SNR, and the integral of -(d log SNR / dt) / 2
    times that is log((1 + s^2 SNR(0)) / (1 + s^2 SNR(1))) / 2.
    """
    s = 0.5

    @jax.jit
    def both():
        t = (jnp.arange(200_000) + 0.5) / 200_000
        scaled = s**2 * jnp.exp(log_snr(process, t))
        loss = jnp.mean(losses.likelihood(process, t) * scaled / (1 + scaled))
        return loss, 1 + s**2 * jnp.exp(log_snr(process, jnp.array([0.0, 1.0])))

    loss, ends = jax.device_get(both())
    np.testing.assert_allclose(loss, np.log(ends[0] / ends[1]) / 2, rtol=1e-3)


def test_sliced_score_matching_finds_the_score_of_a_gaussian():
    """score = -P x: the loss is E[tr(-P) + |P x|^2 / 2], and least for P the precision."""
    covariance = np.array([[1.0, 0.4], [0.4, 0.5]], np.float32)
    precision = np.linalg.inv(covariance)
    x = normal(200_000, 2) @ np.linalg.cholesky(covariance).T

    @jax.jit
    @jax.value_and_grad
    def loss(matrix, x):
        rows = losses.sliced_score_matching(lambda x: -x @ matrix.T, x, jax.random.key(1))
        return jnp.mean(rows)

    value, gradient = loss(precision, x)
    # 4 standard errors: the sum of 200,000 terms of standard deviation of about 5.
    np.testing.assert_allclose(value, -np.trace(precision) / 2, atol=0.05)
    np.testing.assert_allclose(gradient, 0, atol=0.05)
    other = np.eye(2, dtype=np.float32)
    value, gradient = loss(other, x)
    expected = -np.trace(other) + np.trace(other @ covariance @ other.T) / 2
    np.testing.assert_allclose(value, expected, atol=0.05)
    np.testing.assert_allclose(gradient, other @ covariance - np.eye(2), atol=0.05)
    of_half = jax.jit(lambda x: losses.sliced_score_matching(lambda x: -x, x, jax.random.key(1)))
    assert of_half(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert np.all(np.isfinite(np.float32(of_half(x[:4].astype(jnp.bfloat16)))))


couple = jax.jit(optimal_coupling)


@pytest.mark.parametrize("seed", range(3))
def test_the_coupling_is_the_best_of_all(seed):
    x, eps = np.random.default_rng(seed).normal(size=(2, 6, 2, 3)).astype(np.float32)
    found = np.asarray(couple(x, eps))
    orders = [list(order) for order in itertools.permutations(range(6))]
    costs = [np.sum((x - eps[order]) ** 2) for order in orders]
    np.testing.assert_allclose(np.sum((x - found) ** 2), min(costs), rtol=1e-5)
    # The marginal is kept: the same rows, each once.
    np.testing.assert_array_equal(found, eps[orders[int(np.argmin(costs))]])


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
def test_noise_stays_in_its_group(shape):
    x, eps = np.random.default_rng(3).normal(size=(2, 6, 4)).astype(np.float32)
    group = np.array([0, 1, 0, 2, 1, 0])
    group = group if len(shape) == 1 else np.stack([group, group > 0], axis=1)
    found = np.asarray(couple(x, eps, group))
    label = np.array([0, 1, 0, 2, 1, 0])
    for one in range(3):
        rows = np.flatnonzero(label == one)
        orders = [eps[list(order)] for order in itertools.permutations(rows)]
        best = min(orders, key=lambda rows_of_eps, rows=rows: np.sum((x[rows] - rows_of_eps) ** 2))
        np.testing.assert_array_equal(found[rows], best)


def test_the_coupling_of_a_large_batch_is_that_of_scipy():
    rng = np.random.default_rng(4)
    x, eps = rng.normal(size=(2, 128, 784)).astype(np.float32)
    group = rng.integers(0, 5, 128)
    gain = np.where(group[:, None] == group, np.float64(x) @ np.float64(eps).T, -1e6)
    _, order = linear_sum_assignment(gain, maximize=True)
    np.testing.assert_array_equal(couple(x, eps, group), eps[order])
    x[0], x[1, 0], eps[2] = np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(
        np.sort(couple(x, eps, group)[:, 0]), np.sort(eps[:, 0])
    )  # it ends


def test_the_coupling_over_devices_and_at_the_edges():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, eps = np.random.default_rng(3).normal(size=(2, 16, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        couple(*(jax.device_put(a, split) for a in (x, eps))), couple(x, eps)
    )
    np.testing.assert_array_equal(couple(x[:1], eps[:1]), eps[:1])
    assert couple(x[:0], eps[:0]).shape == (0, 4)
    zeros = np.zeros((4, 2), np.float32)
    np.testing.assert_array_equal(np.sort(couple(zeros, eps[:4, :2]), 0), np.sort(eps[:4, :2], 0))
    gradient = jax.jit(jax.grad(lambda e: jnp.sum(optimal_coupling(x, e) * x)))(eps)
    np.testing.assert_array_equal(np.sort(gradient, 0), np.sort(x, 0))


@pytest.mark.parametrize("process", [EDM(), VariancePreserving("linear", "x0")], ids=["EDM", "VP"])
@pytest.mark.parametrize("t", [0.001, 0.02, 0.5, 1.0])
def test_preconditioning_has_unit_variance(process, t):
    """T. Karras et al., appendix B.6: input and target have variance 1, c_out is the least."""
    sigma_data, count = 0.5, 100_000
    x0, eps = normal(2, count) * np.float32([[sigma_data], [1.0]])

    @jax.jit
    def found(x0, eps, t):
        time = jnp.full(count, t)
        sigma = process.sigma(t) / process.alpha(t)
        noisy = perturb(process, x0, eps, time) / process.alpha(time)
        other = dataclasses.replace(process, prediction="x0")
        weight = losses.of_prediction(losses.edm, other, time)[0]
        return coefficients(sigma, sigma_data), sigma, noisy, weight

    (c_skip, c_out, c_in, c_noise), sigma, noisy, weight = jax.device_get(
        found(x0, eps, np.float32(t))
    )
    # 4 standard errors of a standard deviation of 100,000 draws.
    np.testing.assert_allclose(np.std(c_in * noisy), 1, atol=0.01)
    np.testing.assert_allclose(np.std((x0 - c_skip * noisy) / c_out), 1, atol=0.01)
    np.testing.assert_allclose(c_noise, np.log(sigma) / 4, rtol=1e-5)
    np.testing.assert_allclose(weight * c_out**2, 1, rtol=1e-3)


def test_preconditioned_network():
    seen = []

    def network(x, t, condition):
        seen.extend((x, t))
        return 0.3 * x + condition[:, None, None, None]

    process, x = EDM(), normal(4, 2, 2, 1)
    t, label = np.array([0.0, 0.01, 0.3, 1.0], np.float32), np.arange(4)
    found = Preconditioned(network, process, 0.6).apply({}, x, t, label)
    of_t = jax.device_get(coefficients(process.sigma(t), 0.6))
    skip, out, c_in, noise = (c[:, None, None, None] for c in of_t)
    np.testing.assert_allclose(seen[0], c_in * x, rtol=1e-5)
    np.testing.assert_allclose(seen[1], noise[:, 0, 0, 0], rtol=1e-5)
    expected = skip * x + out * (0.3 * c_in * x + label[:, None, None, None])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(InputError, match="sigma_data is 0"):
        Preconditioned(network, process, 0.0)
    with pytest.raises(InputError, match="prediction is 'velocity'.*predicts 'x0'"):
        Preconditioned(network, FlowMatching())


@pytest.mark.parametrize("process", PROCESSES[:3], ids=lambda p: str(p)[:24])
def test_the_posterior_is_that_of_bayes(process):
    """p(x_s | x_t, x_0) of the chain x_0 -> x_s -> x_t, by the rules for normal distributions."""
    t, s = np.float32([0.3, 0.9, 0.02]), np.float32([0.2, 0.85, 0.0])
    x0, x = normal(2, 3, 5)

    @jax.jit
    def found():
        levels = [level(at)[:, None] for at in (t, s) for level in (process.alpha, process.sigma)]
        of_data = posterior(process, *split(process, "x0", x0, x, t), t, s)
        return levels, of_data, log_variances(process, t, s)

    levels, (of_mean, std), (least, most) = jax.device_get(found())
    alpha_t, sigma_t, alpha_s, sigma_s = levels
    kept = alpha_t / alpha_s
    added = sigma_t**2 - (kept * sigma_s) ** 2
    precision = 1 / sigma_s**2 + kept**2 / added
    mean = alpha_s * x0 / sigma_s**2 + kept * x / added
    np.testing.assert_allclose(of_mean, mean / precision, atol=5e-3)
    np.testing.assert_allclose(std[:, 0], precision[:, 0] ** -0.5, rtol=5e-3)
    np.testing.assert_allclose(least, -np.log(precision[:, 0]), atol=5e-3)
    np.testing.assert_allclose(most, np.log(added[:, 0]), atol=5e-3)


def test_the_bound_by_its_definition():
    """KL by scipy's numbers for normal distributions, and the decoder by differences of cdfs."""
    process = VariancePreserving("linear", "eps")
    x0 = np.float32([[-1.0, -0.5, 0.1, 1.0], [0.3, -0.2, 0.9, -1.0]])
    x0 = np.round((x0 + 1) * np.float32(127.5)) / np.float32(127.5) - 1  # grey levels
    eps, guess = normal(2, 2, 4)

    @jax.jit
    def terms(guess, fraction, t, s):
        x = perturb(process, x0, eps, t)
        found = variational_bound(process, guess, jnp.full((2, 4), fraction), x0, x, t, s)
        parts = (split(process, *of, x, t) for of in (("x0", x0), ("eps", guess)))
        means = [posterior(process, *of, t, s)[0] for of in parts]
        return found, *means, log_variances(process, t, s)

    for t, s in ((0.5, 0.49), (0.01, 0.0)):
        t, s = np.full(2, t, np.float32), np.full(2, s, np.float32)
        found, true_mean, mean, variances = terms(guess, 0.3, t, s)
        mean = np.asarray(mean, np.float64)
        least, most = (np.asarray(v, np.float64)[:, None] for v in variances)
        q, p = np.exp(least / 2), np.exp((least + 0.3 * (most - least)) / 2)
        kl = np.log(p / q) + (q**2 + (np.asarray(true_mean) - mean) ** 2) / (2 * p**2) - 0.5
        upper = np.where(x0 > 0.999, np.inf, (x0 + 1 / 255 - mean) / p)
        lower = np.where(x0 < -0.999, -np.inf, (x0 - 1 / 255 - mean) / p)
        decoded = -np.log(stats.norm.cdf(upper) - stats.norm.cdf(lower))
        expected = np.where(s[:, None] == 0, decoded, kl).mean(axis=1)
        np.testing.assert_allclose(found, expected, rtol=2e-3)
    # The least variance and the true mean: nothing is lost.
    zero, *_ = terms(eps, 0.0, T[:2], T[:2] - np.float32(0.01))
    np.testing.assert_allclose(zero, 0, atol=1e-4)


def test_probabilities_of_levels():
    """They sum to 1, and far from the mean neither they nor their gradients are lost."""
    x = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    of = lambda mean, log_variance: log_probability_of_level(x, mean, log_variance)  # noqa: E731
    both = jax.jit(lambda *at: (of(*at), jax.grad(lambda *at: jnp.sum(of(*at)))(*at)))
    for mean, deviation in ((0.1, 0.3), (-2.0, 0.5), (0.0, 0.002)):
        log_p, gradient = both(np.float32(mean), np.float32(2 * np.log(deviation)))
        np.testing.assert_allclose(np.sum(np.exp(log_p)), 1, rtol=1e-4)
        assert np.all(np.isfinite(log_p)) and np.isfinite(gradient)
    few = np.arange(16, dtype=np.float32) / np.float32(7.5) - 1
    log_p = jax.jit(log_probability_of_level, static_argnums=3)(few, 0.1, -2.0, 16)
    np.testing.assert_allclose(np.sum(np.exp(log_p)), 1, rtol=1e-4)


def test_a_fraction_of_the_variance_out_of_its_range_is_cut():
    process, keys = VariancePreserving("linear", "eps"), example_keys(jax.random.key(0), 3)

    @jax.jit
    def run(v):
        denoise = lambda x, t: jnp.concatenate([x, v + 0 * x], -1)  # noqa: E731
        return ddpm_learned(denoise, process, keys, (1,), 4)

    np.testing.assert_array_equal(run(5.0), run(1.0))
    np.testing.assert_array_equal(run(-5.0), run(-1.0))


def test_learned_variances_make_few_steps_exact():
    """Data N(0, s^2): with the best mean and variance even 5 steps give that distribution."""
    process, s, steps = VariancePreserving("cosine", "x0"), 0.5, 5

    def denoise(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        earlier = t - 1 / steps
        least, most = log_variances(process, t, earlier)
        # The variance of the posterior's mean, given x_t, adds to its own.
        of_x0 = process.alpha(earlier) * renewed(process, t, earlier)
        left = s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2)
        fraction = (jnp.log(jnp.exp(least) + of_x0**2 * left) - least) / (most - least)
        v = jnp.broadcast_to((2 * fraction - 1)[:, None], x.shape)
        return jnp.concatenate([gain[:, None] * x, v], axis=-1)

    keys = example_keys(jax.random.key(0), 50_000)
    x = jax.jit(lambda keys: ddpm_learned(denoise, process, keys, (1,), steps))(keys)
    # The last step adds no noise: what it leaves out is known.
    t = np.float32([1 / steps])
    alpha, sigma = np.asarray(process.alpha(t)), np.asarray(process.sigma(t))
    gain = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
    expected = (gain**2 * (alpha**2 * s**2 + sigma**2)) ** 0.5
    # 4 standard errors of a standard deviation of 50,000 draws, and what is left at t = 0.
    np.testing.assert_allclose(np.std(x), expected[0], rtol=0.015)


@pytest.mark.parametrize(
    "weighting, field", [(losses.min_snr, "gamma"), (losses.edm, "sigma_data")]
)
def test_settings_of_weightings_without_a_meaning(weighting, field):
    for value in (0.0, -1.0):
        with pytest.raises(InputError, match=f"{field} is {value}; it must be above 0"):
            weighting(FlowMatching(), jnp.array([0.5]), **{field: value})
