"""VQGAN: the adaptive weight against a slow reference, the delayed start, who pays for what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.autoencoder.model import GridDecoder, GridEncoder
from cvjax.autoencoder.perceptual import feature_distance
from cvjax.autoencoder.quantize import VectorQuantizer
from cvjax.autoencoder.vqgan import VQGAN, adaptive_weight
from cvjax.errors import InputError
from cvjax.gan.losses import Hinge
from cvjax.gan.model import PatchDiscriminator
from cvjax.train.state import TrainState
from cvjax.train.task import Task

SHAPE = (8, 8, 1)


def perceptual(a, b):
    return feature_distance([jnp.concatenate([a, a**2, 1 + a], -1)],
                            [jnp.concatenate([b, b**2, 1 + b], -1)])  # fmt: skip


TASK = VQGAN(
    GridEncoder(2, (4,)), GridDecoder(1, (4,)), VectorQuantizer(4, restart_below=0.0),
    PatchDiscriminator((4, 4), spectral_norm=False), Hinge(), perceptual=perceptual, start=3,
    adversarial_weight=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    image = jax.random.uniform(jax.random.key(3), (4, *SHAPE))
    return {"image": image, "valid": jnp.ones(4, bool)}


@pytest.fixture(scope="module")
def started(batch):
    params, model_state = jax.jit(TASK.init)(jax.random.key(0), batch)
    return TrainState(jnp.int32(0), jax.random.key(0), params, {}, model_state, {})


@pytest.fixture(scope="module")
def results():
    @jax.jit
    def run(state, batch):
        found = []
        for _, loss in TASK.objectives:
            take = jax.value_and_grad(
                lambda p, loss=loss: loss(p, state, batch, jax.random.key(1)), has_aux=True
            )
            (value, (model_state, metrics)), gradient = take(state.params)
            metrics = {name: metric.compute() for name, metric in metrics.items()}
            found.append((value, model_state, metrics, gradient))
        return found

    return run


def zero(tree):
    return all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(tree))


def test_the_weight_is_the_ratio_at_the_last_layer(batch, started, results):
    assert isinstance(TASK, Task)
    params, image = started.params, batch["image"]
    variables = {"params": params["model"], **started.model_state}

    def found_of(kernel):  # by hand: the last layer on what comes to it
        last = {"kernel": kernel, "bias": params["model"]["decoder"]["last"]["bias"]}
        model = {**params["model"], "decoder": {**params["model"]["decoder"], "last": last}}
        found, code = TASK.autoencoder.network.apply(
            variables | {"params": model}, image, batch["valid"]
        )
        return found, code

    def reconstruction(kernel):
        found, _ = found_of(kernel)
        return jnp.mean(jnp.abs(found - image)) + perceptual(found, image).mean()

    def generator(kernel):
        logits = TASK.discriminator.apply({"params": params["discriminator"]}, found_of(kernel)[0])
        return -logits.mean()

    kernel = params["model"]["decoder"]["last"]["kernel"]

    @jax.jit
    def by_hand(kernel):
        both = [jax.value_and_grad(loss)(kernel) for loss in (reconstruction, generator)]
        return *both, found_of(kernel)[1].loss.mean()

    (of_reconstruction, one), (of_generator, two), loss = by_hand(kernel)
    ratio = np.linalg.norm(one) / (np.linalg.norm(two) + 1e-6)
    (value, _, metrics, gradient), _ = results(started.replace(step=jnp.int32(3)), batch)
    assert metrics["adversarial_weight"] == pytest.approx(float(0.5 * ratio), rel=1e-4)
    expected = of_reconstruction + loss + 0.5 * ratio * of_generator
    assert value == pytest.approx(float(expected), rel=1e-4)
    # Lambda is a number: the gradient is that of the sum with it fixed.
    np.testing.assert_allclose(
        gradient["model"]["decoder"]["last"]["kernel"],
        one + 0.5 * ratio * two,
        rtol=1e-3,
        atol=1e-6,
    )
    assert not zero(gradient["model"]["encoder"]) and zero(gradient["discriminator"])
    assert adaptive_weight(jnp.ones(3), jnp.zeros(3)) == 1e4
    assert adaptive_weight(jnp.zeros(3), jnp.zeros(3)) == 0


def test_before_the_start_there_is_no_discriminator(batch, started, results):
    (value, _, metrics, _), (critic, _, critic_metrics, moved) = results(
        started.replace(step=jnp.int32(2)), batch
    )
    assert metrics["adversarial_weight"] == 0 and critic == 0 and zero(moved)
    expected = float(metrics["reconstruction"] + metrics["bottleneck"])
    assert value == pytest.approx(expected, rel=1e-5)
    assert critic_metrics["discriminator/real"] > 0


def test_the_discriminator_pays_for_both_and_moves_alone(batch, started, results):
    _, (value, model_state, metrics, gradient) = results(started.replace(step=jnp.int32(3)), batch)
    assert zero(gradient["model"]) and not zero(gradient["discriminator"])
    jax.tree.map(np.testing.assert_array_equal, model_state, started.model_state)
    variables = {"params": started.params["model"], **started.model_state}
    network = jax.jit(TASK.autoencoder.network.apply)
    found, _ = network(variables, batch["image"], batch["valid"])
    critic = {"params": started.params["discriminator"]}
    judge = jax.jit(TASK.discriminator.apply)
    real, fake = (judge(critic, x) for x in (batch["image"], found))
    assert real.shape == (4, 4, 4)  # a logit for each patch
    assert metrics["discriminator/real"] == pytest.approx(float(jax.nn.relu(1 - real).mean()))
    assert value == pytest.approx(
        float(jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2, rel=1e-5
    )


def test_padding_changes_nothing(batch, started, results):
    state = started.replace(step=jnp.int32(5))
    padded = {
        "image": batch["image"].at[2:].set(jnp.nan),
        "valid": batch["valid"].at[2:].set(False),
    }
    one, two = results(state, padded), results(state, padded | {"image": batch["image"]})
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    assert one[0][0] != results(state, batch)[0][0]
    nothing = results(state, padded | {"valid": jnp.zeros(4, bool)})
    assert nothing[0][0] == 0 and nothing[1][0] == 0
    found = jax.jit(TASK.evaluate)(started.params, started.model_state, batch, jax.random.key(0))
    assert set(found) == {"mse", "psnr", "ssim", "perceptual"}


def test_what_cannot_be_is_said(batch):
    for field in ("start", "perceptual_weight", "adversarial_weight"):
        with pytest.raises(InputError, match=f"{field} is -1; it must be at least 0"):
            dataclasses.replace(TASK, **{field: -1})
    with pytest.raises(InputError, match="values from -1 to -1"):
        TASK.check({"image": np.full((1, *SHAPE), -1.0), "valid": np.ones(1, bool)})
    shapes = lambda task: jax.eval_shape(task.init, jax.random.key(0), batch)  # noqa: E731
    with pytest.raises(InputError, match=r"there is no 'lst' \(did you mean last\?\)"):
        shapes(dataclasses.replace(TASK, last_layer="decoder/lst/kernel"))
    with pytest.raises(InputError, match="which is no array"):
        shapes(dataclasses.replace(TASK, last_layer="decoder/last"))
