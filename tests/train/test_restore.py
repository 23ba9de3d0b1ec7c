import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.train.checkpoint import Checkpoints
from cvjax.train.restore import load_params
from cvjax.train.state import TrainState


def network(value, width=4):
    return {
        "encoder": {"dense": {"kernel": jnp.full((2, 3), value), "bias": jnp.full(3, value)}},
        "head": {"kernel": jnp.full((3, width), value)},
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    state = TrainState(
        step=jnp.int32(1),
        rng=jax.random.key(0),
        params={"model": network(1.0), "other": {"x": jnp.ones(2)}},
        opt_state={},
        model_state={"batch_stats": {"encoder": {"mean": jnp.full(3, 5.0)}}},
        ema={"model": network(2.0)},
    )
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, position=0, metrics={}, config={})
    return path


def statuses(table):
    return {row.path: row.status for row in table.rows}


def test_everything_is_loaded_from_work_directory_checkpoints_or_step(workdir):
    zeros = {"model": network(0.0)}
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "1"):
        params, _, table = load_params(zeros, {}, path=path)
        jax.tree.map(np.testing.assert_array_equal, params, {"model": network(1.0)})
        assert statuses(table) == {
            "model/encoder/dense/bias": "loaded",
            "model/encoder/dense/kernel": "loaded",
            "model/head/kernel": "loaded",
            "params/other/x": "unused",
            "model_state/batch_stats/encoder/mean": "unused",
        }
    assert np.all(zeros["model"]["head"]["kernel"] == 0)


def test_the_model_state_comes_along_or_by_a_rule_of_its_own(workdir):
    params, zeros = {"model": network(0.0)}, {"batch_stats": {"encoder": {"mean": jnp.zeros(3)}}}
    _, state, table = load_params(params, zeros, path=workdir)
    assert np.all(state["batch_stats"]["encoder"]["mean"] == 5)
    assert statuses(table)["model_state/batch_stats/encoder/mean"] == "loaded"
    _, state, table = load_params(params, zeros, path=workdir, take={"model": "model"})
    assert np.all(state["batch_stats"]["encoder"]["mean"] == 0)
    assert statuses(table)["model_state/batch_stats/encoder/mean"] == "left"
    elsewhere = {"batch_stats": {"teacher": {"mean": jnp.zeros(3)}}}
    take = {"model_state/batch_stats/encoder": "model_state/batch_stats/teacher"}
    new, state, _ = load_params(params, elsewhere, path=workdir, take=take)
    assert np.all(state["batch_stats"]["teacher"]["mean"] == 5)
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_a_part_goes_into_a_part_of_a_bigger_model(workdir):
    encoder = {**network(0.0)["encoder"], "norm": {"scale": jnp.zeros(3)}}
    params = {"student": {"backbone": encoder, "head": {"kernel": jnp.zeros((3, 9))}}}
    params, _, table = load_params(
        params, {}, path=workdir, take={"model/encoder": "student/backbone"}
    )
    assert np.all(params["student"]["backbone"]["dense"]["kernel"] == 1)
    assert np.all(params["student"]["head"]["kernel"] == 0)
    assert statuses(table) == {
        "student/backbone/dense/bias": "loaded",
        "student/backbone/dense/kernel": "loaded",
        "student/backbone/norm/scale": "missing",
        "student/head/kernel": "left",
    }
    assert "student/head/kernel            float32[3,9]  left" in str(table)


def test_one_array_and_several_rules(workdir):
    params = {"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(3)}}
    take = {"model/head/kernel": "a", "model/encoder/dense/bias": "b/c"}
    params, _, _ = load_params(params, {}, path=workdir, take=take)
    assert np.all(params["a"] == 1) and np.all(params["b"]["c"] == 1)


def test_moving_average_dtype_and_sharding(workdir):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"model": network(0.0)})
    params = jax.device_put({**params, "other": {"x": jnp.zeros(2)}}, where)
    params, _, _ = load_params(params, {}, path=workdir, use_ema=True)
    assert np.all(params["model"]["head"]["kernel"] == 2) and np.all(params["other"]["x"] == 1)
    assert params["model"]["head"]["kernel"].dtype == jnp.bfloat16
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {where}


def test_other_shapes_are_left_and_named(workdir):
    params, _, table = load_params({"model": network(0.0, width=5)}, {}, path=workdir)
    assert np.all(params["model"]["head"]["kernel"] == 0)
    assert statuses(table)["model/head/kernel"] == "shape differs"


@pytest.mark.parametrize(
    "take, message",
    [
        ({"model/encodr": "model/encoder"}, "no parameters 'model/encodr'.*mean model/encoder"),
        ({"model/encoder": "model/encodr"}, "the model has no .*'model/encodr'.*model/encoder"),
        ({"model/enc": "model/encoder"}, "no parameters 'model/enc'"),
        ({"model/encoder": "model/head"}, "nothing below 'model/encoder'"),
        ({}, "take is {}; it must be"),
    ],
)
def test_a_rule_that_loads_nothing_is_one_line(take, message, workdir):
    with pytest.raises(InputError, match=message) as caught:
        load_params({"model": network(0.0)}, {}, path=workdir, take=take)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_or_a_damaged_one(workdir, tmp_path):
    with pytest.raises(InputError, match="has no checkpoint"):
        load_params({"model": network(0.0)}, {}, path=tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"params": network(1.0)}, position=0, metrics={}, config={})
    (tmp_path / "3" / "_METADATA").unlink()
    for path in (tmp_path, tmp_path / "3"):
        with pytest.raises(InputError, match="_METADATA is missing"):
            load_params({"model": network(0.0)}, {}, path=path)
