"""Grids of times."""

import functools

import jax
import numpy as np
import pytest

from cvjax.diffusion import grids
from cvjax.diffusion.process import (
    EDM,
    FlowMatching,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    log_snr,
)
from cvjax.diffusion.samplers.integration import time_steps
from cvjax.errors import InputError

PROCESSES = [
    VariancePreserving("cosine"),
    VariancePreserving("linear"),
    SubVariancePreserving(),
    FlowMatching(),
    VarianceExploding(),
    EDM(),
]

# Grids are computed outside of programs, each operation of each shape for itself: the tests have
# few numbers of steps, and share their grids.
times_of = functools.cache(time_steps)


@functools.partial(jax.jit, static_argnums=0)
def marginals(process, times):
    return process.alpha(times), process.sigma(times), log_snr(process, times)


def at(process, times):
    return map(np.asarray, marginals(process, times))


@pytest.mark.parametrize("steps", [2, 18, 1000])
def test_the_sigmas_of_edm(steps):
    """sigma_i of T. Karras et al., equation 5, and 0 (here a twentieth of sigma_min) at the end."""
    i, rho = np.arange(steps), 7
    expected = (80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    _, found, _ = at(EDM(), times_of(grids.karras, EDM(), steps))
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-5)  # float32 ** 7
    np.testing.assert_allclose(found[-1], 0, atol=1.01e-4)
    if steps == 18:  # as they are printed by the authors' own code
        np.testing.assert_allclose(found[[1, 2, -2]], [57.586, 40.786, 0.002], rtol=1e-4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_karras_for_every_process(process):
    """The seventh roots of sigma / alpha fall on a line, down to sigma_min or to t = 0."""
    alpha, sigma, _ = at(process, times_of(grids.karras, process, 18))
    ratio = np.float64(sigma / alpha)
    reaches = ratio[-1] < getattr(process, "sigma_min", 0.002)
    roots = (ratio[:-1] if reaches else ratio) ** (1 / 7)
    if reaches:
        np.testing.assert_allclose(ratio[-2], getattr(process, "sigma_min", 0.002), rtol=1e-4)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=2e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_log_snr_for_every_process(process):
    *_, ratio = at(process, times_of(grids.log_snr, process, 18))
    falls = np.diff(ratio)
    # sigma / alpha = 1000 is known to 6e-5: alpha = 1 - sigma.
    np.testing.assert_allclose(falls, falls[0], atol=5e-4)


def test_uniform_and_quadratic():
    process = FlowMatching()
    np.testing.assert_allclose(time_steps(grids.uniform, process, 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(
        time_steps(grids.quadratic, process, 4), [1, 9 / 16, 1 / 4, 1 / 16, 0]
    )


@pytest.mark.parametrize("grid", [grids.uniform, grids.quadratic, grids.karras, grids.log_snr])
def test_any_number_of_steps(grid):
    for process in PROCESSES[3:]:
        # Two steps that are equal, or nearly, do not fit EDM; see below.
        few = isinstance(process, EDM) and grid in (grids.uniform, grids.quadratic)
        for steps in (1, 1000) if few else (1, 2, 1000):
            times = times_of(grid, process, steps)
            assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()


def test_a_process_that_stops_early_has_all_grids():
    """Where even `karras` begins its last step at much noise, no other grid is refused for it."""
    for grid in (grids.uniform, grids.quadratic, grids.karras, grids.log_snr):
        process = VarianceExploding(sigma_min=1.0)
        assert len(time_steps(grid, process, 50)) == 51
    assert len(time_steps(grids.karras, VariancePreserving(), 2)) == 3


def test_what_is_no_grid():
    process = FlowMatching()
    with pytest.raises(InputError, match="steps is 0; it must be"):
        time_steps(grids.uniform, process, 0)
    for wrong in (
        lambda process, steps: np.linspace(0.0, 1.0, steps + 1),
        lambda process, steps: np.linspace(1.0, 0.0, steps),
        lambda process, steps: np.array([1.0, 0.5, 0.5, 0.0]),
        lambda process, steps: np.array([1.0, np.nan, 0.5, 0.0]),
    ):
        with pytest.raises(InputError, match="must give 4 that fall strictly, from 1 to 0"):
            time_steps(wrong, process, 3)
    with pytest.raises(InputError, match="rho is 0"):
        grids.karras(process, 3, rho=0)
    for sigma_min in (0.0, 2000.0):
        with pytest.raises(InputError, match="sigma_min is"):
            grids.karras(process, 3, sigma_min=sigma_min)


def test_equal_steps_do_not_fit_edm():
    with pytest.raises(InputError, match=r"uniform does not fit EDM: .* = 1.25.*grids.karras"):
        time_steps(functools.partial(grids.uniform), EDM(), 64)
    for steps in (2, 9):
        with pytest.raises(InputError, match="uniform does not fit EDM"):
            time_steps(grids.uniform, EDM(), steps)
        time_steps(grids.karras, EDM(), steps)
    time_steps(grids.uniform, EDM(), 1)  # from noise to data at once
