"""The task with other losses, with learned variances, and with images out of range."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion import losses
from cvjax.diffusion.coupling import optimal_coupling
from cvjax.diffusion.grids import karras
from cvjax.diffusion.learned_variance import LearnedVariance, ddpm_learned, variational_bound
from cvjax.diffusion.preconditioning import Preconditioned
from cvjax.diffusion.process import EDM, FlowMatching, VariancePreserving, like, perturb, uniform
from cvjax.diffusion.samplers import ddim
from cvjax.diffusion.task import Diffusion
from cvjax.errors import InputError
from cvjax.train.loop import fit
from cvjax.train.state import TrainState
from tests.diffusion.test_task import CLASSES, SHAPE, Linear, batch_of, start, task_of


class Doubled(nn.Module):
    """Twice the channels: a prediction and v."""

    @nn.compact
    def __call__(self, x, t, label):
        return nn.Conv(2, (3, 3))(x) + t[:, None, None, None] + label[:, None, None, None]


TIMES = (np.arange(8, dtype=np.float32) + 0.5) / 8


def errors_of(task, params, batch):
    image, label = task._clean(batch)
    eps = np.random.default_rng(7).standard_normal(image.shape).astype(np.float32)
    return jax.jit(lambda p: task._errors(p, image, label, TIMES, eps))(params), eps


def test_a_weighting_multiplies_the_errors():
    process, batch = VariancePreserving("linear", "v"), batch_of()
    plain = task_of(Linear(), process=process)
    params, _ = start(plain, batch)
    weighting = functools.partial(losses.min_snr, gamma=2.0)
    (without, _), (weighted, _) = (
        errors_of(task, params, batch)
        for task in (plain, task_of(Linear(), process=process, weighting=weighting))
    )
    expected = jax.jit(lambda: losses.of_prediction(weighting, process, TIMES))() * without
    np.testing.assert_allclose(weighted, expected, rtol=1e-5)


def test_the_coupling_is_for_training_alone_and_keeps_to_the_class():
    seen = []

    def spy(image, eps, group):
        seen.append((image, eps, group))
        return optimal_coupling(image, eps, group)

    batch = batch_of() | dict(valid=np.arange(8) < 7)
    task = task_of(Linear(), coupling=spy, class_dropout=0.5)
    params, state = start(task, batch)
    seen.clear()  # it was tried
    losses_of = [
        one.loss(params, state, batch, jax.random.key(3))[0]
        for one in (task, task_of(Linear(), class_dropout=0.5))
    ]
    assert len(seen) == 1 and losses_of[0] != losses_of[1]
    # Dropping a class comes afterwards, and what is not valid is a group of its own.
    labels = [0, 1, 2, 0, 1, 2, 0, CLASSES]
    np.testing.assert_array_equal(seen[0][2], np.stack([labels, np.arange(8) < 7], axis=1))
    task.evaluate(params, {}, batch, jax.random.key(0))
    assert len(seen) == 1


def test_the_noise_of_a_loss_is_standard_or_what_the_coupling_gives():
    """The error of a network that says 0 is the mean square of the noise, which is its target."""

    class Nothing(nn.Module):
        def __call__(self, x, t, label):
            seen.append((x, t))
            return 0 * x

    def coupling(image, noise, group):
        return 3.0 + 0 * noise

    seen, batch, process = [], batch_of(400), VariancePreserving("linear", "eps")
    for given, expected in ((None, 1.0), (coupling, 9.0)):
        task = task_of(Nothing(), process=process, coupling=given)
        state = TrainState(np.int32(0), jax.random.key(0), {"network": {}}, {}, {}, {})
        value, _ = task.loss(state.params, state, batch, jax.random.key(3))
        # 4 standard errors of 25,600 squares.
        np.testing.assert_allclose(value, expected, atol=4 * np.sqrt(2 / 25_600))
        x, t = seen[-1]
        eps = (x - perturb(process, 2 * batch["image"] - 1, 0.0, t)) / like(process.sigma(t), x)
        np.testing.assert_allclose(np.mean(eps**2), value, rtol=1e-3)


def test_rows_that_are_not_valid_take_no_noise_from_others():
    """Also where no condition tells them apart: without classes."""
    seen = []

    def spy(image, eps, group):
        seen.append((eps, optimal_coupling(image, eps, group)))
        return seen[0][1]

    valid = np.arange(8) % 2 == 0
    task = task_of(Linear(), coupling=spy, num_classes=0)
    batch = {"image": batch_of()["image"], "valid": valid}
    params, state = start(task, batch)
    seen.clear()  # it was tried
    task.loss(params, state, batch, jax.random.key(3))
    before, after = (np.asarray(eps)[valid].reshape(4, -1) for eps in seen[0])
    assert {row.tobytes() for row in before} == {row.tobytes() for row in after}


def test_a_network_that_gives_other_channels_is_one_line():
    """Else they would be broadcast against the target, in silence."""
    with pytest.raises(InputError, match=r"gives \[8, 8, 8, 2\].* must give \[8, 8, 8, 1\]"):
        task_of(Doubled()).init(jax.random.key(0), batch_of())
    single = hybrid()
    single = LearnedVariance(Linear(), single.process, num_classes=CLASSES, image_shape=SHAPE)
    with pytest.raises(InputError, match=r"must give \[8, 8, 8, 2\]: set its out_channels"):
        single.init(jax.random.key(0), batch_of())


def test_a_preconditioned_network_has_the_process_of_the_task():
    process = EDM()
    network, sampler = Preconditioned(Linear(), process), functools.partial(ddim, times=karras)
    task = task_of(network, process=process, weighting=losses.edm, sampler=sampler)
    params, state = start(task, batch_of())
    value, _ = jax.jit(lambda p: task.loss(p, state, batch_of(), jax.random.key(0)))(params)
    assert jnp.isfinite(value)
    for other in (EDM(sigma_max=40.0), FlowMatching()):
        with pytest.raises(InputError, match="process is .* but that of the network is"):
            task_of(network, process=other)


def test_a_preconditioned_network_has_no_other_channels():
    """One channel would be broadcast: half of x_t would be added to what means the variance."""
    process = EDM()
    task = LearnedVariance(
        Preconditioned(Doubled(), process), process, num_classes=CLASSES, image_shape=SHAPE
    )
    with pytest.raises(InputError, match=r"gives \[8, 8, 8, 2\]; of \[8, 8, 8, 1\]"):
        task.init(jax.random.key(0), batch_of())


def hybrid(**fields):
    fields = dict(num_classes=CLASSES, image_shape=SHAPE, sample_steps=4) | fields
    process = VariancePreserving("linear", "eps", uniform)
    return LearnedVariance(Doubled(), process, **fields)


@pytest.mark.parametrize("simple", [1.0, 0.0])
def test_the_hybrid_loss(simple):
    """Both terms at times on the grid; the bound moves the mean only where it is all."""
    task, batch = hybrid(simple_weight=simple, bound_weight=0.01, bound_steps=50), batch_of()
    params, _ = start(task, batch)
    found, eps = errors_of(task, params, batch)
    image, label = task._clean(batch)

    @jax.jit
    def terms(params):
        t = jnp.ceil(TIMES * 50) / 50
        x = perturb(task.process, image, eps, t)
        both = task.network.apply({"params": params["network"]}, x, t, label)
        prediction, v = jnp.split(both, 2, -1)
        bound = variational_bound(task.process, prediction, (v + 1) / 2, image, x, t, t - 1 / 50)
        return jnp.mean((prediction - eps) ** 2, axis=(1, 2, 3)), bound

    squares, bound = jax.device_get(terms(params))
    np.testing.assert_allclose(found, simple * squares + 0.01 * 50 * bound, rtol=1e-4)

    def gradient(task):
        total = lambda p: jnp.sum(errors_of(task, p, batch)[0])  # noqa: E731
        return np.asarray(jax.jit(jax.grad(total))(params)["network"]["Conv_0"]["bias"])

    of_mean, of_variance = gradient(task)
    assert of_variance != 0
    if simple:
        without = gradient(hybrid(bound_weight=0.0, bound_steps=50))
        np.testing.assert_allclose(of_mean, without[0], rtol=1e-5)
    else:
        assert of_mean != 0


def test_samplers_with_and_without_the_variances():
    batch = batch_of()
    for sampler in (ddim, functools.partial(ddpm_learned)):
        task = hybrid(sampler=sampler, guidance=2.0)
        task.check({name: np.asarray(value) for name, value in batch.items()})
        params, _ = start(task, batch)
        x, t = np.zeros((8, *SHAPE), np.float32), np.full(8, 0.5, np.float32)
        told = jax.eval_shape(task.denoiser(params, batch["label"]), x, t)
        assert told.shape[-1] == (1 if sampler is ddim else 2)
        sample = jax.jit(task.sample)(params, batch["label"], jax.random.key(0))
        assert sample.shape == (8, *SHAPE) and np.all(np.isfinite(sample))


@pytest.mark.parametrize(
    "wrong", [dict(simple_weight=-1.0), dict(bound_weight=-1.0), dict(bound_steps=0)]
)
def test_impossible_fields(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        hybrid(**wrong)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 255.0), (0.0, np.nan)])
def test_images_out_of_range_stop_a_run_before_it_begins(low, high, tmp_path):
    images = np.random.default_rng(0).uniform(0, 1, (8, *SHAPE)).astype(np.float32)
    images[:, 0, 0], images[:, 0, 1] = low, high
    data = [{"image": image, "label": np.int32(0)} for image in images]
    with pytest.raises(InputError, match=r"images have values from .* takes them in \[0, 1\]"):
        fit(task_of(Linear()), data, steps=1, batch_size=8, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_not_valid_may_be_out_of_range():
    batch = {name: np.asarray(value) for name, value in batch_of().items()}
    image = batch["image"].copy()
    image[3] = 255.0
    task = task_of(Linear())
    task.check(batch)
    task.check(batch | dict(image=image, valid=np.arange(8) != 3))
    task.check(batch | dict(valid=np.zeros(8, bool)))
    with pytest.raises(InputError, match="to 255"):
        task.check(batch | dict(image=image))
    assert isinstance(task, Diffusion)
