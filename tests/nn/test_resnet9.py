import jax
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.resnet9 import ResNet9

X = np.zeros((2, 32, 32, 3), np.float32)


def test_the_parameters_are_those_of_the_published_network():
    """Page's has 6,573,120: a 3x3 stem of 1,728, norms of 4,480, and stages that are as ours."""
    shapes = jax.eval_shape(ResNet9().init, jax.random.key(0), X)["params"]
    kernels = sum(
        np.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        if "kernel" in jax.tree_util.keystr(path)
    )  # fmt: skip
    stages = 9 * (64 * 128 + 2 * 128**2 + 128 * 256 + 256 * 512 + 2 * 512**2) + 512 * 10
    assert stages == 6_573_120 - 1_728 - 4_480
    assert kernels == stages + 9 * 3 * 54 + 54 * 64


@pytest.mark.parametrize("height, width", [(32, 32), (28, 28), (9, 17)])
def test_maps_and_strides(height, width):
    model = ResNet9(width=4)
    x = np.zeros((3, height, width, 1), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, x)
    for name, stride in model.strides.items():
        assert maps[name].shape == (3, height // stride, width // stride, 4 * stride)


def test_rows_that_are_not_valid_do_not_count():
    model, key = ResNet9(width=4), jax.random.key(0)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    y = x.copy()
    y[2] = 100.0
    variables = jax.jit(model.init)(key, x)
    valid = np.array([True, True, False, True])
    run = jax.jit(
        lambda x: model.apply(variables, x, train=True, valid=valid, mutable=["batch_stats"])
    )
    (one, state), (other, changed) = jax.device_get((run(x), run(y)))
    np.testing.assert_allclose(one[valid], other[valid], rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state, changed
    )


def test_what_cannot_be():
    with pytest.raises(InputError, match="width is 0"):
        ResNet9(width=0)
    with pytest.raises(InputError, match="at least 8 x 8"):
        jax.eval_shape(ResNet9(width=2).init, jax.random.key(0), np.zeros((1, 7, 8, 1), np.float32))
