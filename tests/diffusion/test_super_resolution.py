"""The second stage of a cascade by classes, and without; by captions: `test_text_to_image`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion.samplers import ddim
from cvjax.diffusion.super_resolution import SuperResolution
from cvjax.errors import InputError
from cvjax.train.state import TrainState

SHAPE = (6, 8, 2)


class Affine(nn.Module):
    """One number for each channel that it sees and for each class."""

    classes: int

    @nn.compact
    def __call__(self, x, t, label):
        told = nn.Embed(self.classes + 1, 2)(label)[:, None, None]
        return nn.Dense(2)(x) + told + t[:, None, None, None]


def task_of(classes, **fields):
    fields = dict(num_classes=classes, image_shape=SHAPE, sampler=ddim, sample_steps=3) | fields
    return SuperResolution(Affine(classes), **fields)


def batch_of(n=4):
    image = np.random.default_rng(0).random((n, *SHAPE), np.float32)
    return {"image": image, "label": np.arange(n) % 3, "valid": np.arange(n) < 3}


@pytest.mark.parametrize("classes", [3, 0])
def test_a_stage_by_classes_and_one_without(classes):
    task, batch = task_of(classes, guidance=2.0 if classes else 1.0), batch_of()

    @jax.jit
    def run(batch):
        params, model_state = task.init(jax.random.key(0), batch)
        state = TrainState(0, jax.random.key(1), params, {}, model_state, {})
        loss, _ = task.loss(params, state, batch, jax.random.key(2))
        outputs = task.predict(params, {}, {**batch, "index": jnp.arange(4)}, jax.random.key(3))
        picture = task.visualize(params, {}, batch, jax.random.key(3))["samples"]
        return params, loss, outputs, picture

    params, loss, outputs, picture = run(batch)
    assert np.isfinite(loss) and picture.shape == (3 * 7 + 1, 4 * 9 + 1, 3)
    assert outputs["sample"].shape == (4, *SHAPE) and ("label" in outputs) == (classes > 0)
    low = batch["image"].reshape(4, 3, 2, 4, 2, 2).mean(axis=(2, 4))
    bilinear = jax.image.resize(low[:3], (3, *SHAPE), "linear")
    np.testing.assert_allclose(outputs["bilinear"][:3], bilinear, atol=1e-6)

    def sample(label, first=0):
        condition = task.condition(label, low[first : first + len(label)])
        return jax.jit(task.sample, static_argnames="first")(
            params, condition, jax.random.key(3), first=first
        )

    # As in the prediction, whatever the batch; without classes nobody looks at the label.
    whole = sample(batch["label"])
    np.testing.assert_allclose(whole[:3], outputs["sample"][:3], atol=1e-6)
    np.testing.assert_allclose(sample(batch["label"][1:], 1), whole[1:], atol=1e-6)
    assert np.allclose(sample((batch["label"] + 1) % 3), whole) == (classes == 0)


def test_what_cannot_be_is_one_line():
    task, low = task_of(3), np.zeros((2, 3, 4, 2), np.float32)
    params, _ = jax.jit(task.init)(jax.random.key(0), batch_of())
    for asked, message in (([0, 7], "label is 7"), ([[0], [1]], r"labels are \[2, 1\]")):
        with pytest.raises(InputError, match=message):
            task.sample(params, task.condition(np.array(asked), low), jax.random.key(0))
    with pytest.raises(InputError, match="label is 4, but num_classes is 3"):
        task.check({**batch_of(), "label": np.full(4, 4)})
    with pytest.raises(InputError, match="factor is 5"):
        dataclasses.replace(task, factor=5)
