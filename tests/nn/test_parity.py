"""The same numbers as torchvision, timm and Hugging Face with the same weights."""

import importlib.util

import jax
import numpy as np
import pytest
import safetensors.numpy

from cvjax.nn.pretrained import load_variables
from cvjax.nn.vit import ViT
from tests.nn import parity

RECORDED = parity.read()
# What our networks have no use for. A tuple: (in the file, in the model).
LEFT = {
    # Its classifier reads class token and mean of the patches together; there is none in the file.
    "hf dinov2 registers": {"missing": ["params/head/bias", "params/head/kernel"]},
}


@pytest.mark.parametrize("peer", parity.OURS)
def test_every_map_and_the_logits_are_theirs(peer, tmp_path):
    shapes, theirs = RECORDED[peer]
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(parity.weights(shapes), file)
    model, x = parity.OURS[peer], parity.image(peer)
    fresh = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    fresh = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), dict(fresh))
    variables, table = load_variables(fresh, file)

    statuses = {}
    for row in table.rows:
        if row.status not in ("loaded", "no weight"):
            statuses.setdefault(row.status.split(":")[0], []).append(row.path)
    assert statuses == LEFT.get(peer, {}), str(table)

    @jax.jit
    def ours(variables, x):
        if isinstance(model, ViT):  # what it says of an image is not made of its maps
            maps = model.apply(variables, x, method="features")
            return maps | {"logits": model.apply(variables, x)}
        # Once through the network: tracing takes nearly all of the time.
        are_maps = lambda _, name: name == "features"  # noqa: E731
        logits, state = model.apply(variables, x, capture_intermediates=are_maps)
        return state["intermediates"]["features"][0] | {"logits": logits}

    given = ours(variables, x)
    for name, expected in theirs.items():
        actual = parity.thin(np.asarray(given[name]))
        assert actual.shape == expected.shape, name
        # Both compute in float32, in another order: 1e-5 of the largest is what that may cost.
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        assert error < 1e-5, (name, error)


def test_the_record_is_what_they_give():
    for package in ("torch", "torchvision", "timm", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is in the extra `parity`")
    from tests.nn import record_parity

    for peer, (network, stages, layout) in record_parity.peers().items():
        shapes, given = record_parity.record(peer, network, stages, layout)
        recorded_shapes, recorded = RECORDED[peer]
        assert {name: tuple(shape) for name, shape in shapes.items()} == recorded_shapes, peer
        for name, value in given.items():
            np.testing.assert_allclose(
                parity.thin(value), recorded[name], rtol=1e-4, atol=1e-4, err_msg=f"{peer} {name}"
            )
