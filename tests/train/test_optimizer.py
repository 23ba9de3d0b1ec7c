import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvjax import config as configs
from cvjax.build import build
from cvjax.errors import InputError
from cvjax.train.optimizer import (
    Optimizer,
    by_path,
    optimizers_by_group,
    updates_by_group,
)
from cvjax.train.power_averages import tracked

CONFIGS = Path(__file__).parents[2] / "configs"
PARAMS = {
    "stem": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.ones(2)},
}


def updates(optimizer, gradient=1.0, count=1, steps=10):
    transform = optimizer.build(PARAMS, steps)
    state, params = transform.init(PARAMS), PARAMS
    gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), PARAMS)
    for _ in range(count):
        update, state = jax.jit(transform.update)(gradients, state, params)
        params = optax.apply_updates(params, update)
    return params, update


def test_the_first_rule_that_matches_the_whole_path_decides():
    values = by_path([(".*/bias", 0.0), ("head/.*", 2.0), (".*", 1.0)], PARAMS)
    assert values == {"stem/kernel": 1.0, "stem/bias": 0.0, "head/kernel": 2.0, "head/bias": 0.0}


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("kernel", 1.0), (".*", 0.0)], "'kernel' matches no parameter"),
        ([("haed/kernel", 1.0), (".*", 0.0)], "did you mean head/kernel"),
        ([(".*/kernel", 1.0)], "no rule covers"),
    ],
)
@pytest.mark.parametrize("field", ["weight_decay", "freeze"])
def test_rules_must_match_and_must_cover(rules, message, field):
    with pytest.raises(InputError, match=message):
        Optimizer(**{field: rules}).build(PARAMS, 10)


@pytest.mark.parametrize("transform", [optax.sgd, optax.adamw, optax.lion])
def test_weight_decay_is_decoupled_and_scheduled(transform):
    rules = ((".*/kernel", 0.1), (".*", 0.0))
    rate = functools.partial(optax.linear_schedule, init_value=1.0, end_value=0.0)
    params, _ = updates(Optimizer(transform, rate, weight_decay=rules), 0.0, count=3)
    kept = (1 - 0.1 * 1.0) * (1 - 0.1 * 0.9) * (1 - 0.1 * 0.8)
    np.testing.assert_allclose(params["head"]["kernel"], 2.0 * kept, rtol=1e-6)
    np.testing.assert_allclose(params["head"]["bias"], 1.0)


def test_the_decay_of_an_optimizer_within_another_is_turned_off_too():
    inner = functools.partial(tracked, transform=functools.partial(optax.adamw, b1=0.8))
    optimizer = Optimizer(inner, 0.1, weight_decay=((".*", 0.0),)).build(PARAMS, 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(updates))


def test_an_optimizer_that_takes_no_learning_rate_is_one_line():
    with pytest.raises(InputError, match="optimizer.transform: .*learning_rate"):
        Optimizer(optax.polyak_sgd).build(PARAMS, 10)


def test_each_schedule_is_as_long_as_the_updates_of_its_group():
    """Two objectives a step, and another count of micro-batches: 10 steps, 3 micro-batches each."""
    one = {"critic": Optimizer(optax.sgd), "generator": Optimizer(optax.sgd, accumulate=3)}
    groups = ["critic", "critic", "generator"]
    assert updates_by_group(one, groups, 10) == {"critic": 60, "generator": 10}
    assert updates_by_group(one["critic"], groups, 10) == {"critic": 20, "generator": 10}
    down = functools.partial(optax.linear_schedule, 1.0, 0.0)
    built = optimizers_by_group(Optimizer(optax.sgd, down), {"a": PARAMS}, ["a", "a"], 2)["a"]
    state, moves = built.init(PARAMS), []
    for _ in range(4):
        updates, state = built.update(jax.tree.map(jnp.ones_like, PARAMS), state)
        moves.append(-float(jax.tree.leaves(updates)[0].mean()))
    np.testing.assert_allclose(moves, [1, 0.75, 0.5, 0.25])


def test_two_places_for_weight_decay_are_refused():
    transform = functools.partial(optax.adamw, weight_decay=0.1)
    with pytest.raises(InputError, match="keep one"):
        Optimizer(transform, weight_decay=((".*", 0.1),)).build(PARAMS, 10)


def test_frozen_parameters_stay_and_have_no_state():
    optimizer = Optimizer(
        optax.adam, 0.1, freeze=(("stem/.*", True), (".*", False)), weight_decay=((".*", 0.5),)
    )
    params, _ = updates(optimizer, count=3)
    assert (params["stem"]["kernel"] == 1.0).all()
    assert (params["head"]["kernel"] != 2.0).all()
    shapes = [np.shape(x) for x in jax.tree.leaves(optimizer.build(PARAMS, 10).init(PARAMS))]
    assert (2, 3) not in shapes and (3, 2) in shapes


def test_clipping_by_global_norm():
    _, update = updates(Optimizer(optax.sgd, 1.0, clip_norm=0.5), gradient=100.0)
    np.testing.assert_allclose(optax.global_norm(update), 0.5, rtol=1e-6)


def test_the_gradient_is_clipped_and_not_the_update():
    _, update = updates(Optimizer(optax.sgd, 0.1, clip_norm=0.5), gradient=100.0)
    np.testing.assert_allclose(optax.global_norm(update), 0.05, rtol=1e-6)


def test_schedules_are_completed_with_the_length_of_the_run():
    cosine = functools.partial(optax.cosine_decay_schedule, init_value=2.0)
    schedule = Optimizer(learning_rate=cosine, warmup_steps=20).schedule(120)
    np.testing.assert_allclose([schedule(n) for n in (0, 10, 20)], [0.0, 1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose([schedule(n) for n in (70, 120)], [1.0, 0.0], atol=1e-6)
    assert Optimizer(learning_rate=0.3).schedule(5)(99) == pytest.approx(0.3)
    rise = functools.partial(optax.linear_schedule, init_value=0.0, end_value=2.0)
    joined = functools.partial(
        optax.join_schedules, schedules=[rise, cosine, cosine], boundaries=[10, 30]
    )
    schedule = Optimizer(learning_rate=joined).schedule(40)
    found = [schedule(n) for n in (5, 10, 20, 29.999, 30, 35, 40)]
    np.testing.assert_allclose(found, [1, 2, 1, 0, 2, 1, 0], atol=1e-4)
    own = optax.exponential_decay(1.0, 10, 0.5)
    assert Optimizer(learning_rate=own).schedule(5) is own


@pytest.mark.parametrize(
    "maker, fields",
    [
        ("constant_schedule", dict(value=0.1)),
        ("cosine_decay_schedule", dict(init_value=0.1)),
        ("cosine_onecycle_schedule", dict(peak_value=0.1)),
        ("exponential_decay", dict(init_value=0.1, decay_rate=0.9)),
        ("linear_onecycle_schedule", dict(peak_value=0.1)),
        ("linear_schedule", dict(init_value=0.1, end_value=0.0)),
        ("piecewise_constant_schedule", dict(init_value=0.1, boundaries_and_scales={"5": 0.1})),
        ("polynomial_schedule", dict(init_value=0.1, end_value=0.0, power=2)),
        ("sgdr_schedule", dict(cosine_kwargs=[dict(
            init_value=0.0, peak_value=0.1, decay_steps=9, warmup_steps=2, end_value=0.0)])),
        ("warmup_cosine_decay_schedule", dict(init_value=0.0, peak_value=0.1, warmup_steps=3)),
        ("warmup_exponential_decay_schedule", dict(
            init_value=0.0, peak_value=0.1, warmup_steps=3, decay_rate=0.9)),
    ],
)  # fmt: skip
def test_every_optax_schedule_by_name(maker, fields):
    rate = functools.partial(getattr(optax, maker), **fields)
    schedule = Optimizer(learning_rate=rate).schedule(20)
    values = np.array([schedule(n) for n in range(21)])
    assert np.isfinite(values).all() and values.max() <= 0.1 + 1e-6 and values.max() > 0.02


@pytest.mark.parametrize("value", [1e30, "a"])
def test_what_a_schedule_does_not_take_is_one_line(value):
    rate = functools.partial(optax.cosine_onecycle_schedule, peak_value=0.1, pct_start=value)
    with pytest.raises(InputError, match="optimizer.learning_rate: "):
        Optimizer(learning_rate=rate).schedule(20)


def test_schedules_count_updates_not_micro_batches():
    rate = functools.partial(optax.linear_schedule, init_value=1.0, end_value=0.0)
    _, update = updates(Optimizer(optax.sgd, rate, accumulate=2), count=4, steps=4)
    np.testing.assert_allclose(update["head"]["bias"], -0.75, rtol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(accumulate=0), "accumulate is 0"),
        (dict(clip_norm=-1.0), "clip_norm is -1"),
        (dict(warmup_steps=-1), "warmup_steps is -1"),
        (dict(learning_rate=-0.1), "learning_rate is -0.1"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(learning_rate=None), "learning_rate is None; it must be a number"),
        (dict(accumulate=1.5), "accumulate is 1.5; it must be a whole number"),
        (dict(weight_decay=((".*", "x"),)), "weight_decay of '.*' is 'x'; it must be a number"),
        (dict(weight_decay=((".*", -0.1),)), "weight_decay of '.*' is -0.1"),
        (dict(freeze=((".*", "no"),)), "freeze of '.*' is 'no'; it can be False or True"),
    ],
)
def test_impossible_values(fields, message):
    with pytest.raises(InputError, match=message):
        Optimizer(**fields)


@pytest.mark.parametrize(
    "optimizer, message",
    [
        ({"modle": optax.sgd(1.0)}, "did you mean model"),
        ({}, "needs an Optimizer"),
        (None, "needs an Optimizer"),
    ],
)
def test_an_optimizer_for_every_group(optimizer, message):
    with pytest.raises(InputError, match=message):
        optimizers_by_group(optimizer, {"model": PARAMS}, ["model"], 10)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_s_optimizer_fits(path):
    """In full: the tiny recipes, which are run, have another."""
    config = configs.buildable(configs.read(str(path)))
    for stage in config.get("stages", {"": config}).values():
        params = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}
        given = build({"optimizer": stage["optimizer"]})["optimizer"]
        for one in given.values() if isinstance(given, dict) else [given]:
            changed = replace(one, freeze=None, weight_decay=one.weight_decay and ((".*", 0.1),))
            transform = changed.build(params, 10)
            updates, _ = transform.update(params, transform.init(params), params)
            assert jnp.all(jnp.isfinite(updates["kernel"]))
