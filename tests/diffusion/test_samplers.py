"""Samplers with the exact denoiser of a Gaussian mixture in place of a network."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion.process import (
    FlowMatching,
    VarianceExploding,
    VariancePreserving,
    combine,
    uniform,
)
from cvjax.diffusion.samplers import ddim, dpm_solver_2m, example_keys, heun
from cvjax.errors import InputError

WEIGHTS = jnp.array([0.5, 0.3, 0.2])
MEANS = jnp.array([[-1.0, 0.0], [0.8, 0.6], [0.5, -1.0]])
COVARIANCES = jnp.array(
    [[[0.04, 0.02], [0.02, 0.05]], [[0.02, 0.0], [0.0, 0.06]], [[0.03, -0.01], [-0.01, 0.03]]]
)
PROCESSES = {
    "cosine-v": VariancePreserving("cosine"),
    "linear-eps": VariancePreserving("linear", "eps", uniform),
    "flow-velocity": FlowMatching(),
}


def responsibilities(x, alpha, sigma):
    """p(component | x_t), [n, k], precisions of x_t [k, 2, 2] and x_t less the means [n, k, 2]."""
    precision = jnp.linalg.inv(alpha**2 * COVARIANCES + sigma**2 * jnp.eye(2))
    away = x[:, None] - alpha * MEANS
    log_density = -jnp.einsum("nki,kij,nkj->nk", away, precision, away) / 2
    log_density += jnp.log(WEIGHTS) + jnp.linalg.slogdet(precision)[1] / 2
    return jax.nn.softmax(log_density), precision, away


def exact(process):
    """E[x_0 | x_t] of the mixture, as what the process predicts."""

    def denoise(x, t):
        alpha, sigma = process.alpha(t[0]), process.sigma(t[0])  # samplers keep one time for all
        weights, precision, away = responsibilities(x, alpha, sigma)
        towards = jnp.einsum("kij,nkj->nki", precision, away)
        means = MEANS + alpha * jnp.einsum("kij,nkj->nki", COVARIANCES, towards)
        x0 = jnp.einsum("nk,nki->ni", weights, means)
        # Written out rather than through x_t - alpha x_0, which at small sigma is all rounding.
        eps = sigma * jnp.einsum("nk,nki->ni", weights, towards)
        return combine(process, process.prediction, x0, eps, t)

    return denoise


@functools.partial(jax.jit, static_argnames=("sampler", "process", "steps", "count"))
def draw(sampler, process, steps, count, seed=0):
    keys = example_keys(jax.random.key(seed), count)
    return sampler(exact(process), process, keys, (2,), steps)


ancestral = functools.partial(ddim, eta=1.0)


@pytest.mark.parametrize(
    "process",
    [*PROCESSES.values(), VarianceExploding(sigma_max=20.0)],
    ids=[*PROCESSES, "exploding-eps"],
)
@pytest.mark.parametrize(
    "sampler, steps", [(ddim, 200), (ancestral, 200), (heun, 100), (dpm_solver_2m, 100)]
)
def test_recovers_the_mixture(sampler, steps, process):
    count = 20_000
    x = draw(sampler, process, steps, count)
    # The components are far apart: nearly every point belongs to one of them alone.
    of, _, _ = responsibilities(x, 1.0, 0.0)
    found = jnp.mean(of, axis=0)
    # 4 standard errors of a share of 20,000 draws, and 0.01 for the steps.
    np.testing.assert_allclose(found, WEIGHTS, atol=4 * np.sqrt(0.25 / count) + 0.01)
    means = (of.T @ x) / (count * found[:, None])
    # 4 * sqrt(0.06 / 4,000) = 0.016 for the draws, and 0.01 for the steps.
    np.testing.assert_allclose(means, MEANS, atol=0.026)
    away = x[:, None] - means
    covariances = jnp.einsum("nk,nki,nkj->kij", of, away, away) / (count * found)[:, None, None]
    # 4 * 0.06 * sqrt(2 / 4,000) = 0.005 for the draws, and 0.004 for the steps and for the noise
    # that is left at t = 0.
    np.testing.assert_allclose(covariances, COVARIANCES, atol=0.009)


@dataclass(frozen=True)
class UniformLogSNR:
    """A process that only this test knows: log(alpha / sigma) falls from 5 to -5 on a line."""

    prediction: str = "x0"
    times: Callable = uniform

    def alpha(self, t):
        return jnp.sqrt(jax.nn.sigmoid(10 - 20 * t))

    def sigma(self, t):
        return jnp.sqrt(jax.nn.sigmoid(20 * t - 10))


@functools.cache
def solution(process):
    return draw(heun, process, 1024, 256)


def errors(sampler, process, steps):
    """Medians over 256 points of the distance from a fine solution with the same noise.

    Not means: some few points start on the border between two components.
    """
    fine = solution(process)
    coarse = [draw(sampler, process, n, 256) for n in steps]
    return np.array([jnp.median(jnp.linalg.norm(x - fine, axis=-1)) for x in coarse])


@pytest.mark.parametrize(
    "sampler, process, order",
    [(ddim, process, 1) for process in PROCESSES.values()]
    + [(heun, process, 2) for process in PROCESSES.values()]
    + [(ddim, UniformLogSNR(), 1), (heun, UniformLogSNR(), 2), (dpm_solver_2m, UniformLogSNR(), 2)],
)
def test_order_of_convergence(sampler, process, order):
    """Twice the steps, 2^order times less error."""
    orders = -np.diff(np.log2(errors(sampler, process, (64, 128, 256))))
    np.testing.assert_allclose(orders, order, atol=0.25)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_dpm_solver_2m_needs_fewer_steps(process):
    """Its order is in log SNR, whose first and last steps are long if the time's are equal.

    So it is not reached as cleanly as above, but for the same evaluations the gain is there.
    """
    assert errors(dpm_solver_2m, process, (64,)) < 0.5 * errors(ddim, process, (64,))
    coarse, fine = errors(dpm_solver_2m, process, (32, 256))
    assert np.log2(coarse / fine) / 3 > 0.9


@pytest.mark.parametrize("sampler", [ddim, ancestral, heun, dpm_solver_2m])
def test_an_image_depends_on_its_key_alone(sampler):
    process = FlowMatching()
    keys = example_keys(jax.random.key(3), 12)
    sample = jax.jit(lambda keys: sampler(exact(process), process, keys, (2,), 8))
    whole = sample(keys)
    parts = [sample(example_keys(jax.random.key(3), n, first=k)) for k, n in ((0, 5), (5, 7))]
    np.testing.assert_allclose(jnp.concatenate(parts), whole, atol=1e-5)
    assert len(np.unique(whole[:, 0])) == 12


@pytest.mark.parametrize("sampler", [ddim, heun, dpm_solver_2m])
def test_one_step_is_allowed_and_none_is_not(sampler):
    assert jnp.all(jnp.isfinite(draw(sampler, FlowMatching(), 1, 4)))
    with pytest.raises(InputError, match="steps is 0"):
        draw(sampler, FlowMatching(), 0, 4)


def test_eta_out_of_range():
    with pytest.raises(InputError, match="eta is 1.5"):
        draw(functools.partial(ddim, eta=1.5), FlowMatching(), 4, 4)


def test_ddim_on_straight_lines_is_euler():
    process, denoise = FlowMatching(), exact(FlowMatching())
    keys = example_keys(jax.random.key(0), 16)
    x = ddim(denoise, process, keys, (2,), 10)
    y = process.sigma(1.0) * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    for i in range(10):
        y = y - 0.1 * denoise(y, jnp.full(16, 1 - i / 10))
    np.testing.assert_allclose(x, y, atol=1e-5)
