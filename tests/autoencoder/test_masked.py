"""The masked autoencoder: what is not seen does not matter, what is told is all that counts."""

import dataclasses

import jax
import numpy as np
import pytest

from cvjax.autoencoder.masked import MaskedAutoencoder, PatchDecoder, image_of, patches_of
from cvjax.errors import InputError
from cvjax.nn.vit import ViT
from cvjax.train.state import TrainState
from cvjax.train.task import Task

SHAPE = (8, 12, 1)
ENCODER = ViT(patch=4, image_size=(8, 12), width=8, depth=1, heads=2, registers=1)
TASK = MaskedAutoencoder(ENCODER, PatchDecoder(16, width=8, heads=2), masked=0.6)


@pytest.fixture(scope="module")
def batch():
    image = np.random.default_rng(3).uniform(size=(4, *SHAPE)).astype(np.float32)
    return {"image": image, "valid": np.ones(4, bool)}


@pytest.fixture(scope="module")
def started(batch):
    params, model_state = jax.jit(TASK.init)(jax.random.key(0), batch)
    assert model_state == {}
    return params, TrainState(np.int32(0), jax.random.key(0), params, {}, {}, {})


@pytest.fixture(scope="module")
def results(started):
    params, state = started

    @jax.jit
    def run(batch):
        rng = jax.random.key(7)
        loss = lambda params, batch: TASK.loss(params, state, batch, rng)[0]  # noqa: E731
        value, (gradient, by_pixel) = jax.value_and_grad(loss, (0, 1), allow_int=True)(
            params, batch
        )
        outputs = TASK.predict(params, {}, batch, rng)
        return value, gradient, by_pixel["image"], outputs, TASK.visualize(params, {}, batch, rng)

    return run


def test_patches_are_a_round_trip_and_those_of_loops():
    image = np.random.default_rng(0).uniform(size=(2, 4, 6, 3)).astype(np.float32)
    found = np.asarray(patches_of(image, 2))
    assert found.shape == (2, 6, 12)
    np.testing.assert_array_equal(found[1, 5], image[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(found[0, 3], image[0, 2:4, 0:2].reshape(-1))
    np.testing.assert_array_equal(image_of(found, 2, image.shape), image)


def test_each_image_has_its_own_mask_of_a_fixed_size(batch):
    order, seen = TASK.split(jax.random.key(0), batch["image"])
    assert seen == 2 and order.shape == (4, 6)  # 40 % of 6 patches
    np.testing.assert_array_equal(np.sort(order, axis=1), [range(6)] * 4)
    assert len(np.unique(order, axis=0)) > 1
    for share, expected in ((0.01, 5), (0.99, 1), (0.5, 3)):
        task = dataclasses.replace(TASK, masked=share)
        assert task.split(jax.random.key(0), batch["image"])[1] == expected
    # All are seen alike often, and a row does not depend on the number of rows beside it.
    many, _ = TASK.split(jax.random.key(1), np.zeros((3000, *SHAPE), np.float32))
    share = (np.asarray(many)[:, :2, None] == np.arange(6)).sum(1).mean(0)
    np.testing.assert_allclose(share, 1 / 3, atol=0.04)  # 5 standard errors


def test_what_is_not_seen_matters_to_the_error_alone(batch, results):
    assert isinstance(TASK, Task)
    of_4 = lambda image: np.asarray(patches_of(image, 4))  # noqa: E731
    value, gradient, by_pixel, outputs, pictures = jax.device_get(results(batch))
    is_seen = of_4(outputs["seen"] == batch["image"]).all(-1)
    assert (is_seen.sum(1) == 2).all()
    told, pixels = of_4(outputs["reconstruction"]), of_4(batch["image"])
    np.testing.assert_array_equal(told[is_seen], pixels[is_seen])
    # Other pixels in the place of the unseen ones: the same is told.
    other = np.where(is_seen[..., None], pixels, 1 - pixels)
    image = image_of(other, 4, batch["image"].shape)
    changed, _, _, again, _ = results(batch | {"image": image})
    np.testing.assert_array_equal(again["reconstruction"], outputs["reconstruction"])
    assert changed != value
    # The gradient at an unseen pixel is that of the squared error over the unseen ones: the told
    # pixels do not move, so that a step of the pixels shows in closed form what was told.
    raw = pixels - of_4(by_pixel) * (4 * 4 * 16) / 2
    expected = np.mean((np.asarray(raw - pixels)[~is_seen]) ** 2)
    assert value == pytest.approx(expected, rel=1e-4)
    # Pictures are clipped.
    np.testing.assert_allclose(np.clip(raw, 0, 1)[~is_seen], told[~is_seen], atol=1e-4)
    assert pictures["reconstructions"].shape == (3 * 9 + 1, 4 * 13 + 1, 1)
    assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(gradient["model"]["decoder"]))


def test_padding_changes_nothing(batch, results):
    padded = {"image": batch["image"].copy(), "valid": np.arange(4) < 2}
    padded["image"][2:] = np.nan
    one, two = results(padded), results(padded | {"image": batch["image"]})
    jax.tree.map(np.testing.assert_array_equal, one[:2], two[:2])
    assert np.isfinite(one[0]) and one[0] != results(batch)[0]
    assert results(padded | {"valid": np.zeros(4, bool)})[0] == 0


def test_what_is_seen_of_an_image_does_not_depend_on_the_batch(batch, started):
    params, state = started
    predict = jax.jit(TASK.predict)
    index, rng = np.arange(4, dtype=np.int32), jax.random.key(5)
    whole = predict(params, state, batch | {"index": index}, rng)["seen"]
    for part in (slice(0, 2), slice(2, 4)):
        rows = {name: value[part] for name, value in (batch | {"index": index}).items()}
        np.testing.assert_array_equal(predict(params, state, rows, rng)["seen"], whole[part])


def test_the_encoder_is_that_of_a_classifier(batch, started):
    params = started[0]["model"]["encoder"]
    whole = jax.eval_shape(ENCODER.init, jax.random.key(0), batch["image"])["params"]
    head = {"head": jax.tree.map(lambda x: np.ones(x.shape), whole["head"])}
    shapes = lambda tree: jax.tree.map(np.shape, tree)  # noqa: E731
    assert shapes({**params, **head}) == shapes(whole)
    # All patches kept in their order are all patches; in another order, as well but reordered.
    order = np.tile(np.arange(6)[::-1], (4, 1))
    variables = {"params": params}
    run = jax.jit(
        lambda keep: ENCODER.apply(variables, batch["image"], keep=keep, method=ViT.encode)
    )
    np.testing.assert_allclose(run(order), np.asarray(run(None))[:, ::-1], atol=1e-5)


def test_what_cannot_be_is_said(batch):
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match=f"masked is {share}"):
            dataclasses.replace(TASK, masked=share)
    for field in ("outputs", "width", "heads"):
        with pytest.raises(InputError, match=f"PatchDecoder: {field} is 0"):
            PatchDecoder(**{"outputs": 16, field: 0})
    with pytest.raises(InputError, match="9 x 12; they must be multiples of patch=4"):
        patches_of(np.zeros((1, 9, 12, 1)), 4)
    narrow = dataclasses.replace(TASK, decoder=PatchDecoder(1, width=8, heads=2))
    with pytest.raises(InputError, match=r"gives \[4, 6, 1\].* must give \[4, 6, 16\]"):
        jax.eval_shape(narrow.init, jax.random.key(0), batch)
    with pytest.raises(InputError, match="values from nan to nan"):
        TASK.check({"image": np.full((1, *SHAPE), np.nan), "valid": np.ones(1, bool)})
    with pytest.raises(InputError, match="at least 2 patches"):
        TASK.split(jax.random.key(0), np.zeros((1, 4, 4, 1)))


def test_the_latent_is_the_mean_over_all_patches(batch, started, results):
    found = results(batch)[3]["latent"]
    variables = {"params": started[0]["model"]["encoder"]}
    encode = jax.jit(lambda image: ENCODER.apply(variables, 2 * image - 1, method=ViT.encode))
    np.testing.assert_allclose(found, encode(batch["image"]).mean(1), atol=1e-5)
