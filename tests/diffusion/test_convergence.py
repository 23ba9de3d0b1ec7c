"""The error of each solver of the ODE falls as its order says, measured in double precision."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion import grids
from cvjax.diffusion.editing import invert
from cvjax.diffusion.likelihood import ode_log_likelihood, vlb
from cvjax.diffusion.process import EDM, FlowMatching, uniform
from cvjax.diffusion.samplers import ddim, dpm_solver_2m, euler, example_keys, heun, unipc
from tests.diffusion.mixture import exact

bind = functools.partial
POINTS = 128


@dataclass(frozen=True)
class UniformLogSNR:
    """A process that only this test knows: log(alpha / sigma) falls from 5 to -5 on a line."""

    prediction: str = "x0"
    times: Callable = uniform

    def alpha(self, t):
        return jnp.sqrt(jax.nn.sigmoid(10 - 20 * t))

    def sigma(self, t):
        return jnp.sqrt(jax.nn.sigmoid(20 * t - 10))


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    with jax.enable_x64():
        yield


@functools.cache
def endpoint(sampler, process, steps):
    @jax.jit
    def run(key):
        return sampler(exact(process), process, example_keys(key, POINTS), (2,), steps)

    return np.asarray(run(jax.random.key(0)))


@functools.cache
def solution(process):
    """By Heun's method in 2,000 steps: its own error, as extrapolated, is below 1e-6."""
    return endpoint(bind(heun, times=grids.log_snr), process, 2000)


def error(sampler, process, steps):
    """The median over the points: not the mean, as a few start on the border of two components."""
    away = np.linalg.norm(endpoint(sampler, process, steps) - solution(process), axis=-1)
    return np.median(away)


karras, log_snr = dict(times=grids.karras), dict(times=grids.log_snr)


@pytest.mark.parametrize(
    "sampler, process, order",
    [
        (ddim, UniformLogSNR(), 1),
        (euler, UniformLogSNR(), 1),
        (heun, UniformLogSNR(), 2),
        (dpm_solver_2m, UniformLogSNR(), 2),
        (bind(unipc, order=1), UniformLogSNR(), 2),
        (unipc, UniformLogSNR(), 3),
        (heun, FlowMatching(), 2),
        (bind(dpm_solver_2m, **log_snr), FlowMatching(), 2),
        (bind(unipc, **log_snr), FlowMatching(), 3),
        (bind(heun, **karras), EDM(), 2),
    ],
)
def test_order_of_convergence(sampler, process, order):
    """Twice the steps, 2^order times less error."""
    few, many = (96, 192) if order < 3 else (48, 96)
    found = np.log2(error(sampler, process, few) / error(sampler, process, many))
    np.testing.assert_allclose(found, order, atol=0.2)


def test_unipc_of_higher_order_is_more_exact():
    process = UniformLogSNR()
    lower, higher = (error(of, process, 48) for of in (unipc, bind(unipc, order=3)))
    assert lower > 5 * higher


def test_multistep_methods_need_fewer_evaluations():
    """With steps of equal time too, where lambda makes one long jump at each end."""
    process = FlowMatching()
    reference = error(ddim, process, 32)
    for sampler in (dpm_solver_2m, unipc):
        assert error(sampler, process, 32) < 0.3 * reference


def test_float32_in_double_precision():
    """What is given counts as exact, whatever its type."""
    process, denoise, x = FlowMatching(), lambda x, t: x, np.ones((3, 2), np.float32)
    keys = example_keys(jax.random.key(0), 3)
    sample = bind(heun, denoise, process, keys, (2,), 5)
    for run in (
        lambda x: sample(start=x),
        lambda x: invert(denoise, process, x, 5),
        lambda x: ode_log_likelihood(denoise, process, x, keys, 5),
        lambda x: vlb(denoise, process, x, keys, 5),
    ):
        np.testing.assert_array_equal(run(x), run(np.float64(x)), strict=True)
