"""Captions as a condition, and the upsampler."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.data.sources.captioned_digits import WORDS
from cvjax.diffusion.coupling import optimal_coupling
from cvjax.diffusion.evaluate import UpsamplingPSNR
from cvjax.diffusion.samplers import ddim
from cvjax.diffusion.text_to_image import TextToImage, Upsampler
from cvjax.errors import InputError
from cvjax.nn.text_encoder import TextEncoder
from cvjax.nn.unet import UNet

CAPTIONS = ("a small seven, tilted left", "an eight")


class Words(nn.Module):
    """Adds a number for each word to the image's first channel."""

    @nn.compact
    def __call__(self, x, t, tokens):
        values = self.param("values", nn.initializers.normal(), (len(WORDS) + 1,))
        return x[..., :1] * 0 + jnp.sum(values[tokens], axis=1)[:, None, None, None]


def task_of(kind=TextToImage, network=None, **fields):
    fields = dict(words=WORDS, captions=CAPTIONS, sampler=ddim, sample_steps=3) | fields
    return kind(network or Words(), image_shape=(8, 8, 1), **fields)


def batch_of(task):
    image = np.random.default_rng(1).random((4, 8, 8, 1), np.float32)
    return {"image": image, "tokens": np.asarray(task.tokens(CAPTIONS * 2)),
            "label": np.array([7, 8, 7, 8]), "valid": np.array([True] * 3 + [False])}  # fmt: skip


def start(task, batch):
    return jax.device_get(jax.jit(task.init)(jax.random.key(0), batch))


def test_captions_reach_the_network_and_may_be_left_out():
    task = task_of(guidance=3.0)
    batch = batch_of(task)
    params, _ = start(task, batch)
    values = params["network"]["values"]
    x, t = np.zeros((4, 8, 8, 1), np.float32), np.full(4, 0.5, np.float32)
    said = values[batch["tokens"]].sum(axis=1)
    unsaid = 8 * values[0]
    denoise = jax.jit(lambda params, tokens: task.denoiser(params, tokens)(x, t))
    found = np.asarray(denoise(params, batch["tokens"]))[:, 0, 0, 0]
    np.testing.assert_allclose(found, unsaid + 3.0 * (said - unsaid), rtol=1e-5)
    # The share of captions that are left out, and those that are not valid.
    many = np.tile(batch["tokens"][:1], (10_000, 1))
    dropped = np.asarray(jax.jit(task._dropped)(many, jax.random.key(0)))
    is_null = (dropped == 0).all(axis=1)
    np.testing.assert_allclose(np.mean(is_null), 0.1, atol=4 * np.sqrt(0.09 / 1e4))
    np.testing.assert_array_equal(dropped[~is_null], many[~is_null])
    assert not np.any(np.asarray(jax.jit(task._clean)(batch)[1])[3])


def test_mistakes_in_captions_and_words():
    with pytest.raises(InputError, match="'sevn' is unknown.*seven"):
        task_of(captions=("a sevn",))
    text = TextEncoder(vocabulary=7, length=8)
    with pytest.raises(InputError, match="words are 19, but the vocabulary .* is 7"):
        task_of(network=UNet(num_classes=0, text=text))
    text = TextEncoder(vocabulary=len(WORDS), length=9)
    with pytest.raises(InputError, match="length is 8, but that of the network's text is 9"):
        task_of(network=UNet(num_classes=0, text=text))
    with pytest.raises(InputError, match="text of the network is None"):
        task_of(network=UNet(num_classes=0))
    task = task_of()
    for tokens, message in (
        (None, "need a field tokens; there are: image, label, valid"),
        (np.zeros((4, 9), np.int32), r"length is 8, but a caption of the data has \[9\] tokens"),
        (np.full((4, 8), len(WORDS) + 1), "a token is 20; with 19 words it must be in 0..19"),
    ):
        batch = batch_of(task) | dict(tokens=tokens)
        with pytest.raises(InputError, match=message):
            task.check({name: value for name, value in batch.items() if value is not None})
    task.check(batch_of(task))
    with pytest.raises(InputError, match="num_classes is 10; with captions it must be 0"):
        task_of(num_classes=10)
    with pytest.raises(InputError, match="guidance is 2.0.*class_dropout"):
        task_of(guidance=2.0, class_dropout=0.0)


def test_predict_and_visualize():
    task = task_of()
    batch = batch_of(task)
    params, _ = start(task, batch)
    outputs = jax.eval_shape(task.predict, params, {}, batch, jax.random.key(0))
    assert outputs["sample"].shape == (4, 8, 8, 1) and outputs["label"].shape == (4,)
    without = {name: value for name, value in batch.items() if name != "label"}
    assert set(jax.eval_shape(task.predict, params, {}, without, jax.random.key(0))) == {"sample"}
    picture = jax.eval_shape(task.visualize, params, {}, batch, jax.random.key(0))["samples"]
    assert picture.shape == (2 * 9 + 1, 8 * 9 + 1, 1)
    assert dataclasses.replace(task, captions=()).visualize(params, {}, batch, None) == {}


class Channels(nn.Module):
    """Gives back one of the channels that it sees."""

    number: int = 0

    def __call__(self, x, t, tokens):
        assert x.shape[-1] == 3
        return x[..., self.number : self.number + 1]


def test_what_the_upsampler_sees():
    task = task_of(Upsampler, Channels(1), augmentation=0.5)
    batch = batch_of(task)
    _, condition = jax.device_get(jax.jit(task._clean)(batch))
    low = 2 * batch["image"].reshape(4, 4, 2, 4, 2, 1).mean(axis=(2, 4)) - 1
    np.testing.assert_allclose(condition["low"][:3], low[:3], atol=1e-6)
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32)
    level = dataclasses.replace(task, network=Channels(2))

    @jax.jit
    def run(condition, x, t):
        seen, told = (of.denoiser({"network": {}}, condition)(x, t) for of in (task, level))
        return seen, told, jax.image.resize(condition["low"], x.shape, "linear")

    seen, told, expected = jax.device_get(run(condition, x, np.full(4, 0.5, np.float32)))
    np.testing.assert_allclose(seen, expected)
    assert (told == 0).all()
    # In training: noise of the strength that the network is told.
    many = jax.tree.map(lambda a: np.repeat(a[:1], 2000, axis=0), condition)
    noisy = jax.device_get(jax.jit(task._dropped)(many, jax.random.key(3)))
    deviation = np.std(noisy["low"] - many["low"], axis=(1, 2, 3))
    assert 0 <= noisy["level"].min() and 0.49 < noisy["level"].max() <= 0.5
    # The mean ratio over 2,000 images of 16 pixels, whose deviation is a little low (n - 1).
    np.testing.assert_allclose(np.mean(deviation / noisy["level"]), 0.965, atol=0.03)
    given = task.condition(batch["tokens"], (low + 1) / 2)
    np.testing.assert_allclose(given["low"], low, atol=1e-6)
    assert (given["level"] == 0).all()
    with pytest.raises(InputError, match="level is 0.2: give an rng"):
        task.condition(batch["tokens"], (low + 1) / 2, 0.2)
    for wrong in (np.full_like(low, 200, np.uint8), low - 0.5, np.full_like(low, 255.0)):
        with pytest.raises(InputError, match="images have"):
            task.condition(batch["tokens"], wrong)
    with pytest.raises(InputError, match=r"images are \[4, 3, 4, 1\]; .* \[4, 4, 4, 1\]"):
        task.condition(batch["tokens"], (low[:, :3] + 1) / 2)
    # So it is in sampling, for each row from its own key.
    rng, tokens = jax.random.key(1), np.repeat(batch["tokens"][:1], 500, axis=0)
    grey = np.full((500, *low.shape[1:]), 0.5, np.float32)
    given = task.condition(tokens, grey, 0.2, rng)
    # 500 times 16 numbers or more: 1.5 % is twice the deviation of their deviation.
    np.testing.assert_allclose(np.std(given["low"]), 0.2, rtol=0.015)
    part = task.condition(tokens[:3], grey[:3], 0.2, rng, first=7)
    np.testing.assert_array_equal(part["low"], given["low"][7:10])
    with pytest.raises(InputError, match=r"level is 0.6; it must be in \[0, 0.5\]"):
        task.condition(batch["tokens"], (low + 1) / 2, 0.6)
    np.testing.assert_allclose(given["level"], 0.2)


@pytest.mark.parametrize(
    "wrong", [dict(factor=1), dict(factor=3), dict(augmentation=-0.1),
              dict(coupling=optimal_coupling)]
)  # fmt: skip
def test_impossible_upsamplers(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        task_of(Upsampler, Channels(), **wrong)


def test_the_upsampler_predicts_beside_the_bilinear_image():
    """The guidance leaves the small image alone."""
    task = task_of(Upsampler, Channels())
    batch = batch_of(task)
    outputs = jax.jit(task.predict)({"network": {}}, {}, batch, jax.random.key(0))
    _, condition = jax.device_get(jax.jit(task._clean)(batch))
    resize = jax.jit(lambda low: jax.image.resize(low, (4, 8, 8, 1), "linear"))
    expected = resize((condition["low"] + 1) / 2)
    np.testing.assert_allclose(outputs["bilinear"], expected, atol=1e-6)
    null = task._null(condition)
    assert not np.any(null["asked"]) and null["low"] is condition["low"]


def test_psnr_by_hand():
    metric = UpsamplingPSNR()
    assert metric.result() == {}
    true = np.full((3, 2, 2, 1), 0.5, np.float32)
    off = np.array([0.1, 0.01, 9.0]).reshape(3, 1, 1, 1)
    off = off.astype(np.float32)
    outputs = {"sample": true + off, "bilinear": true + np.float32(0.1)}
    metric.add(outputs, {"image": true, "valid": np.array([True, True, False])})
    metric.add({"sample": true, "bilinear": true},
               {"image": true, "valid": np.array([True, False, False])})  # fmt: skip
    found = metric.result()
    np.testing.assert_allclose(found["sample"], (20 + 40 + 100) / 3, rtol=1e-5)
    np.testing.assert_allclose(found["bilinear"], (20 + 20 + 100) / 3, rtol=1e-5)
    np.testing.assert_allclose(found["gain"], 20 / 3, rtol=1e-4)
