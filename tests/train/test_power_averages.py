"""Averages of any width after the training, against the average taken directly."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvjax.errors import InputError
from cvjax.train import power_averages
from cvjax.train.loop import fit
from cvjax.train.optimizer import Optimizer
from cvjax.train.power_averages import averaged_params, combination, exponent, tracked, width_of
from tests.train.toys import Linear, Regression

COUNT = 400
WIDTHS = (0.05, 0.1)


def directly(values, width):
    """Weights (tau^(gamma + 1) - (tau - 1)^(gamma + 1)) / t^(gamma + 1): the recursion unrolled."""
    tau, power = np.arange(len(values) + 1), exponent(width) + 1
    return np.diff((tau / len(values)) ** power) @ values


@functools.cache
def walk():
    """A scalar that wanders: the parameters shown to the optimizer, and the averages after each."""
    steps = np.random.default_rng(0).normal(size=COUNT + 1).astype(np.float32)
    optimizer = tracked(1.0, transform=optax.sgd, widths=WIDTHS)

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update({"x": gradient}, state, params)
        averages = [state[1]["power_averages"][str(width)]["x"] for width in WIDTHS]
        return (optax.apply_updates(params, updates), state), (params["x"], *averages)

    start = {"x": jnp.float32(5.0)}
    _, shown = jax.jit(lambda s: jax.lax.scan(step, (start, optimizer.init(start)), s))(steps)
    # The first is the beginning, which is not averaged.
    return [np.asarray(row, np.float64)[1:] for row in shown]


@pytest.mark.parametrize("number", [0, 1])
def test_tracked_is_the_average_with_the_profile(number):
    values, *averages = walk()
    for count in (1, 2, 3, 50, COUNT):
        expected = directly(values[:count], WIDTHS[number])
        # float32, over 400 steps of numbers of about 20.
        np.testing.assert_allclose(averages[number][count - 1], expected, atol=2e-4)


def test_the_average_of_bfloat16_parameters_does_not_stand_still():
    optimizer = tracked(1.0, transform=optax.sgd, widths=(0.1,))
    values = jnp.arange(COUNT + 1, dtype=jnp.float32).astype(jnp.bfloat16) / COUNT
    step = lambda state, x: (optimizer.update(0 * x, state, x)[1], None)  # noqa: E731
    state, _ = jax.jit(lambda: jax.lax.scan(step, optimizer.init(values[0]), values))()
    average = state[1]["power_averages"]["0.1"]
    np.testing.assert_allclose(average, directly(np.float64(values[1:]), 0.1), rtol=1e-4)


@pytest.mark.parametrize("width", [0.05, 0.06, 0.075, 0.1, 0.13])
def test_any_width_afterwards(width):
    values, *averages = walk()
    counts = np.arange(50, COUNT + 1, 50)
    factors = combination(np.tile(counts, 2), np.repeat(WIDTHS, len(counts)), COUNT, width)
    snapshots = np.concatenate([average[counts - 1] for average in averages])
    expected = directly(values, width)
    others = [directly(values, other) for other in (width / 1.3, width * 1.3)]
    # A tenth of what another width would make: the profiles of 16 snapshots are not all of them.
    error = abs(factors @ snapshots - expected)
    assert error < 0.1 * min(abs(other - expected) for other in others)
    assert error < (1e-3 if width in WIDTHS else 0.05)


@pytest.mark.parametrize("width", [0.02, 0.03, 0.05, 0.075, 0.15, 0.25])
def test_what_did_not_change_stays_as_it_is_however_few_snapshots(width):
    """The nearest sum of few profiles is not an average: its factors were .67 to 1.04 in all."""
    for number in (1, 2, 3, 8):
        counts = np.repeat(np.arange(1, number + 1) * 1000 / number, 2)
        factors = combination(counts, np.tile(WIDTHS, number), 1000, width)
        np.testing.assert_allclose(factors.sum(), 1, rtol=1e-12)
    only = combination([1000], [0.1], 1000, width)
    np.testing.assert_allclose(only, [1], rtol=1e-12)


def test_widths_and_exponents():
    for gamma in (0.1, 1.0, 6.94, 16.97, 100.0):
        np.testing.assert_allclose(exponent(width_of(gamma)), gamma, rtol=1e-6)
        # The standard deviation of a density by summation.
        tau = (np.arange(100_000) + 0.5) / 100_000
        p = (gamma + 1) * tau**gamma / 100_000
        deviation = np.sqrt(p @ tau**2 - (p @ tau) ** 2)
        np.testing.assert_allclose(width_of(gamma), deviation, rtol=1e-3)
    # Karras et al., section 3.1: 6.94 and 16.97 are 10% and 5%.
    np.testing.assert_allclose([exponent(0.1), exponent(0.05)], [6.94, 16.97], atol=0.01)
    for wrong in (0.0, 0.3):
        with pytest.raises(InputError, match=f"width is {wrong}"):
            exponent(wrong)


def test_each_group_counts_its_own_steps(tmp_path, monkeypatch):
    """A critic may have taken others than the generator; its name comes first."""
    shape, states = {"x": np.zeros(2, np.float32)}, {}
    for step, (mine, of_other) in {1: (100, 500), 2: (200, 600)}.items():
        states[step] = {
            f"opt_state/{group}/1/power_averages/{name}": value
            for group, count in (("critic", of_other), ("generator", mine))
            for name, value in (
                ("count", np.int32(count + 1)),
                ("0.05/x", np.float32([step, 1])),
                ("0.1/x", np.float32([10 * step, 1])),
            )
        }
    for function, fake in dict(
        step_folders=lambda _: {step: step for step in states},
        damage=lambda _: None,
        read_metadata=lambda step: types.SimpleNamespace(arrays=states[step]),
        read_arrays=lambda step, names: {name: states[step][name] for name in names},
    ).items():
        monkeypatch.setattr(power_averages, function, fake)
    for group, counts in (("critic", [500, 500, 600, 600]), ("generator", [100, 100, 200, 200])):
        factors = combination(counts, [0.05, 0.1, 0.05, 0.1], counts[-1], 0.07)
        found = averaged_params(tmp_path, group, shape, 0.07)["x"]
        np.testing.assert_allclose(found, factors @ [[1, 1], [10, 1], [2, 1], [20, 1]], rtol=1e-6)


def test_of_a_run(tmp_path):
    """The checkpoints of a run that was tracked have what is needed, and those of others not."""
    make = functools.partial(tracked, transform=functools.partial(optax.sgd))
    options = dict(steps=40, batch_size=16, checkpoint_every=5, keep=8, tensorboard=False)
    result = fit(
        Regression(), Linear(), optimizer=Optimizer(make, 0.05), workdir=tmp_path / "run", **options
    )
    params = result.state.params["model"]
    kept = result.state.opt_state["model"]
    (state,) = [part[1] for part in jax.tree.leaves(kept, is_leaf=is_tracked) if is_tracked(part)]
    found = averaged_params(tmp_path / "run", "model", params, 0.1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        found, state["power_averages"]["0.1"],
    )  # fmt: skip
    between = averaged_params(tmp_path / "run", "model", params, 0.07)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(between), strict=True):
        assert a.dtype == b.dtype and not np.array_equal(a, b)
    with pytest.raises(InputError, match="no checkpoint with averages"):
        averaged_params(tmp_path, "model", params, 0.1)


def test_what_was_frozen_is_its_own_average(tmp_path):
    make = functools.partial(tracked, transform=functools.partial(optax.sgd))
    optimizer = Optimizer(make, 0.05, freeze=((".*bias", True), (".*", False)))
    options = dict(steps=6, batch_size=16, checkpoint_every=3, keep=8, tensorboard=False)
    result = fit(Regression(), Linear(), optimizer=optimizer, workdir=tmp_path, **options)
    params = result.state.params["model"]
    found = power_averages.flatten(averaged_params(tmp_path, "model", params, 0.1))
    for name, value in power_averages.flatten(params).items():
        assert np.array_equal(found[name], value) == name.endswith("bias"), name
    larger = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), params)
    with pytest.raises(InputError, match=r"params/model/.*\[.*\]; params say"):
        averaged_params(tmp_path, "model", larger, 0.1)
    with pytest.raises(InputError, match="has no params/model/other: it is of another model"):
        averaged_params(tmp_path, "model", {"other": np.zeros(2)}, 0.1)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_share_of_an_update_is_exact_after_millions(width):
    """Equation 127, which in float32 lost a fifth of its value at ten million updates."""
    optimizer = tracked(1.0, transform=optax.sgd, widths=[width])
    params, gamma = {"x": jnp.float32(1.0)}, exponent(width)
    state = optimizer.init(params)
    for count in (1, 2, 100, 10**5, 10**6, 10**7, 2 * 10**9):
        averages = {"count": jnp.int32(count), str(width): {"x": jnp.float32(0.0)}}
        _, (_, moved) = jax.jit(optimizer.update)(
            params, (state[0], {"power_averages": averages}), params
        )
        share = -np.expm1((gamma + 1) * np.log1p(-1 / count)) if count > 1 else 1.0
        found = moved["power_averages"][str(width)]["x"]
        np.testing.assert_allclose(found, share, rtol=1e-5)  # some roundings of float32
    for widths in ((), ("a",), (-0.1,)):
        with pytest.raises(InputError, match="widths"):
            tracked(1.0, transform=optax.sgd, widths=widths)


def is_tracked(part):
    return isinstance(part, tuple) and len(part) == 2 and "power_averages" in (part[1] or {})
