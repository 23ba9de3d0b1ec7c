"""The task: guidance, class dropout, padding, samples."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion import grids, losses
from cvjax.diffusion.coupling import optimal_coupling
from cvjax.diffusion.editing import repaint, slerp
from cvjax.diffusion.learned_variance import LearnedVariance, ddpm_learned
from cvjax.diffusion.preconditioning import Preconditioned
from cvjax.diffusion.process import (
    EDM,
    FlowMatching,
    VariancePreserving,
    log_normal,
    logit_normal,
    uniform,
)
from cvjax.diffusion.samplers import adaptive, ddim, dpm_solver_2m, euler_maruyama, heun, unipc
from cvjax.diffusion.task import Diffusion
from cvjax.errors import InputError
from cvjax.nn.resnet import ResNet
from cvjax.nn.unet import UNet
from cvjax.train.state import TrainState
from cvjax.train.task import Task

SHAPE = (8, 8, 1)
CLASSES = 3


class Constant(nn.Module):
    """Predicts, at every pixel, a parameter of the class that it is told."""

    @nn.compact
    def __call__(self, x, t, label):
        values = self.param("values", nn.initializers.normal(), (CLASSES + 1,))
        return jnp.broadcast_to(values[label][:, None, None, None], x.shape)


class Linear(nn.Module):
    """Small, but sees image, time and class."""

    @nn.compact
    def __call__(self, x, t, label):
        shift = nn.Embed(CLASSES + 1, 1)(label) + nn.Dense(1)(t[:, None])
        return nn.Conv(1, (3, 3))(x) + shift[:, None, None, :]


def task_of(network, **fields):
    fields = dict(num_classes=CLASSES, image_shape=SHAPE, sample_steps=4) | fields
    return Diffusion(network, **fields)


def batch_of(size=8):
    return {
        "image": np.random.default_rng(5).uniform(size=(size, *SHAPE)).astype(np.float32),
        "label": np.arange(size) % CLASSES,
        "valid": np.ones(size, bool),
    }


def start(task, batch):
    params, model_state = task.init(jax.random.key(0), batch)
    return params, TrainState(np.int32(0), jax.random.key(0), params, {}, model_state, {})


def loss_and_gradient(task, params, state, batch, rng):
    function = jax.jit(jax.value_and_grad(lambda p, b, r: task.loss(p, state, b, r), has_aux=True))
    return function(params, batch, rng)


def test_follows_the_protocol():
    task = task_of(Linear())
    assert isinstance(task, Task)
    assert [group for group, _ in task.objectives] == ["network"]


def test_invalid_rows_change_nothing():
    task, batch = task_of(Linear(), sampler=ddim), batch_of()
    params, state = start(task, batch)
    valid = np.arange(8) % 3 != 1
    spoiled = dict(
        valid=valid,
        image=np.where(valid[:, None, None, None], batch["image"], np.float32(np.nan)),
        label=np.where(valid, batch["label"], 10**6),
    )
    clean = batch | dict(valid=valid)
    rng = jax.random.key(1)
    (value, (_, metrics)), gradient = loss_and_gradient(task, params, state, clean, rng)
    (value2, (_, metrics2)), gradient2 = loss_and_gradient(task, params, state, spoiled, rng)
    assert np.isfinite(value) and metrics["loss"].count == np.sum(valid)
    evaluate, predict = jax.jit(task.evaluate), jax.jit(task.predict)
    held_out, held_out2 = (evaluate(params, {}, b, rng) for b in (clean, spoiled))
    jax.tree.map(
        np.testing.assert_array_equal,
        (value, metrics, gradient, held_out),
        (value2, metrics2, gradient2, held_out2),
    )
    samples = [np.asarray(predict(params, {}, b, rng)["sample"])[valid] for b in (clean, spoiled)]
    np.testing.assert_array_equal(*samples)


def test_no_valid_row_is_no_loss():
    task, batch = task_of(Linear()), batch_of()
    params, state = start(task, batch)
    empty = batch | dict(valid=np.zeros(8, bool))
    (value, _), gradient = loss_and_gradient(task, params, state, empty, jax.random.key(0))
    assert value == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    nothing = {name: value[:0] for name, value in batch.items()}
    coupled = dataclasses.replace(task, coupling=optimal_coupling)
    for one in (task, coupled):
        loss, _ = jax.eval_shape(one.loss, params, state, nothing, jax.random.key(0))
        assert loss.shape == ()
    outputs = jax.eval_shape(task.predict, params, {}, nothing, jax.random.key(0))
    assert outputs["sample"].shape == (0, *SHAPE)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_share_of_class_dropout(share):
    """The gradient of a constant of each class counts how often the class was shown."""
    task, batch = task_of(Constant(), class_dropout=share), batch_of(10_000)
    batch["image"][:] = 0.5  # a grey of 0, so the target is the noise
    params, state = start(task, batch)
    params = {"network": {"values": np.full(CLASSES + 1, np.float32(100))}}  # ... which it drowns
    _, gradient = loss_and_gradient(task, params, state, batch, jax.random.key(0))
    shown = np.asarray(gradient["network"]["values"]) / (2 * 100.0)
    # 4 standard errors of a share of 10,000.
    np.testing.assert_allclose(shown[-1], share, atol=4 * np.sqrt(share * (1 - share) / 1e4))
    np.testing.assert_allclose(shown[:-1], (1 - share) / CLASSES, atol=0.015)


@pytest.mark.parametrize(
    "guidance, sampler", [(0.0, ddim), (1.0, ddim), (2.5, ddim), (2.5, heun), (2.5, dpm_solver_2m)]
)
def test_guidance(guidance, sampler):
    """A constant velocity moves the noise by itself: uncond + w (cond - uncond)."""
    task, batch = task_of(Constant(), guidance=guidance, sampler=sampler), batch_of(6)
    values = np.array([0.1, -0.2, 0.3, 0.05], np.float32)

    @jax.jit
    def sample(values):
        return task.sample({"network": {"values": values}}, batch["label"], jax.random.key(0))

    # Samples are clipped to [0, 1], so only a pixel in between tells.
    moved, still = np.asarray(sample(values)), np.asarray(sample(np.zeros_like(values)))
    expected = values[-1] + guidance * (values[batch["label"]] - values[-1])
    expected = np.broadcast_to(-expected[:, None, None, None] / 2, moved.shape)  # [-1,1] -> [0,1]
    between = (moved > 0) & (moved < 1) & (still > 0) & (still < 1)
    assert np.mean(between) > 0.3
    np.testing.assert_allclose((moved - still)[between], expected[between], atol=1e-4)


def test_guidance_of_one_is_a_single_pass():
    task, batch = task_of(Linear()), batch_of(6)
    params, _ = start(task, batch)
    sizes = []

    class Spy(Linear):
        def __call__(self, x, t, label):
            sizes.append(len(x))
            return x

    for guidance in (1.0, 2.0):
        spied = dataclasses.replace(task, network=Spy())
        jax.eval_shape(
            lambda p, g=guidance, s=spied: s.sample(p, batch["label"], jax.random.key(0), g), params
        )
    assert set(sizes[: len(sizes) // 2]) == {6} and set(sizes[len(sizes) // 2 :]) == {12}


def test_guidance_without_class_dropout_is_one_line():
    with pytest.raises(InputError, match="guidance is 2.0.*class_dropout above 0"):
        task_of(Linear(), guidance=2.0, class_dropout=0.0)
    task, batch = task_of(Linear(), class_dropout=0.0), batch_of()
    params, _ = start(task, batch)
    key = jax.random.key(0)
    with pytest.raises(InputError, match="guidance is inf; it must be finite"):
        task_of(Linear(), guidance=np.inf)
    for wrong in ("2", None):
        with pytest.raises(InputError, match=f"guidance is {wrong!r}; it must be a number"):
            task_of(Linear(), guidance=wrong)
    with pytest.raises(InputError, match="guidance is traced"):
        jax.eval_shape(lambda w: task.sample(params, batch["label"], key, guidance=w), 2.0)
    with pytest.raises(InputError, match=r"labels are \[1, 2\]; they must be \[b\]"):
        task.sample(params, [[0, 1]], key)
    with pytest.raises(InputError, match="guidance is 2.0, but num_classes is 0"):
        task_of(Linear(), num_classes=0, guidance=2.0)
    with pytest.raises(InputError, match="guidance is 3.0"):
        task.sample(params, batch["label"], key, guidance=3.0)
    for label in (-1, CLASSES + 1):
        with pytest.raises(InputError, match=f"label is {label}, but num_classes is {CLASSES}"):
            task.sample(params, np.array([0, label]), key)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(class_dropout=1.0),
        dict(num_classes=-1),
        dict(sample_steps=0),
        dict(process=UNet(num_classes=3)),
        dict(image_shape=(9, 9, 1)),
    ],
)
def test_impossible_fields(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        task_of(Linear(), **wrong).init(jax.random.key(0), batch_of())


def test_a_network_of_another_kind_is_one_line():
    with pytest.raises(InputError, match="network does not fit: TypeError"):
        task_of(ResNet(depth=18, num_classes=3)).init(jax.random.key(0), batch_of())


def test_two_processes_that_differ_at_little_noise_alone_are_not_equal():
    network = Preconditioned(UNet(num_classes=3), EDM(sigma_min=0.002))
    with pytest.raises(InputError, match="that of the network is"):
        task_of(network, process=EDM(sigma_min=0.0035))


def test_nothing_to_learn_is_one_line():
    with pytest.raises(InputError, match="simple_weight and bound_weight are 0"):
        LearnedVariance(Linear(), simple_weight=0.0, bound_weight=0.0)


def test_classes_of_task_and_network_must_agree():
    with pytest.raises(InputError, match="num_classes is 3, but that of the network is 10"):
        task_of(UNet(num_classes=10))
    process = EDM()
    with pytest.raises(InputError, match="num_classes is 3, but that of the network is 10"):
        task_of(Preconditioned(UNet(num_classes=10), process), process=process)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(sampler=euler_maruyama), "euler_maruyama does not fit FlowMatching"),
        (dict(process=EDM(), sample_steps=20), "does not fit EDM.*take times=grids.karras"),
        (dict(sampler=functools.partial(unipc, order=7)), "order is 7"),
        (dict(sampler=ddpm_learned), "has no variances; train a LearnedVariance"),
        (dict(process=FlowMatching(times=log_normal)), r"process.times of .*must be in \[0, 1\]"),
        (dict(process=FlowMatching(times=grids.karras)), "process.times does not fit: TypeError"),
        (dict(weighting=losses.sliced_score_matching), "weighting does not fit: TypeError"),
        (dict(coupling=slerp), "coupling does not fit"),
        (dict(sampler=repaint), "sampler does not fit: TypeError"),
        (dict(sampler=functools.partial(heun, s_noise=math.nan, s_churn=2.0)), "s_noise is nan"),
    ],
)
def test_a_sampler_that_does_not_fit_is_told_before_the_training(fields, message):
    batch = {name: np.asarray(value) for name, value in batch_of().items()}
    with pytest.raises(InputError, match=message):
        jax.eval_shape(task_of(Linear(), **fields).init, jax.random.key(0), batch)
    del batch["label"]
    with pytest.raises(InputError, match="num_classes is 3, but the data have no field label"):
        task_of(Linear()).check(batch)


def test_without_classes_a_batch_needs_no_labels():
    task = task_of(Linear(), num_classes=0)
    batch = {key: value for key, value in batch_of().items() if key != "label"}
    params, state = start(task, batch)
    loss, _ = jax.jit(lambda p: task.loss(p, state, batch, jax.random.key(0)))(params)
    assert np.isfinite(loss)
    # ... and no class is said to have been asked for, or evaluators would look for agreement.
    assert set(jax.eval_shape(task.predict, params, {}, batch, jax.random.key(0))) == {"sample"}
    picture = jax.eval_shape(task.visualize, params, {}, batch, jax.random.key(0))["samples"]
    assert picture.shape == (10 * 9 + 1, 10 * 9 + 1, 1)


def test_samples_do_not_depend_on_how_the_batch_is_split():
    task = task_of(UNet(CLASSES, width=8, multipliers=(1,), blocks=1, attention=(0,)), guidance=2.0)
    labels = np.arange(7) % CLASSES
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0), batch_of())
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda x: (0.2 * draw(x.shape)).astype(x.dtype), shapes)
    rng = jax.random.key(4)
    sample = jax.jit(lambda labels, first: task.sample(params, labels, rng, first=first))
    whole = np.asarray(sample(labels, 0))
    parts = np.concatenate([sample(labels[:3], 0), sample(labels[3:], 3)])
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert np.min(whole) >= 0 and np.max(whole) <= 1
    assert np.max(np.abs(whole[0] - whole[CLASSES])) > 0.1  # one class, another noise


def test_predict_and_visualize():
    task, batch = task_of(Linear()), batch_of()
    params, _ = start(task, batch)
    outputs = jax.jit(task.predict)(params, {}, batch, jax.random.key(0))
    assert outputs["sample"].shape == (8, *SHAPE)
    np.testing.assert_array_equal(outputs["label"], batch["label"])
    visualize = jax.jit(task.visualize)
    pictures = [visualize(params, {}, batch, jax.random.key(s))["samples"] for s in (0, 1)]
    assert pictures[0].shape == (10 * 9 + 1, CLASSES * 9 + 1, 1)
    np.testing.assert_array_equal(*pictures)  # the same noise at every evaluation
    assert np.min(pictures[0]) >= 0 and np.max(pictures[0]) <= 1


def test_the_picture_of_many_classes_is_of_ten():
    task, batch = task_of(UNet(1000, width=8, attention=()), num_classes=1000), batch_of()
    params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
    picture = jax.eval_shape(task.visualize, params, {}, batch, jax.random.key(0))["samples"]
    assert picture.shape == (10 * 9 + 1, 10 * 9 + 1, 1)


@pytest.mark.parametrize(
    "process",
    [
        FlowMatching(),
        FlowMatching("x0", uniform),
        VariancePreserving(),
        VariancePreserving("linear", "eps", logit_normal),
        VariancePreserving("linear", "score"),
    ],
)
def test_loss_and_evaluate_under_every_process(process):
    task, batch = task_of(Linear(), process=process), batch_of()
    params, state = start(task, batch)
    (value, _), gradient = loss_and_gradient(task, params, state, batch, jax.random.key(0))
    held_out = jax.jit(task.evaluate)(params, {}, batch, jax.random.key(0))["loss"]
    assert np.isfinite(value) and np.isfinite(held_out.compute())
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_the_times_of_evaluation_are_stratified():
    seen = []

    class Spy(nn.Module):
        def __call__(self, x, t, label):
            seen.append(t)
            return x

    task = task_of(Spy(), process=FlowMatching(times=uniform))
    task.evaluate({"network": {}}, {}, batch_of(), jax.random.key(0))
    np.testing.assert_allclose(seen[0], (np.arange(8) + 0.5) / 8, rtol=1e-6)
    # Over the valid rows: those of a padded last batch see all times too.
    padded = batch_of() | dict(valid=np.array([1, 0, 1, 1, 0, 0, 0, 0], bool))
    task.evaluate({"network": {}}, {}, padded, jax.random.key(0))
    np.testing.assert_allclose(np.asarray(seen[1])[[0, 2, 3]], np.array([1, 3, 5]) / 6, rtol=1e-6)


def test_a_run_says_what_a_sample_costs():
    for fields, message in (
        (
            dict(sampler=heun, sample_steps=10),
            "takes 19 evaluations of the network: heun, 10 steps",
        ),
        (dict(sampler=functools.partial(ddim, eta=1.0), guidance=2.5, sample_steps=3), "takes 6 "),
        (dict(sampler=adaptive, guidance=2.0), "a varying number of"),
    ):
        told = task_of(Linear(), **fields).summary()
        assert message in told and ("twice for guidance" in told) == ("guidance" in fields)
    learned = dict(num_classes=CLASSES, image_shape=SHAPE, sampler=ddpm_learned, sample_steps=7)
    told = LearnedVariance(Linear(), VariancePreserving(), **learned).summary()
    assert "takes 7 evaluations of the network: ddpm_learned, 7 steps" in told


def test_the_times_of_training_move_and_evaluation_drops_no_class():
    asked = []

    class Spy(nn.Module):
        def __call__(self, x, t, label):
            asked.append((t, label))
            return x

    task, batch = task_of(Spy(), class_dropout=0.9), batch_of()
    state = TrainState(np.int32(0), jax.random.key(0), {"network": {}}, {}, {}, {})

    @jax.jit
    def ask(batch):
        asked.clear()
        for seed in range(2):
            task.loss(state.params, state, batch, jax.random.key(seed))
        for seed in range(2):
            task.evaluate(state.params, {}, batch, jax.random.key(seed))
        return list(asked)

    (one, _), (other, _), *held_out = ask(batch)
    assert not np.isin(one, other).any()
    np.testing.assert_array_equal(held_out[0][0], held_out[1][0])
    for _, label in held_out:
        np.testing.assert_array_equal(label, batch["label"])
