"""Several heads: the weights, the metrics, what is not valid, and equality with one head alone."""

import dataclasses
import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.multitask.multilabel import Pooled, check, measure
from cvjax.multitask.task import Head, MultiTask
from cvjax.segmentation.heads import FCN
from cvjax.segmentation.losses import cross_entropy
from cvjax.segmentation.model import Segmenter
from cvjax.segmentation.task import Segmentation, check_masks, side_by_side
from cvjax.segmentation.task import measure as measure_pixels
from cvjax.train.task import Task

CLASSES = 3


class Backbone(nn.Module):
    strides = {"fine": 1, "coarse": 2}

    @nn.compact
    def features(self, x, *, train=False, valid=None):
        fine = nn.Conv(4, (3, 3), name="fine")(x)
        mask = None if valid is None else valid[:, None, None, None]
        fine = nn.relu(nn.BatchNorm(not train, name="norm")(fine, mask=mask))
        coarse = nn.Conv(5, (2, 2), strides=2, name="coarse")(fine)
        return {"coarse": coarse, "fine": fine}


PIXELS = Head(
    FCN(CLASSES, maps=2),
    functools.partial(measure_pixels, losses={"cross_entropy": cross_entropy}),
    predict=functools.partial(jnp.argmax, axis=-1),
    picture=side_by_side,
    weight=0.5,
)
PRESENT = Head(Pooled(2), measure, weight=3.0)
FIXED = MultiTask(Backbone(), {"pixels": PIXELS, "present": PRESENT})
LEARNED = MultiTask(Backbone(), {"pixels": PIXELS, "present": PRESENT}, "uncertainty")


def batch_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(size=(n, 6, 7, 1)).astype(np.float32),
        "mask": rng.choice(np.array([0, 1, 2, 255], np.uint8), size=(n, 6, 7)),
        "present": rng.integers(0, 2, (n, 2)).astype(np.uint8),
        "valid": np.ones(n, bool),
    }


@functools.cache
def initialized(task_name):
    return jax.jit(TASKS[task_name].init)(jax.random.key(0), batch_of(4))


TASKS = {"fixed": FIXED, "learned": LEARNED}


@functools.cache
def step_of(task_name):
    task = TASKS[task_name]

    @jax.jit
    def step(params, model_state, batch):
        state, key = SimpleNamespace(model_state=model_state), jax.random.key(1)
        trained = jax.value_and_grad(task.loss, has_aux=True)(params, state, batch, key)
        return trained, task.evaluate(params, model_state, batch, key)

    return step


def test_the_loss_is_the_weighted_sum():
    params, model_state = initialized("fixed")
    ((value, (_, metrics)), _), held_out = step_of("fixed")(params, model_state, batch_of(4))
    for found in (metrics, held_out):
        assert set(found) == {
            "loss", "pixels/loss", "pixels/accuracy",
            "present/loss", "present/accuracy", "present/all_right",
        }  # fmt: skip
        parts = 0.5 * found["pixels/loss"].compute() + 3 * found["present/loss"].compute()
        np.testing.assert_allclose(found["loss"].compute(), parts, rtol=1e-6)
    np.testing.assert_allclose(value, metrics["loss"].compute(), rtol=1e-6)


def test_uncertainties_are_those_of_the_paper_and_find_their_minimum():
    params, model_state = initialized("learned")
    start = params["model"]["log_variance"]
    assert start == {"pixels": 0, "present": 0}
    log_variance = {"pixels": np.float32(0.7), "present": np.float32(-1.2)}
    params = {"model": params["model"] | {"log_variance": log_variance}}
    ((value, (_, found)), gradient), _ = step_of("learned")(params, model_state, batch_of(4))
    losses = {name: float(found[f"{name}/loss"].compute()) for name in ("pixels", "present")}
    expected = sum(
        np.exp(-s) * losses[name] + s / 2 for name, s in (("pixels", 0.7), ("present", -1.2))
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(found["pixels/weight"].compute(), np.exp(-0.7), rtol=1e-6)
    # The minimum in s is where exp(-s) loss = 1 / 2.
    best = {name: np.float32(np.log(2 * loss)) for name, loss in losses.items()}
    params["model"]["log_variance"] = best
    (_, gradient), _ = step_of("learned")(params, model_state, batch_of(4))
    for slope in gradient["model"]["log_variance"].values():
        assert abs(slope) < 1e-6


@pytest.mark.parametrize("name", TASKS)
def test_what_is_not_valid_changes_nothing_bit_for_bit(name):
    assert isinstance(TASKS[name], Task)
    one, other = batch_of(5), batch_of(5)
    one["valid"][[0, 3]] = other["valid"][[0, 3]] = False
    other["image"][[0, 3]] = np.nan
    other["mask"][[0, 3]], other["present"][[0, 3]] = 99, 7
    step = functools.partial(step_of(name), *initialized(name))
    jax.tree.map(np.testing.assert_array_equal, step(one), step(other))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step(other)))


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_of_nothing_teaches_nothing(name):
    params, model_state = initialized(name)
    batch = batch_of(5)
    batch["valid"][:] = False
    ((value, (new_state, _)), gradient), _ = step_of(name)(params, model_state, batch)
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, new_state, model_state)


def test_a_head_without_truth_learns_nothing_about_its_variance():
    batch = batch_of(4)
    batch["mask"][:] = 255
    (_, _), gradient = step_of("learned")(*initialized("learned"), batch)[0]
    slopes = gradient["model"]["log_variance"]
    assert slopes["pixels"] == 0 and slopes["present"] != 0


def test_one_head_is_the_task_of_its_own():
    alone = Segmentation(Segmenter(Backbone(), PIXELS.module))
    several = MultiTask(Backbone(), {"pixels": PIXELS})
    batch = batch_of(4)
    params, model_state = jax.jit(several.init)(jax.random.key(0), batch)
    names = {"backbone": "backbone", "head": "heads_pixels"}
    same = {"model": {here: params["model"][there] for here, there in names.items()}}
    state = {
        "batch_stats": {"backbone": model_state["batch_stats"]["backbone"]},
    }
    key = jax.random.key(0)

    def seen(task, *of):
        methods = task.evaluate, task.predict, task.visualize
        return jax.jit(lambda *of: [see(*of, batch, key) for see in methods])(*of)

    one, two = seen(alone, same, state), seen(several, params, model_state)
    np.testing.assert_array_equal(one[0]["loss"].total, two[0]["pixels/loss"].total)
    np.testing.assert_array_equal(one[1]["prediction"], two[1]["pixels"])
    np.testing.assert_array_equal(one[2]["segmentation"], two[2]["pixels"])


def test_predictions_and_pictures_of_each_head():
    params, model_state = initialized("fixed")
    see = lambda method: jax.eval_shape(method, params, model_state, batch_of(3), None)  # noqa: E731
    found = see(FIXED.predict)
    assert found["pixels"].shape == (3, 6, 7) and found["present"].shape == (3, 2)
    assert set(see(FIXED.visualize)) == {"pixels"}


def test_multilabel_is_the_closed_form():
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(5, 4)), rng.integers(0, 2, (5, 4))
    valid = np.array([True, True, False, True, True])
    batch = {"digits": truth, "valid": valid}
    value, metrics = jax.jit(functools.partial(measure, field="digits"))(np.float32(logits), batch)
    p = 1 / (1 + np.exp(-logits[valid]))
    expected = -np.where(truth[valid], np.log(p), np.log(1 - p)).mean()
    right = (p > 0.5) == truth[valid]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].compute(), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"].compute(), right.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["all_right"].compute(), right.all(1).mean(), rtol=1e-6)


def test_what_cannot_be_trained():
    with pytest.raises(InputError, match="heads is empty"):
        MultiTask(Backbone(), {})
    with pytest.raises(InputError, match=r"'uncertain' .did you mean uncertainty"):
        MultiTask(Backbone(), {"present": PRESENT}, "uncertain")
    with pytest.raises(InputError, match=r"heads\.pixels is None; it must be a Head"):
        MultiTask(Backbone(), {"present": PRESENT, "pixels": None})
    with pytest.raises(InputError, match=r"heads\.present\.weight is -1; it must be at least 0"):
        MultiTask(Backbone(), {"present": dataclasses.replace(PRESENT, weight=-1)})
    with pytest.raises(InputError, match="outputs is 0"):
        Pooled(0)
    with pytest.raises(InputError, match=r"present is \[2, 3\]; for scores \[2, 2\]"):
        measure(jnp.zeros((2, 2)), {"present": np.zeros((2, 3)), "valid": np.ones(2, bool)})


def test_multilabel_of_rows_that_are_not_valid_may_be_anything():
    logits = np.float32([[1.0, -2.0], [np.nan, np.inf]])
    batch = {
        "present": np.float32([[1.0, 0.0], [np.nan, 7.0]]),
        "valid": np.array([True, False]),
    }
    gradient = jax.jit(jax.grad(lambda logits: measure(logits, batch)[0]))(logits)
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_allclose(gradient[0], [-0.5 / (1 + np.e), 0.5 / (1 + np.e**2)], rtol=1e-6)


def test_the_truth_of_each_head_is_looked_at():
    pixels = dataclasses.replace(PIXELS, check=check_masks)
    present = dataclasses.replace(PRESENT, check=check)
    task, batch = MultiTask(Backbone(), {"pixels": pixels, "present": present}), batch_of(3)
    task.check(batch)
    for name, value, message in (
        ("mask", CLASSES, f"is {CLASSES}, but num_classes is {CLASSES}"),
        ("present", 7, "present goes from 0 to 7; it must be 0 or 1"),
        ("present", np.nan, "present goes from nan to nan"),
    ):
        wrong = batch[name].astype(np.float32 if value != value else np.uint8) * (value == value)
        wrong[1].flat[0] = value
        with pytest.raises(InputError, match=message):
            task.check({**batch, name: wrong})
        task.check({**batch, name: wrong, "valid": np.arange(3) != 1})
    with pytest.raises(InputError, match=r"heads\.present needs a field 'present'"):
        task.check({name: value for name, value in batch.items() if name != "present"})


@pytest.mark.parametrize("field", ["criterion", "predict", "picture"])
def test_functions_of_another_kind_are_one_line(field):
    head = dataclasses.replace(PIXELS, **{field: lambda: None})
    task, batch = MultiTask(Backbone(), {"pixels": head}), batch_of(1)
    key = jax.random.key(0)

    def run(batch):
        state = task.init(key, batch)
        for method in (task.evaluate, task.predict, task.visualize):
            method(*state, batch, key)

    with pytest.raises(InputError, match=rf"heads\.pixels\.{field} does not fit: TypeError"):
        jax.eval_shape(run, batch)


def test_a_field_that_is_not_there_is_named():
    key = jax.random.key(0)
    task = MultiTask(Backbone(), {"present": PRESENT})
    batch = {"image": np.zeros((1, 8, 8, 3)), "valid": np.ones(1, bool), "presence": np.zeros(1)}
    evaluated = lambda batch: task.evaluate(*task.init(key, batch), batch, key)  # noqa: E731
    with pytest.raises(InputError, match=r"heads\.present needs a field 'present' .*presence\?"):
        jax.eval_shape(evaluated, batch)
