"""Plain, denoising and vector-quantized autoencoders; corruptions; figures of reconstructions."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.autoencoder.corrupt import add_noise, mask_patches
from cvjax.autoencoder.model import Decoder, Encoder, GridDecoder, GridEncoder
from cvjax.autoencoder.quantize import FiniteScalarQuantizer, VectorQuantizer
from cvjax.autoencoder.task import Autoencoder, Network, between
from cvjax.errors import InputError
from cvjax.train.state import TrainState
from cvjax.train.task import Task

SHAPE = (12, 12, 1)


def batch_of(size=6):
    image = np.random.default_rng(3).uniform(size=(size, *SHAPE)).astype(np.float32)
    return {"image": image, "valid": np.ones(size, bool)}


def seen(image, rng):
    return add_noise(image, rng, std=0.1)


TASKS = {
    "plain": Autoencoder(Encoder(3, (4,), 8), Decoder(SHAPE, (4,), 8)),
    "denoising": Autoencoder(GridEncoder(2, (4,)), GridDecoder(1, (4,)), corrupt=seen),
    "vq": Autoencoder(GridEncoder(3, (4,)), GridDecoder(1, (4,)), VectorQuantizer(8)),
    "fsq": Autoencoder(GridEncoder(2, (4,)), GridDecoder(1, (4,)), FiniteScalarQuantizer((3, 4))),
}


@pytest.mark.parametrize("name", TASKS)
def test_padding_changes_nothing_and_pictures_are_images(name):
    task, batch = TASKS[name], batch_of()
    assert isinstance(task, Task)
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)
    assert set(model_state) == ({"codebook"} if name == "vq" else set())
    assert {"encoder", "decoder"} <= set(params["model"])
    state = TrainState(np.int32(0), jax.random.key(0), params, {}, model_state, {})

    @jax.jit
    def results(batch):
        rng = jax.random.key(1)
        take = jax.value_and_grad(lambda p: task.loss(p, state, batch, rng), has_aux=True)
        (loss, (changed, metrics)), gradient = take(params)
        found = task.evaluate(params, model_state, batch, rng)
        outputs = task.predict(params, model_state, batch, rng)
        pictures = task.visualize(params, model_state, batch, rng)
        numbers = [{key: m.compute() for key, m in of.items()} for of in (metrics, found)]
        return (loss, gradient, changed, numbers), outputs, pictures

    padded = {"image": batch["image"].copy(), "valid": np.arange(6) < 4}
    padded["image"][4:] = np.nan
    one, outputs, pictures = results(padded)
    two = results(padded | {"image": batch["image"]})[0]
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    assert one[0] != results(batch)[0][0]
    assert results(padded | {"valid": np.zeros(6, bool)})[0][0] == 0
    for group in ("encoder", "decoder"):
        assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(one[1]["model"][group]))
    assert ("indices" in outputs) == (name in ("vq", "fsq"))
    # The loss is the error of what comes out, before it is clipped.
    trained, held_out = one[3]
    assert held_out["mse"] > 0 and one[0] >= held_out["mse"] * 0.999
    np.testing.assert_allclose(one[0], trained["mse"] + trained.get("bottleneck", 0), rtol=1e-5)
    assert name != "vq" or trained["bottleneck"] > 1e-3 * trained["mse"]
    rows = 3 if name == "denoising" else 2
    assert pictures["reconstructions"].shape == (rows * 13 + 1, 6 * 13 + 1, 1)
    assert pictures["interpolations"].shape == (3 * 13 + 1, 10 * 13 + 1, 1)
    for picture in pictures.values():
        assert 0 <= picture.min() <= picture.max() <= 1


def test_a_denoiser_sees_the_corrupted_and_is_asked_for_the_clean_image():
    blank = lambda image, rng: jnp.zeros_like(image)  # noqa: E731
    task, batch = Autoencoder(GridEncoder(2, (4,)), GridDecoder(1, (4,)), corrupt=blank), batch_of()
    params, _ = jax.jit(task.init)(jax.random.key(0), batch)
    state = TrainState(np.int32(0), jax.random.key(0), params, {}, {}, {})
    found = jax.jit(task.predict)(params, {}, batch, jax.random.key(0))["reconstruction"]
    np.testing.assert_array_equal(found, np.repeat(found[:1], 6, axis=0))
    apply = jax.jit(task.network.apply)
    raw, _ = apply({"params": params["model"]}, 0 * batch["image"], batch["valid"])
    loss, _ = jax.jit(task.loss)(params, state, batch, jax.random.key(0))
    assert loss == pytest.approx(float(np.mean((raw - batch["image"]) ** 2)), rel=1e-5)


def test_what_is_done_to_an_image_does_not_depend_on_the_batch():
    task, batch = TASKS["denoising"], batch_of() | {"index": np.arange(6, dtype=np.int32)}
    params, state = jax.jit(task.init)(jax.random.key(0), batch)
    predict = lambda batch: task.predict(params, state, batch, jax.random.key(1))  # noqa: E731
    whole = jax.jit(predict)(batch)["reconstruction"]
    part = jax.jit(predict)({name: value[3:] for name, value in batch.items()})["reconstruction"]
    np.testing.assert_allclose(part, whole[3:], atol=1e-6)  # sums in another order


def test_a_single_image_has_pictures_too():
    task, batch = TASKS["plain"], batch_of(1)
    shapes = jax.eval_shape(
        lambda: task.visualize(*task.init(jax.random.key(0), batch), batch, jax.random.key(0))
    )
    assert shapes["interpolations"].shape == (13 + 1, 10 * 13 + 1, 1)
    np.testing.assert_array_equal(between(np.ones((1, 2)), 3), np.ones((3, 2)))


def test_impossible_decoders_and_images():
    task = Autoencoder(GridEncoder(2, (4,)), GridDecoder(3, (4,)))
    with pytest.raises(InputError, match=r"gives \[6, 12, 12, 3\]; of images \[6, 12, 12, 1\]"):
        jax.eval_shape(task.init, jax.random.key(0), batch_of())
    batch = {name: np.asarray(value) for name, value in batch_of().items()}
    task.check(batch)
    with pytest.raises(InputError, match="images have values from -"):
        task.check(batch | {"image": batch["image"] - 1})


def test_interpolations_begin_and_end_at_the_images():
    z = np.arange(10, dtype=np.float32).reshape(5, 2)
    line = between(z, 3)
    np.testing.assert_allclose(line, [[0, 1], [1, 2], [2, 3], [4, 5], [5, 6], [6, 7]])
    task, batch = TASKS["vq"], batch_of()

    @jax.jit
    def run(batch):
        params, state = task.init(jax.random.key(0), batch)
        variables = {"params": params["model"], **state}
        z = task.network.apply(variables, batch["image"], method=Network.encode)
        walk = task.network.apply(variables, between(z), method=Network.decode_latents)
        whole, code = task.network.apply(variables, batch["image"], batch["valid"])
        decoded = task.network.apply(variables, code.z, method=Network.decode)
        return walk, whole, decoded

    walk, whole, decoded = jax.device_get(run(batch))
    np.testing.assert_allclose(walk[::10], whole[::2], atol=1e-5)
    np.testing.assert_allclose(walk[9::10], whole[1::2], atol=1e-5)
    np.testing.assert_allclose(decoded, whole, atol=1e-5)


def test_corruptions():
    image, rng = np.full((64, *SHAPE), np.float32(0.5)), jax.random.key(0)
    blurred = jax.jit(add_noise, static_argnames="std")
    noisy = np.asarray(blurred(image, rng, std=0.1))
    # 9,216 draws: the standard error of the mean is 0.001.
    assert abs(noisy.mean() - 0.5) < 0.005 and abs(noisy.std() - 0.1) < 0.005
    loud = np.asarray(blurred(image, rng, std=9.0))
    assert loud.min() == 0 and loud.max() == 1
    for rate in (0.0, 0.75, 1.0):
        masked = np.asarray(mask_patches(image, rng, rate=rate, patch=5))
        assert float(mask_patches(image, rng, rate=rate, patch=1).mean()) == pytest.approx(
            0.5 * (1 - rate), abs=0.02
        )
        for rows, columns in ((slice(0, 5), slice(5, 10)), (slice(10, 12), slice(10, 12))):
            square = masked[:, rows, columns]
            assert ((square == 0).all((1, 2, 3)) | (square == 0.5).all((1, 2, 3))).all()
    masked = np.asarray(mask_patches(image, rng))
    assert not np.array_equal(masked, masked[:1].repeat(64, 0))
    with pytest.raises(InputError, match="std is -1"):
        add_noise(image, rng, std=-1.0)
    loud = Autoencoder(Encoder(3), Decoder(SHAPE), corrupt=partial(add_noise, std=-1.0))
    params, state = loud.init(rng, batch_of())
    with pytest.raises(InputError, match="std is -1"):
        loud.loss(params, SimpleNamespace(model_state=state), batch_of(), rng)
    with pytest.raises(InputError, match="std is 'a'; it must be a number"):
        add_noise(image, rng, std="a")
    for wrong in (dict(rate=1.5), dict(patch=0), dict(patch=2.5), dict(patch=3.0)):
        name, value = next(iter(wrong.items()))
        with pytest.raises(InputError, match=f"mask_patches: {name} is {value}; it must be"):
            mask_patches(image, rng, **wrong)
