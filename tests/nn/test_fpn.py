"""The feature pyramid against a slow one in NumPy, at odd sizes, and its extra levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.features import Patches
from cvjax.nn.fpn import FPN, Pyramid, nearest_upsample
from cvjax.nn.resnet import ResNet


def slow_conv(x, kernel, bias, stride):
    """A convolution with kernel // 2 zeros on all sides, one output pixel after the other."""
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    rows, columns = range(0, x.shape[1] - k + 1, stride), range(0, x.shape[2] - k + 1, stride)
    out = [
        [np.tensordot(x[:, i : i + k, j : j + k], kernel, 3) + bias for j in columns] for i in rows
    ]
    return np.asarray(out).transpose(2, 0, 1, 3)


def slow_pyramid(params, maps, extra, count):
    p = {name: (np.float64(v["kernel"]), np.float64(v["bias"])) for name, v in params.items()}
    top, levels = None, [None] * len(maps)
    for i in range(len(maps) - 1, -1, -1):
        lateral = slow_conv(maps[i], *p[f"lateral{i + 1}"], 1)
        if top is not None:
            h, w = lateral.shape[1:3]
            rows = [int(np.floor(r * top.shape[1] / h)) for r in range(h)]
            columns = [int(np.floor(c * top.shape[2] / w)) for c in range(w)]
            lateral = lateral + top[:, rows][:, :, columns]
        top = lateral
        levels[i] = slow_conv(top, *p[f"output{i + 1}"], 1)
    x = maps[-1] if extra == "backbone" else levels[-1]
    for i in range(count):
        if extra == "pool":
            x = x[:, ::2, ::2]
        else:
            x = slow_conv(np.maximum(x, 0) if i else x, *p[f"extra{i + 1}"], 2)
        levels.append(x)
    return levels


@pytest.mark.parametrize("extra, count", [("pool", 1), ("backbone", 2), ("pyramid", 2)])
def test_levels_are_those_of_the_slow_pyramid(extra, count):
    # 100 x 75 pixels: at the strides 8, 16, 32 no map is twice the next one.
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=s).astype(np.float32) for s in
            ((2, 13, 10, 3), (2, 7, 5, 4), (2, 4, 3, 5))]  # fmt: skip
    module = FPN(6, extra, count)
    params = jax.jit(module.init)(jax.random.key(0), maps)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    found = jax.jit(module.apply)({"params": params}, maps)
    expected = slow_pyramid(params, maps, extra, count)
    assert len(found) == 3 + count == len(module.strides([8, 16, 32]))
    for ours, theirs in zip(found, expected, strict=True):
        # float32 sums of up to 54 terms, three convolutions deep.
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())
    assert module.strides([8, 16, 32])[3:] == [64, 128][:count]


@pytest.mark.parametrize("sizes", [(2, 3), (5, 7), (1, 4), (6, 6), (3, 10), (7, 3)])
def test_upsampling_takes_the_pixel_at_the_floor(sizes):
    small, large = sizes
    x = np.arange(small, dtype=np.float32)[None, :, None, None]
    found = nearest_upsample(x, large, 2)[0, :, 0, 0]
    np.testing.assert_array_equal(found, [np.floor(i * small / large) for i in range(large)])


def test_bfloat16_stays_bfloat16_and_parameters_float32():
    maps = [jnp.ones((1, 4, 4, 3)), jnp.ones((1, 2, 2, 3))]
    module = FPN(4, "pyramid", 1, dtype=jnp.bfloat16)
    levels, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), maps))
    assert {level.dtype for level in levels} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_impossible_settings():
    with pytest.raises(InputError, match="extra is 'p6'; it can be 'pool'"):
        FPN(extra="p6")
    with pytest.raises(InputError, match="extra_levels is -1"):
        FPN(extra_levels=-1)


def test_a_pyramid_over_any_backbone_has_levels_of_its_strides():
    backbone = Patches(ResNet(stem="cifar", width=4, stage_sizes=(1, 1, 1)), 2)
    pyramid = Pyramid(backbone, FPN(5, "pool", 1), ("stage3", "stage2"))
    assert pyramid.strides == [4, 8, 16]
    levels, variables = jax.eval_shape(
        lambda: pyramid.init_with_output(jax.random.key(0), jnp.zeros((2, 37, 50, 3)))
    )
    assert [level.shape for level in levels] == [(2, 10, 13, 5), (2, 5, 7, 5), (2, 3, 4, 5)]
    assert set(variables["params"]) == {"backbone", "fpn"}
    assert Pyramid(backbone, FPN(5)).strides == [2, 4, 8]


def test_statistics_are_those_of_the_valid_rows():
    pyramid = Pyramid(ResNet(stem="cifar", width=4, stage_sizes=(1, 1)), FPN(4))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(pyramid.init)(jax.random.key(0), x)
    valid = np.array([True, False, True])
    apply = jax.jit(
        lambda x: pyramid.apply(variables, x, train=True, valid=valid, mutable=["batch_stats"])[0]
    )
    other = np.where(valid[:, None, None, None], x, 7 * x)
    for ours, theirs in zip(apply(x), apply(other), strict=True):
        np.testing.assert_array_equal(ours[valid], theirs[valid])
