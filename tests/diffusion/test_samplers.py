"""Samplers with the exact denoiser of a Gaussian mixture in place of a network."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cvjax.diffusion import grids
from cvjax.diffusion.process import (
    EDM,
    FlowMatching,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    convert,
)
from cvjax.diffusion.samplers import (
    adaptive,
    ddim,
    ddpm,
    dpm_solver_2m,
    euler,
    euler_maruyama,
    evaluations,
    example_keys,
    heun,
    predictor_corrector,
    unipc,
)
from cvjax.diffusion.samplers.adaptive import solve
from cvjax.diffusion.samplers.integration import begin, normal
from cvjax.errors import InputError
from tests.diffusion.mixture import assert_is_mixture, exact

bind = functools.partial
churned = bind(heun, s_churn=20.0, s_min=0.05, s_max=50.0)
karras, log_snr = dict(times=grids.karras), dict(times=grids.log_snr)
LINEAR = VariancePreserving("linear", "eps")
EXPLODING = VarianceExploding(sigma_max=20.0)
SAMPLERS = {
    "ddim": ddim,
    "eta": bind(ddim, eta=0.5),
    "ddpm": ddpm,
    "euler": euler,
    "heun": heun,
    "churn": churned,
    "dpm_solver_2m": dpm_solver_2m,
    "unipc": unipc,
    "euler_maruyama": bind(euler_maruyama, **log_snr),
    "predictor_corrector": predictor_corrector,
    "adaptive": adaptive,
}


def sample(sampler, process, steps, count, seed=0):
    keys = example_keys(jax.random.key(seed), count)
    return sampler(exact(process), process, keys, (2,), steps)


draw = jax.jit(sample, static_argnums=(0, 1, 2, 3))
# Where computing takes longer than compiling: half of the time together.
draw_many = jax.jit(
    sample, static_argnums=(0, 1, 2, 3), compiler_options={"xla_backend_optimization_level": 1}
)


@pytest.mark.parametrize(
    "sampler, process, steps",
    [
        (ddim, VariancePreserving("cosine"), 64),
        (euler, SubVariancePreserving(), 64),
        (bind(heun, **karras), LINEAR, 32),
        (bind(churned, **karras), EDM(), 64),
        (dpm_solver_2m, EXPLODING, 32),
        (dpm_solver_2m, FlowMatching(), 32),
        (bind(unipc, **karras), EDM(), 32),
        (ddpm, FlowMatching(), 128),
        (bind(ddpm, **log_snr), LINEAR, 128),
        (euler_maruyama, LINEAR, 256),
        (bind(euler_maruyama, **log_snr), FlowMatching(), 256),
        (predictor_corrector, EXPLODING, 128),
        (bind(predictor_corrector, **log_snr), SubVariancePreserving(), 128),
        (predictor_corrector, FlowMatching(), 128),
        (adaptive, FlowMatching(), 200),
    ],
)
def test_recovers_the_mixture(sampler, process, steps):
    # Beyond the statistical error, that of the steps and of the noise that is left at t = 0: by
    # measure it is below half of this.
    bias = dict(weights=0.002, means=0.005, covariances=0.003)
    assert_is_mixture(draw_many(sampler, process, steps, 20_000), bias)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_its_key_alone(name):
    process = FlowMatching()
    sample = jax.jit(lambda keys: SAMPLERS[name](exact(process), process, keys, (2,), 24))
    keys, others = (example_keys(jax.random.key(seed), 16) for seed in (3, 4))
    whole = sample(keys)
    assert len(np.unique(whole[:, 0])) == 16
    mixed = sample(jnp.concatenate([others[:8], keys[:8]]))
    np.testing.assert_allclose(mixed[8:], whole[:8], atol=1e-5)
    if name in ("ddpm", "predictor_corrector", "adaptive"):  # the others are made of the same
        part = sample(example_keys(jax.random.key(3), 4, first=12))
        np.testing.assert_allclose(part, whole[12:], atol=1e-5)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(sample(spread), whole, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_is_one_program_whatever_the_number_of_steps(name):
    """All can be traced with keys that are not known, and nothing is unrolled."""
    traced = []

    def program(steps):
        calls = []

        def denoise(x, t):
            calls.append(t)
            return x

        run = lambda keys: SAMPLERS[name](denoise, LINEAR, keys, (2,), steps)  # noqa: E731
        text = str(jax.make_jaxpr(run)(example_keys(jax.random.key(0), 4)))
        traced.append(len(calls))
        assert "callback" not in re.sub(r"error_if.*", "", text) or name == "adaptive"
        return text.count("\n")

    assert program(16) == program(40)
    assert traced[0] == traced[1] <= (8 if name == "adaptive" else 4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_allowed_and_none_is_not(name):
    process = VarianceExploding() if name == "euler_maruyama" else LINEAR
    if name == "churn":
        with pytest.raises(InputError, match="the only step begins at t = 1"):
            draw(SAMPLERS[name], process, 1, 4)
    elif name != "adaptive":
        assert jnp.all(jnp.isfinite(draw(SAMPLERS[name], process, 1, 4)))
    with pytest.raises(InputError, match="steps is 0; it must be"):
        draw(SAMPLERS[name], process, 0, 4)


def test_evaluations_are_those_of_the_network():
    """Counted in the program and, by a callback, while it runs."""
    process, keys = EXPLODING, example_keys(jax.random.key(0), 1)
    expected = dict(heun=19, churn=19, predictor_corrector=19)
    for name, sampler in SAMPLERS.items():
        if name == "adaptive":
            continue
        assert evaluations(sampler, process, 10) == expected.get(name, 10), name
    assert evaluations(bind(predictor_corrector, corrections=3), process, 10) == 37
    called = []

    def denoise(x, t):
        jax.debug.callback(lambda t: called.append(float(t)), t[0], ordered=True)
        return exact(process)(x, t)

    for sampler in (heun, bind(predictor_corrector, corrections=2)):
        called.clear()
        jax.jit(lambda keys, s=sampler: s(denoise, process, keys, (2,), 10))(keys)
        jax.effects_barrier()
        assert len(called) == evaluations(sampler, process, 10)
    with pytest.raises(InputError, match="solve returns them"):
        evaluations(adaptive, process, 10)


def test_adaptive_steps_count_and_keep_the_tolerance():
    process = FlowMatching()

    @jax.jit
    def run(tolerance):
        keys = example_keys(jax.random.key(0), 32)
        return solve(exact(process), process, keys, (2,), 400, rtol=tolerance, atol=tolerance)

    fine, many = run(1e-5)
    coarse, few = run(1e-2)
    # Some few start on the border of two components, where errors grow.
    assert 1e-4 < jnp.median(jnp.abs(coarse - fine)) < 5e-2
    assert np.all(few < many) and len(np.unique(many)) > 1  # each image its own
    with pytest.raises(JaxRuntimeError, match=r"InputError: .* after 2 steps for 4 of 4 images"):
        jax.block_until_ready(draw(adaptive, process, 2, 4))


def test_adaptive_has_no_grid_that_could_fail_to_fit():
    """20 equal steps of EDM's sigma would see no detail; these steps are as long as they may be."""
    process, keys = EDM(), example_keys(jax.random.key(0), 8)
    images, counts = jax.jit(lambda keys: solve(exact(process), process, keys, (2,), 40))(keys)
    assert np.isfinite(images).all() and np.abs(images).max() < 5 and (counts > 30).all()
    with pytest.raises(InputError, match="steps is 0"):
        adaptive(exact(process), process, keys, (2,), 0)


def test_adaptive_with_traced_parameters_and_labels():
    """As in a task, where both are arguments of the jitted program."""
    process, keys = FlowMatching(), example_keys(jax.random.key(0), 6)

    def run(sampler, scale, labels, keys, steps):
        denoise = lambda x, t: scale * x + labels[:, None]  # noqa: E731
        return sampler(denoise, process, keys, (2,), steps)

    run = jax.jit(run, static_argnums=(0, 4))
    scale, labels = jnp.float32(0.5), jnp.arange(6) % 3
    expected = run(heun, scale, labels, keys, 64)
    np.testing.assert_allclose(run(adaptive, scale, labels, keys, 64), expected, atol=2e-3)
    scales = jnp.float32([0.5, 0.0])
    both = jax.vmap(lambda scale: run(adaptive, scale, labels, keys, 64))(scales)
    np.testing.assert_allclose(both[0], expected, atol=2e-3)


def test_adaptive_without_diffrax_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(InputError, match=r"pip install 'cvjax\[diffusion\]'"):
        adaptive(exact(LINEAR), LINEAR, example_keys(jax.random.key(0), 2), (2,), 5)


def test_ddim_on_straight_lines_is_euler():
    process, denoise = FlowMatching(), exact(FlowMatching())
    keys = example_keys(jax.random.key(0), 16)
    y = process.sigma(1.0) * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    x, z = (draw(sampler, process, 10, 16) for sampler in (ddim, euler))
    np.testing.assert_allclose(x, z, atol=1e-5)
    denoise = jax.jit(denoise)
    for i in range(10):
        y = y - 0.1 * denoise(y, jnp.full(16, 1 - i / 10))
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_heun_with_churn_is_algorithm_2_of_edm():
    """Line by line in NumPy, with sigma as time; the noise is that of the sampler's keys."""
    process, steps, keys = EDM(), 12, example_keys(jax.random.key(5), 8)
    settings = dict(s_churn=4.0, s_min=0.05, s_max=50.0, s_noise=1.007)
    sampler, denoise = bind(heun, times=grids.karras, **settings), jax.jit(exact(process))
    found = jax.jit(lambda keys: sampler(exact(process), process, keys, (2,), steps))(keys)

    def slope(x, sigma):
        t = jnp.full(8, (sigma - 1e-4) / (80 - 1e-4), jnp.float32)
        return (x - np.asarray(denoise(jnp.asarray(x, jnp.float32), t))) / sigma

    i = np.arange(steps)
    sigmas = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = np.append(sigmas, 1e-4)
    x = 80 * np.asarray(jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys), np.float64)
    for i in range(steps):
        sigma, gamma = sigmas[i], 0.0
        if 0.05 <= sigma <= 50:
            gamma = min(4.0 / steps, np.sqrt(2) - 1)
            higher = sigma * (1 + gamma)
            noise = np.asarray(normal(keys, (2,), i))
            x = x + np.sqrt(higher**2 - sigma**2) * 1.007 * noise
            sigma = higher
        here = slope(x, sigma)
        guess = x + (sigmas[i + 1] - sigma) * here
        x = guess
        if i < steps - 1:
            x = x + (sigmas[i + 1] - sigma) * (slope(guess, sigmas[i + 1]) - here) / 2
    np.testing.assert_allclose(found, x, atol=2e-3)  # float32 at sigma = 80 keeps 5e-6 of 80


def test_churn_is_held_below_the_root_of_two():
    keys, settings = example_keys(jax.random.key(0), 4), dict(times=grids.karras)

    @jax.jit
    def both(keys):
        return [
            heun(exact(EDM()), EDM(), keys, (2,), 12, s_churn=churn, **settings)
            for churn in (1e3, 12 * (2**0.5 - 1))
        ]

    np.testing.assert_allclose(*both(keys), atol=1e-4)


def test_the_last_step_of_euler_maruyama_adds_no_noise():
    process, keys = VarianceExploding(), example_keys(jax.random.key(0), 4)
    run = jax.jit(lambda keys: (
        euler_maruyama(lambda x, t: 0 * x, process, keys, (2,), 1), begin(process, keys, (2,))
    ))  # fmt: skip
    np.testing.assert_allclose(*run(keys), rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm_solver_2m", "unipc", "adaptive"])
def test_start_in_place_of_noise(name):
    keys, other = (example_keys(jax.random.key(seed), 4) for seed in (0, 1))
    noise = LINEAR.sigma(1.0) * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    run = jax.jit(
        lambda keys, **start: SAMPLERS[name](exact(LINEAR), LINEAR, keys, (2,), 24, **start)
    )
    if name in ("heun", "unipc"):  # the others begin in the same way
        np.testing.assert_allclose(run(other, start=noise), run(keys), atol=1e-5)
        assert run(other, start=noise.astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(InputError, match="start is"):
        run(keys, start=noise[:2])


@pytest.mark.parametrize(
    "process", [FlowMatching(), VariancePreserving("cosine")], ids=lambda p: type(p).__name__
)
def test_a_pole_of_the_drift_does_not_fit_equal_steps(process):
    name = f"euler_maruyama does not fit {type(process).__name__}"
    with pytest.raises(InputError, match=f"{name} .* take times=grids.log_snr"):
        draw(euler_maruyama, process, 50, 4)


def test_steps_that_are_too_few_for_euler_maruyama_leave_the_noise_that_it_says():
    process, keys = VarianceExploding(prediction="x0"), example_keys(jax.random.key(0), 1000)
    black = jax.jit(lambda keys: euler_maruyama(lambda x, t: 0 * x, process, keys, (2,), 11))
    np.testing.assert_allclose(jnp.std(black(keys)), 0.273, rtol=0.1)
    with pytest.raises(InputError, match="its 10 steps leave noise of the standard deviation 3.58"):
        draw(euler_maruyama, process, 10, 4)


@pytest.mark.parametrize(
    "sampler, message",
    [
        (bind(ddim, eta=1.5), "eta is 1.5"),
        (bind(unipc, order=4), "order is 4"),
        (bind(heun, s_churn=-1.0), "s_churn is -1.0"),
        (bind(heun, s_noise=-1.0), "s_noise is -1.0"),
        (bind(churned, s_min=60.0), "no step begins at a noise level"),
        (bind(predictor_corrector, corrections=-1), "corrections is -1"),
        (bind(predictor_corrector, snr=0.0), "snr is 0.0"),
    ],
)
def test_impossible_settings(sampler, message):
    with pytest.raises(InputError, match=message):
        draw(sampler, LINEAR, 20, 4)


def test_one_langevin_step_keeps_a_gaussian():
    """Its stationary variance is sigma^2 / (1 - snr^2): that of the discretization, exact."""
    process = VarianceExploding(0.5, 0.5001, prediction="score")
    denoise = lambda x, t: -x / 0.25  # noqa: E731
    sampler = bind(predictor_corrector, corrections=200, snr=0.3)
    keys = example_keys(jax.random.key(0), 2000)
    x = jax.jit(lambda keys: sampler(denoise, process, keys, (4,), 2))(keys)
    # 8,000 numbers: 4 standard errors of a variance are 4 sqrt(2 / 8000) = 6.3 %.
    np.testing.assert_allclose(jnp.var(x), 0.25 / (1 - 0.09), rtol=0.063)
    assert jnp.allclose(convert(process, "score", "eps", denoise(x, 0), x, jnp.zeros(2000)), 2 * x)


def test_predictor_corrector_is_algorithm_1_of_score_sde():
    """Line by line in NumPy, where the noise changes much in a step."""
    process, steps, corrections, snr = VarianceExploding(0.1, 10.0, "score"), 3, 2, 0.2
    keys, denoise = example_keys(jax.random.key(5), 8), exact(VarianceExploding(0.1, 10.0, "score"))
    sampler = bind(predictor_corrector, corrections=corrections, snr=snr)
    found, x = jax.jit(
        lambda keys: (sampler(denoise, process, keys, (2,), steps), begin(process, keys, (2,)))
    )(keys)
    for i in range(steps):
        t, s = (np.full(8, 1 - at / steps, np.float32) for at in (i, i + 1))
        high, low = (process.sigma(time)[:, None] for time in (t, s))
        # Ancestral sampling, their equation 47, and its variance.
        x = x + (high**2 - low**2) * denoise(x, t)
        if i == steps - 1:
            break
        number = i * (corrections + 1)
        x = x + low * np.sqrt(1 - low**2 / high**2) * normal(keys, (2,), number)
        for j in range(corrections):
            length = 2 * (snr * low) ** 2
            x = x + length * denoise(x, s)
            x = x + np.sqrt(2 * length) * normal(keys, (2,), number + 1 + j)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)
