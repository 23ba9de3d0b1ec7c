import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.classification.whitening import whiten
from cvjax.data.sources.arrays import Arrays
from cvjax.errors import InputError
from cvjax.nn.resnet9 import ResNet9


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_white(channels):
    """The convolution of the very images has the identity as second moment; its half mirrors it."""
    draws = np.random.default_rng(0)
    steps = draws.normal(0, 12, (20, 12, 12, channels))
    images = np.clip(128 + steps.cumsum(1).cumsum(2), 0, 255).astype(np.uint8)  # smooth
    source = Arrays({"image": images})
    model = ResNet9(width=2)
    x = (images / 255 - 0.4) / 0.2
    params = {"model": jax.jit(model.init)(jax.random.key(0), jnp.float32(x))["params"]}
    new, state, table = whiten(params, {"a": 1}, source=source, mean=0.4, std=0.2, epsilon=1e-6)
    kernel = new["model"]["whitening"]["kernel"]
    y = jax.lax.conv_general_dilated(
        jnp.float32(x), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = np.float64(y).reshape(-1, y.shape[-1])
    half = y.shape[-1] // 2
    np.testing.assert_allclose(y[:, :half], -y[:, half:])
    # Float32 in directions whose variance is a thousandth of the largest; epsilon is 1e-6.
    np.testing.assert_allclose(y[:, :half].T @ y[:, :half] / len(y), np.eye(half), atol=0.02)
    assert state == {"a": 1} and "whitening/kernel" in table
    same = {k: v for k, v in new["model"].items() if k != "whitening"}
    jax.tree.map(
        np.testing.assert_array_equal, same,
        {k: v for k, v in params["model"].items() if k != "whitening"},
    )  # fmt: skip


def test_layers_that_do_not_fit():
    source = Arrays({"image": np.zeros((2, 8, 8, 1), np.uint8)})
    with pytest.raises(InputError, match="no convolution named 'whitening'"):
        whiten({"model": {"conv": {}}}, {}, source=source)
    good = {"model": {"whitening": {"kernel": jnp.zeros((3, 3, 1, 18))}}}
    for name, value in dict(examples=0, epsilon=0.0).items():
        with pytest.raises(InputError, match=f"whiten: {name} is {value}; it must be"):
            whiten(good, {}, source=source, **{name: value})
    small = Arrays({"image": np.zeros((2, 2, 8, 1), np.uint8)})
    with pytest.raises(InputError, match="image 0 is 2 x 8; the kernel of 'whitening' is 3 x 3"):
        whiten(good, {}, source=small)
    kernel = {"whitening": {"kernel": jnp.zeros((3, 3, 1, 8))}}
    with pytest.raises(InputError, match="its last axis must be 18"):
        whiten({"model": kernel}, {}, source=source)
