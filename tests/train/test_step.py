from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from cvjax.errors import InputError
from cvjax.train import sharding
from cvjax.train.optimizer import Optimizer, optimizers_by_group
from cvjax.train.state import TrainState
from cvjax.train.step import _all_finite, initial_state, make_train_step, warmed_up_decay
from cvjax.train.task import Objective, Task, mean
from tests.train.toys import (
    Adversarial,
    Bootstrap,
    MetaLearning,
    Network,
    Regression,
    Valid,
    batch_of,
)


def start(task, optimizer, ema=None, steps=100):
    ema = ema or {}
    groups = [group for group, _ in task.objectives]
    params, _ = jax.eval_shape(task.init, jax.random.key(0), batch_of(0))
    optimizers = optimizers_by_group(optimizer, params, groups, steps)
    state = jax.jit(lambda r, b: initial_state(task, b, r, optimizers, ema))(
        jax.random.key(0), batch_of(0)
    )
    return state, optimizers


def train(task, optimizer, batches, ema=None, run=None):
    state, optimizers = start(task, optimizer, ema)
    step = (run or jax.jit)(make_train_step(task, optimizers, ema))
    rows = []
    for batch in batches:
        state, metrics = step(state, batch)
        rows.append({name: float(m.compute()) for name, m in metrics.items()})
    return state, rows


def assert_close(one, two, rtol=0.0, atol=0.0):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize("task", [Regression(), Adversarial(), Bootstrap(), MetaLearning()])
def test_every_shape_of_research_trains_through_the_one_step(task):
    assert isinstance(task, Task)
    ema = {"student": 0.9} if isinstance(task, Bootstrap) else None
    batches = [batch_of(i) for i in range(60)]
    state, rows = train(task, optax.adam(1e-2), batches, ema)
    assert int(state.step) == 60
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    if not isinstance(task, Adversarial):
        assert np.mean([r["loss"] for r in rows[-5:]]) < 0.7 * np.mean(
            [r["loss"] for r in rows[:5]]
        )


def test_each_group_moves_by_its_own_objectives_alone():
    task, frozen = Adversarial(), optax.set_to_zero()
    state, _ = start(task, optax.sgd(0.1))
    for still, moves in (("generator", "discriminator"), ("discriminator", "generator")):
        after, _ = train(task, {still: frozen, moves: optax.sgd(0.1)}, [batch_of(1)])
        assert_close(after.params[still], state.params[still])
        assert any(
            (np.asarray(a) != np.asarray(b)).any()
            for a, b in zip(
                jax.tree.leaves(after.params[moves]),
                jax.tree.leaves(state.params[moves]),
                strict=True,
            )
        )


def test_an_objective_listed_twice_is_taken_twice_and_its_metrics_are_merged():
    state, rows = train(Adversarial(), optax.adam(1e-3), [batch_of(0)])
    assert int(optax.tree_utils.tree_get(state.opt_state["discriminator"], "count")) == 2
    assert int(optax.tree_utils.tree_get(state.opt_state["generator"], "count")) == 1
    assert {"critic_loss", "generator_loss"} <= set(rows[0])


def test_four_micro_batches_are_one_batch_of_four_times_the_size():
    small = [batch_of(i, 8) for i in range(4)]
    large = jax.tree.map(lambda *parts: np.concatenate(parts), *small)
    make = lambda k: Optimizer(optax.adamw, 1e-2, clip_norm=0.5, accumulate=k)  # noqa: E731
    accumulated, _ = train(Regression(), make(4), small)
    at_once, _ = train(Regression(), make(1), [large])
    # The sums run in another order: float32 rounding, enlarged by Adam's division.
    assert_close(accumulated.params, at_once.params, rtol=2e-5, atol=2e-6)


def ragged(batch, count):
    """Only the first `count` rows are valid; the others are NaN."""
    valid = np.arange(len(batch["valid"])) < count
    row = valid[:, None]
    x, y = (np.where(row, batch[name], np.float32(np.nan)) for name in "xy")
    return {"x": x, "y": y, "valid": valid}


@pytest.mark.parametrize("count", [32, 13, 1, 0])
def test_parts_in_one_step_are_the_whole_batch(count):
    """Also with parts that have few valid examples, or none. Float32 sums in another order."""
    task, optimizer = Valid(), optax.sgd(0.1, momentum=0.9)
    batches = [ragged(batch_of(i, 32), count) for i in range(3)]
    states, rows = [], []
    for parts in (1, 4):
        state, optimizers = start(task, optimizer)
        step = jax.jit(make_train_step(task, optimizers, micro_batches=parts))
        for batch in batches:
            state, metrics = step(state, batch)
        states.append(state.params), rows.append(metrics["loss"])
    assert_close(*states, rtol=1e-5, atol=1e-6)
    first = jax.tree.leaves(start(task, optimizer)[0].params)
    for one, leaf in zip(first, jax.tree.leaves(states[0]), strict=True):
        assert (np.asarray(one) != leaf).any() == (count > 0)
    assert float(rows[0].count) == float(rows[1].count) == count
    np.testing.assert_allclose(rows[0].total, rows[1].total, rtol=1e-5)


def test_a_part_whose_loss_is_a_mean_over_nothing_does_not_count():
    """Half of the parts have no valid example: 0 / 0 there, as `Average.compute` gives it."""
    task, batch = Valid(), {**batch_of(0, 8), "valid": np.arange(8) % 2 == 0}

    def loss(params, state, batch, rng):
        _, (model_state, metrics) = task.loss(params, state, batch, rng)
        return metrics["loss"].compute(), (model_state, metrics)

    plain = SimpleNamespace(objectives=[Objective("model", loss)], init=task.init)
    states = []
    for parts in (1, 4):
        state, optimizers = start(task, optax.sgd(0.1))
        step = jax.jit(make_train_step(plain, optimizers, micro_batches=parts))
        states.append(step(state, batch)[0].params)
    assert_close(*states, rtol=1e-5, atol=1e-6)


def test_parts_in_half_precision_are_averaged_and_not_summed_first():
    """A gradient of 1024 in each of 64 examples of a part: their sum is no float16."""

    def loss(params, state, batch, rng):
        values = mean(params["model"] * batch["x"], batch["valid"])
        return values.compute(), (state.model_state, {})

    init = lambda rng, batch: ({"model": jnp.float16(1)}, {})  # noqa: E731
    task = SimpleNamespace(objectives=[Objective("model", loss)], init=init)
    batch = {"x": np.full(128, 1024, np.float16), "valid": np.ones(128, bool)}
    state, optimizers = start(task, optax.sgd(1.0))
    state, _ = jax.jit(make_train_step(task, optimizers, micro_batches=2))(state, batch)
    assert state.params["model"] == 1 - 1024


def test_parts_on_eight_devices_and_through_pmap():
    task, batches = Valid(), [batch_of(i, 64) for i in range(3)]
    whole, _ = train(task, optax.adam(1e-2), batches)
    for name, maker in ((None, sharding.jit_step), ("data", sharding.pmap_step)):
        state, optimizers = start(task, optax.adam(1e-2))
        step = maker(make_train_step(task, optimizers, {}, name, 4), sharding.data_mesh())
        state = jax.device_put(state, sharding.replicated(sharding.data_mesh()))
        for batch in batches:
            state, _ = step(state, sharding.put_batch(batch, sharding.data_mesh()))
        assert_close(state.params, whole.params, rtol=1e-4, atol=1e-5)


def test_batch_statistics_pass_through_the_parts():
    """Four parts move the running mean four times, each towards its own mean."""
    task = Regression(Network(batch_norm=True))
    state, optimizers = start(task, optax.sgd(0.0))
    batch = batch_of(0, 32)
    after, _ = jax.jit(make_train_step(task, optimizers, micro_batches=4))(state, batch)
    one_by_one = state
    step = jax.jit(make_train_step(task, optimizers))
    for i in range(4):
        one_by_one, _ = step(one_by_one, {name: x[i::4] for name, x in batch.items()})
    assert_close(after.model_state, one_by_one.model_state, rtol=1e-5, atol=1e-6)


def test_the_average_moves_only_with_real_updates_and_starts_as_a_copy():
    ema = {"model": 0.5}
    state, optimizers = start(Regression(), Optimizer(optax.sgd, 0.1, accumulate=3), ema)
    assert_close(state.ema, state.params)
    first = jax.tree.map(np.asarray, state.params)
    step = jax.jit(make_train_step(Regression(), optimizers, ema), donate_argnums=0)
    for i in range(2):
        state, _ = step(state, batch_of(i))
        assert_close(state.ema["model"], first["model"])
    state, _ = step(state, batch_of(2))
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, first, state.params)
    assert_close(state.ema["model"], expected["model"], rtol=1e-6)


def half(task, dtype):
    """The task with its parameters in that dtype."""
    init = lambda *args: jax.tree.map(lambda x: x.astype(dtype), task.init(*args))  # noqa: E731
    return SimpleNamespace(objectives=task.objectives, init=init)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_parameters_in_half_precision_does_not_stand_still(dtype):
    task, ema = half(Regression(), dtype), {"model": 0.999}
    state, _ = train(task, optax.sgd(0.05), [batch_of(i) for i in range(20)], ema)
    first, _ = start(task, optax.sgd(0.05))
    for leaf in jax.tree.leaves(state.ema):
        assert leaf.dtype == jnp.float32
    shares = [
        np.linalg.norm(average - np.float32(was)) / np.linalg.norm(np.float32(now - was))
        for average, was, now in zip(*map(jax.tree.leaves, (state.ema, first.params, state.params)),
                                     strict=True)
    ]  # fmt: skip
    assert min(shares) > 0.005 and max(shares) < 0.03  # 1 - 0.999^20 = 0.02 of all of the way


def test_small_parts_in_half_precision_add_up():
    """1024 parts of the gradient 1: in bfloat16 the sum would stop at 0.25."""

    def loss(params, state, batch, rng):
        return jnp.mean(params["model"] * batch["x"]), (state.model_state, {})

    init = lambda rng, batch: ({"model": jnp.bfloat16(0)}, {})  # noqa: E731
    task = SimpleNamespace(objectives=[Objective("model", loss)], init=init)
    state, optimizers = start(task, optax.sgd(1.0))
    batch = {"x": np.ones(1024, jnp.bfloat16), "valid": np.ones(1024, bool)}
    state, _ = jax.jit(make_train_step(task, optimizers, micro_batches=1024))(state, batch)
    assert state.params["model"] == -1 and state.params["model"].dtype == jnp.bfloat16


def test_the_average_waits_also_for_micro_batches_within_a_chain():
    one = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    chain, ema = optax.chain(optax.clip(1.0), one), {"model": 0.5}
    first, _ = start(Regression(), chain, ema)
    state, _ = train(Regression(), chain, [batch_of(i) for i in range(3)], ema)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, first.params, state.params)
    assert_close(state.ema, middle, rtol=1e-5, atol=1e-7)


def test_an_optimizer_is_told_the_loss_and_one_that_needs_more_is_one_line():
    state, _ = train(Regression(), optax.contrib.momo(0.1), [batch_of(0)])
    assert np.isfinite(jax.tree.leaves(state.params)[0]).all()
    with pytest.raises(InputError, match="optimizer of 'model' does not fit: .*value_fn"):
        train(Regression(), optax.lbfgs(0.1), [batch_of(0)])


def test_warmed_up_decay():
    decays = [warmed_up_decay(step, decay=0.9) for step in (0, 8, 1000)]
    np.testing.assert_allclose(decays, [0.1, 0.5, 0.9], rtol=1e-6)
    with pytest.raises(InputError, match=r"decay is -1; it must be in \[0, 1\]"):
        warmed_up_decay(0, decay=-1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(accumulate, poison):
    task, ema = Regression(Network(batch_norm=True)), {"model": 0.9}
    optimizer = Optimizer(optax.adam, 1e-2, accumulate=accumulate)
    state, optimizers = start(task, optimizer, ema)
    step = jax.jit(make_train_step(task, optimizers, ema))
    state, _ = step(state, batch_of(0))
    bad = jax.tree.map(np.array, batch_of(1))
    bad["y"][0, 0] = poison
    after, metrics = step(state, bad)
    assert int(after.step) == int(state.step) + 1
    assert float(metrics["nonfinite/model/loss"].compute()) == 1.0
    assert_close(after.replace(step=0, rng=0), state.replace(step=0, rng=0))
    recovered, metrics = step(after, batch_of(2))
    assert float(metrics["nonfinite/model/gradient"].compute()) == 0.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(recovered.replace(rng=0)))


def several(params):
    """A task whose loss is the sum of squares of all, and the state before its first step."""

    def loss(params, *_):
        return sum(jnp.sum(p**2) for p in params["model"]), ({}, {})

    task = SimpleNamespace(
        init=lambda rng, batch: ({"model": params}, {}), objectives=[Objective("model", loss)]
    )
    return task, *start(task, optax.sgd(1.0))


def test_the_program_grows_with_the_parameters_not_with_their_square():
    """That one gradient is not finite must not be asked anew, of all, for each parameter."""
    sizes = []
    for count in (10, 40):
        task, state, optimizers = several([jnp.ones(3)] * count)
        program = jax.jit(make_train_step(task, optimizers)).lower(state, batch_of(0)).compile()
        sizes.append(len(program.as_text().splitlines()))
    assert sizes[1] < 5 * sizes[0], sizes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_anywhere_is_found(bad):
    found = jax.jit(_all_finite)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        tree = {"none": np.zeros((0, 3), dtype), "one": np.ones((), dtype)}
        for at in range(37):
            many = np.full(37, jnp.finfo(dtype).max, dtype)
            many[at] = 1.0
            assert found({**tree, "many": many})
            many[at] = bad
            assert not found({**tree, "many": many})
    assert found({})


def test_randomness_is_the_seed_and_the_step_alone():
    task, batches = Regression(noise=1.0), [batch_of(0)] * 4
    _, rows = train(task, optax.sgd(0.0), batches)
    assert len({row["loss"] for row in rows}) == 4
    state, optimizers = start(task, optax.sgd(0.0))
    _, metrics = jax.jit(make_train_step(task, optimizers))(
        state.replace(step=np.int32(2)), batches[0]
    )
    assert float(metrics["loss"].compute()) == rows[2]["loss"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_eight_devices_are_one_under_jit(batch_norm):
    task = Regression(Network(batch_norm=batch_norm), noise=0.1)
    batches = [batch_of(i, 32) for i in range(5)]
    runs = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.data_mesh(devices)
        state, optimizers = start(task, optax.sgd(1e-2, momentum=0.9))
        state = jax.device_put(state, sharding.replicated(mesh))
        step = sharding.jit_step(make_train_step(task, optimizers), mesh)
        for batch in batches:
            state, _ = step(state, sharding.put_batch(batch, mesh))
        runs.append(state)
    # Sums over devices in another order: a few float32 roundings, through five steps.
    # (Not Adam: the bias before BatchNorm has gradient zero, whose rounding Adam would enlarge).
    assert_close(runs[0].params, runs[1].params, rtol=1e-4, atol=1e-5)
    assert_close(runs[0].model_state, runs[1].model_state, rtol=1e-5, atol=1e-6)


def test_batch_norm_under_jit_sees_the_whole_batch():
    """Were statistics per device, the first layer's mean would be that of a slice."""
    task, mesh = Regression(Network(batch_norm=True)), sharding.data_mesh()
    state, optimizers = start(task, optax.sgd(0.0))
    batch = batch_of(0, 16) | {"x": np.arange(48, dtype=np.float32).reshape(16, 3)}
    weights = jax.tree.map(np.asarray, state.params["model"]["Dense_0"])
    state = jax.device_put(state, sharding.replicated(mesh))
    after, _ = sharding.jit_step(make_train_step(task, optimizers), mesh)(
        state, sharding.put_batch(batch, mesh)
    )
    hidden = np.asarray(batch["x"]) @ weights["kernel"] + weights["bias"]
    statistics = after.model_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * hidden.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * hidden.var(0), rtol=1e-4)


def test_pmap_runs_the_same_step():
    task, mesh = Regression(), sharding.data_mesh()
    ema = {"model": 0.9}
    runs = []
    for wrap, axis in ((sharding.jit_step, None), (sharding.pmap_step, sharding.AXIS)):
        state, optimizers = start(task, optax.adam(1e-2), ema)
        state = jax.device_put(state, sharding.replicated(mesh))
        step = wrap(make_train_step(task, optimizers, ema, axis), mesh)
        for i in range(5):
            state, metrics = step(state, sharding.put_batch(batch_of(i, 32), mesh))
        assert isinstance(state, TrainState)
        assert float(metrics["loss"].count) == 32
        runs.append((state.params, state.ema, metrics["loss"].compute(), state.step))
    # The mean of eight means against one mean: float32 rounding through five steps of Adam.
    assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


def scalar(count):
    """`count` objectives of the one parameter w = 1, each with the loss w^2 / 2."""

    def loss(params, state, batch, rng):
        w = params["a"]["w"]
        return w**2 / 2, (state.model_state, {"loss": mean(w[None])})

    return SimpleNamespace(
        init=lambda rng, batch: ({"a": {"w": jnp.float32(1)}}, {}),
        objectives=[Objective("a", loss)] * count,
    )


def test_the_second_objective_sees_what_the_first_did():
    state, _ = train(scalar(2), optax.sgd(0.5), [batch_of(0)])
    assert state.params["a"]["w"] == 0.25


def test_the_average_follows_when_any_objective_of_the_group_was_an_update():
    """Of four micro-updates of three to an update the third is one, the fourth is not."""
    optimizer = optax.MultiSteps(optax.sgd(0.5), 3)
    state, _ = train(scalar(2), optimizer, [batch_of(0)] * 2, {"a": 0.0})
    assert state.ema["a"]["w"] == state.params["a"]["w"] == 0.5


def test_a_decay_is_told_the_steps_before_this_one():
    ema = {"model": lambda step: jnp.where(step == 0, 0.0, 1.0)}
    state, _ = train(Regression(), optax.sgd(0.1), [batch_of(0)], ema)
    assert_close(state.ema["model"], state.params["model"], rtol=1e-6, atol=1e-7)


def drawing(*names):
    """A task of one objective for each name, which tells the number that it draws."""

    def objective(name):
        def loss(params, state, batch, rng):
            u = jax.random.uniform(rng)
            metrics = {name: mean(u[None]), f"{name}^2": mean(u[None] ** 2)}
            return 0 * jnp.sum(params["model"]["w"]), (state.model_state, metrics)

        return Objective("model", loss)

    return SimpleNamespace(
        init=lambda rng, batch: ({"model": {"w": jnp.ones(3)}}, {}),
        objectives=[objective(name) for name in names],
    )


def test_every_objective_part_and_device_draws_its_own():
    (_, (row,)) = train(drawing("a", "b"), optax.sgd(0.1), [batch_of(0)])
    assert row["a"] != row["b"]
    state, optimizers = start(drawing("a"), optax.sgd(0.1))
    mesh = sharding.data_mesh()
    parts = jax.jit(make_train_step(drawing("a"), optimizers, micro_batches=4))
    devices = sharding.pmap_step(make_train_step(drawing("a"), optimizers, {}, sharding.AXIS), mesh)
    placed = jax.device_put(state, sharding.replicated(mesh)), sharding.put_batch(batch_of(0), mesh)
    for _, found in (parts(state, batch_of(0)), devices(*placed)):
        assert found["a^2"].compute() - found["a"].compute() ** 2 > 1e-3


def test_statistics_under_pmap_are_those_of_all_devices():
    task, mesh, means = Regression(Network(batch_norm=True)), sharding.data_mesh(), []
    for wrap, axis in ((sharding.jit_step, None), (sharding.pmap_step, sharding.AXIS)):
        state, optimizers = start(task, optax.sgd(0.0))
        step = wrap(make_train_step(task, optimizers, {}, axis), mesh)
        state = jax.device_put(state, sharding.replicated(mesh))
        state, _ = step(state, sharding.put_batch(batch_of(0, 32), mesh))
        means.append(state.model_state["batch_stats"]["BatchNorm_0"]["mean"])
    np.testing.assert_allclose(*means, rtol=1e-5, atol=1e-6)
