"""Inception v3 is that of pytorch-fid and that of torchvision, with the same weights."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy

from cvjax.errors import InputError
from cvjax.nn.batch_norm import BatchNorm
from cvjax.nn.inception import InceptionV3
from cvjax.nn.pretrained import load_variables
from tests.nn.parity import thin, weights

RECORD = Path(__file__).with_name("inception.npz")
BLOCKS = {"stage1": "Mixed_5d", "stage2": "Mixed_6e", "stage3": "Mixed_7c"}
MODELS = {
    "fid": InceptionV3(),
    "torchvision": InceptionV3(num_classes=1000, variant="torchvision"),
}


def image():
    """float32 [1, 107, 91, 3] in [-1, 1]: of the map, 2 x 1 pixels are left."""
    return np.random.RandomState(7).uniform(-1, 1, size=(1, 107, 91, 3)).astype(np.float32)


@functools.cache
def shapes_of(name):
    """Of the variables, which are those of any size of images; it takes a second."""
    return jax.eval_shape(lambda x: MODELS[name].init(jax.random.key(0), x), image())


@pytest.mark.parametrize("name", MODELS)
def test_maps_and_logits_are_theirs(name, tmp_path):
    model, x = MODELS[name], image()
    with np.load(RECORD) as record:
        shapes = json.loads(record[f"{name}/shapes"].tobytes())
        theirs = {key: record[f"{name}/{key}"] for key in (*BLOCKS, "logits", "resized")}
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(weights({n: tuple(s) for n, s in shapes.items()}), file)
    fresh = jax.tree.map(
        lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), dict(shapes_of(name))
    )
    variables, table = load_variables(fresh, file)
    statuses = {row.status for row in table.rows if not row.path.startswith("AuxLogits")}
    assert statuses == {"loaded", "no weight"}, str(table)

    @jax.jit
    def ours(variables, x):
        return model.apply(variables, x, method="features") | {"logits": model.apply(variables, x)}

    given = ours(variables, x)
    for key in (*BLOCKS, "logits"):
        actual = np.asarray(given[key])
        actual = actual if key == "logits" else thin(actual)
        assert actual.shape == theirs[key].shape
        # Both compute in float32, in another order.
        assert np.abs(actual - theirs[key]).max() < 2e-5 * np.abs(theirs[key]).max(), key
    resize = jax.jit(
        lambda x: jax.image.resize(x, (1, 11, 120, 3), method="linear", antialias=False)
    )
    resized = resize(x)
    np.testing.assert_allclose(thin(np.asarray(resized)), theirs["resized"], atol=1e-5)


def test_every_norm_is_told_which_rows_are_valid():
    """Traced alone: to compile the network for its statistics takes half a minute."""
    model, x, valid, told = MODELS["fid"], image(), np.array([True, False, True]), []
    shapes = shapes_of("fid")

    def listen(call, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            told.append(args[2])
        return call(*args, **kwargs)

    def apply(variables, x):
        return model.apply(variables, x, train=True, valid=valid, mutable=["batch_stats"])

    with nn.intercept_methods(listen):
        jax.eval_shape(apply, shapes, np.repeat(x, 3, axis=0))
    assert len(told) == len(jax.tree.leaves(shapes["batch_stats"])) / 2 == 94
    for rows in told:
        np.testing.assert_array_equal(rows, valid)


def test_strides_and_names():
    model = MODELS["fid"]
    x = jax.ShapeDtypeStruct((2, 299, 299, 3), np.float32)
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), shapes_of("fid"), x)
    shapes = {name: leaf.shape for name, leaf in maps.items()}
    assert shapes == {
        "stage1": (2, 35, 35, 288), "stage2": (2, 17, 17, 768), "stage3": (2, 8, 8, 2048)
    }  # fmt: skip
    assert model.is_of_fid and not MODELS["torchvision"].is_of_fid
    with pytest.raises(InputError, match="variant is 'tf'; it can be 'fid' or 'torchvision'"):
        InceptionV3(variant="tf")
