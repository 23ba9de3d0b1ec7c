"""The task of segmentation: what counts, what is reported, what is shown."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax import draw
from cvjax.errors import InputError
from cvjax.nn.resnet import ResNet
from cvjax.segmentation.heads import SegFormer
from cvjax.segmentation.losses import cross_entropy, dice, focal
from cvjax.segmentation.model import Segmenter
from cvjax.segmentation.sliding_window import sliding_window
from cvjax.segmentation.task import Segmentation, measure
from cvjax.train.task import Task

CLASSES = 3


class Linear(nn.Module):
    """The smallest model that a person could bring: no statistics, no `valid`."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(CLASSES)(x)


NETWORK = Segmenter(
    ResNet(stem="cifar", width=4, stage_sizes=(1, 1)), SegFormer(CLASSES, 5, dropout=0.2)
)


def batch_of(n, channels=1, seed=0, size=(5, 7)):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(size=(n, *size, channels)).astype(np.float32),
        "mask": rng.choice(np.array([0, 1, 2, 255], np.uint8), size=(n, *size)),
        "valid": np.ones(n, bool),
    }


@functools.cache
def initialized(model):
    return jax.device_get(jax.jit(Segmentation(model).init)(jax.random.key(0), batch_of(4)))


@functools.cache
def step_of(model):
    task = Segmentation(model, {"ce": cross_entropy, "dice": dice})

    @jax.jit
    def step(params, model_state, batch):
        state = SimpleNamespace(model_state=model_state)
        loss = task.objectives[0].loss
        result = jax.value_and_grad(loss, has_aux=True)(params, state, batch, jax.random.key(1))
        key = jax.random.key(0)
        return result, [
            method(params, model_state, batch, key)
            for method in (task.evaluate, task.predict, task.visualize)
        ]

    return lambda *given: jax.device_get(step(*given))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("model", [NETWORK, Linear()], ids=["segmenter", "linear"])
def test_what_is_not_valid_changes_nothing_bit_for_bit(model):
    assert isinstance(Segmentation(model), Task)
    one, other = batch_of(6), batch_of(6)
    one["valid"][[1, 4]] = other["valid"][[1, 4]] = False
    other["image"][[1, 4]] = np.nan
    other["mask"][[1, 4]] = 77
    step = functools.partial(step_of(model), *initialized(model))
    trained, (metrics, outputs, pictures) = step(one)
    trained_other, (metrics_other, outputs_other, pictures_other) = step(other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))
    assert_equal((trained, metrics, pictures), (trained_other, metrics_other, pictures_other))
    found, expected = outputs["prediction"], outputs_other["prediction"]
    np.testing.assert_array_equal(found[one["valid"]], expected[one["valid"]])
    assert metrics["loss"].count == (one["mask"][one["valid"]] != 255).sum()


@pytest.mark.parametrize("model", [NETWORK, Linear()], ids=["segmenter", "linear"])
def test_a_batch_of_nothing_teaches_nothing(model):
    params, model_state = initialized(model)
    for field, value in (("valid", False), ("mask", 255)):
        batch = batch_of(6)
        batch[field][:] = value
        (result, gradient), (metrics, _, _) = step_of(model)(params, model_state, batch)
        assert result[0] == 0 and metrics["accuracy"].count == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
        if field == "valid":
            assert_equal(result[1][0], model_state)


def test_loss_metrics_and_predictions_are_those_of_the_closed_form():
    batch, model = batch_of(3, channels=2), Linear()
    weights = {"a": 0.5}
    task = Segmentation(model, {"a": cross_entropy, "b": focal}, weights, mean=0.25, std=0.5)
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)
    dense = jax.tree.map(np.float64, params["model"]["Dense_0"])
    logits = (batch["image"] - 0.25) / 0.5 @ dense["kernel"] + dense["bias"]
    counts = batch["mask"] != 255
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = log_p[counts][np.arange(counts.sum()), batch["mask"][counts]]
    a, b = -right.mean(), -((1 - np.exp(right)) ** 2 * right).mean()

    state = SimpleNamespace(model_state=model_state)
    key = jax.random.key(0)

    @jax.jit
    def run(params, batch):
        return (
            task.loss(params, state, batch, key),
            task.evaluate(params, model_state, batch, key),
            task.predict(params, model_state, batch, None)["prediction"],
        )

    (value, (_, trained)), held_out, found = run(params, batch)
    np.testing.assert_allclose(value, 0.5 * a + b, rtol=1e-5)
    for metrics in (trained, held_out):
        assert set(metrics) == {"loss", "a", "b", "accuracy"}
        for name, expected in {"loss": 0.5 * a + b, "a": a, "b": b}.items():
            np.testing.assert_allclose(metrics[name].compute(), expected, rtol=1e-5)
        accuracy = (logits.argmax(-1) == batch["mask"])[counts].mean()
        np.testing.assert_allclose(metrics["accuracy"].compute(), accuracy, rtol=1e-6)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, logits.argmax(-1))
    evaluate = Segmentation(model).evaluate
    assert set(jax.eval_shape(evaluate, params, model_state, batch, None)) == {"loss", "accuracy"}


def test_batches_of_any_size_give_the_same_mean():
    params, model_state = initialized(Linear())
    evaluate = jax.jit(Segmentation(Linear()).evaluate)
    batch = batch_of(7)
    whole = evaluate(params, model_state, batch, None)
    parts = [
        evaluate(params, model_state, {k: v[part] for k, v in batch.items()}, None)
        for part in (slice(0, 1), slice(1, 3), slice(3, 7))
    ]
    for name, metric in whole.items():
        merged = parts[0][name].merge(parts[1][name]).merge(parts[2][name])
        np.testing.assert_allclose(metric.compute(), merged.compute(), rtol=1e-6)


def test_a_label_that_is_no_class_is_not_passed_over():
    params, model_state = initialized(Linear())
    batch = batch_of(3)
    batch["mask"][0, 0, 0] = CLASSES
    (result, _), _ = step_of(Linear())(params, model_state, batch)
    assert np.isnan(result[0])


def test_masks_are_looked_at_before_training():
    task, batch = Segmentation(NETWORK), batch_of(3)
    task.check(batch)
    for label in (-1, CLASSES):
        mask = np.int32(batch["mask"])
        mask[1, 2, 3] = label
        message = rf"not 255 \(ignored\), is {label}, but num_classes is 3: classes are 0..2"
        with pytest.raises(InputError, match=message):
            task.check({**batch, "mask": mask})
        task.check({**batch, "mask": mask, "valid": np.array([True, False, True])})
    wide, logits = {**batch, "mask": batch["mask"][..., None]}, jnp.zeros((3, 5, 7, CLASSES))
    with pytest.raises(InputError, match=r"mask is \[3, 5, 7, 1\]; .* must be \[3, 5, 7\]$"):
        measure(logits, wide, losses={"cross_entropy": cross_entropy})
    with pytest.raises(InputError, match="needs a field mask; there are: image, valid"):
        task.check({name: batch[name] for name in ("image", "valid")})


def test_a_large_image_is_predicted_in_windows():
    params, model_state = initialized(Linear())
    logits = functools.partial(Segmentation(Linear()).logits, params, model_state)
    image = batch_of(1, size=(19, 23))["image"]
    found = sliding_window(logits, image[0], window=8, overlap=0.4)
    np.testing.assert_allclose(found, logits(image)[0], rtol=1e-5, atol=1e-6)


paint = jax.jit(draw.paint_classes)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_pictures_have_image_truth_and_prediction_side_by_side(channels):
    task = Segmentation(Linear())
    batch = batch_of(4, channels)
    batch["valid"][2] = False
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)

    @jax.jit
    def see(params, batch):
        given = params, model_state, batch, None
        return task.visualize(*given)["segmentation"], task.predict(*given)["prediction"]

    picture, prediction = jax.device_get(see(params, batch))
    # Cells of 3 x 7 pixels and 2 between them: three in the first row, one in the second.
    assert picture.shape == (2 * 7 + 2, 3 * 23 + 2, 3)
    assert picture.min() >= 0 and picture.max() <= 1
    cells = [picture[2:7, 2 + 23 * i : 23 + 23 * i] for i in range(3)]
    assert not cells[2].any()
    image = np.broadcast_to(batch["image"][1, ..., : 3 if channels >= 3 else 1], (5, 7, 3))
    expected = [
        image,
        paint(image, np.int32(batch["mask"][1])),
        paint(image, prediction[1]),
    ]
    np.testing.assert_allclose(cells[1], np.concatenate(expected, axis=1), rtol=1e-6)


def test_losses_that_cannot_be_added():
    with pytest.raises(InputError, match="losses is empty"):
        Segmentation(Linear(), {})
    with pytest.raises(InputError, match="'accuracy' is the name of another metric"):
        Segmentation(Linear(), {"accuracy": dice})
    with pytest.raises(InputError, match="no loss is named 'dise' .did you mean dice"):
        Segmentation(Linear(), {"dice": dice}, {"dise": 1.0})
    with pytest.raises(InputError, match=r"weights\.dice is -1; it must be at least 0"):
        Segmentation(Linear(), {"dice": dice}, {"dice": -1})
    with pytest.raises(InputError, match=r"losses\.dice is None; it must be a function"):
        Segmentation(Linear(), {"dice": None})
