"""ResNet: published sizes, parity with a slow NumPy network, strides, masks, remat, bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.resnet import ResNet

TINY = dict(num_classes=5, width=4, stage_sizes=(1, 2))


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initialize(model: ResNet, x: np.ndarray, seed: int = 0) -> dict:
    """Variables far from the usual zeros and ones, so that none of them can be forgotten."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        match path[-1].key:
            case "kernel":
                return noise * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
            case "scale" | "var":
                return np.exp(0.3 * noise)
            case _:
                return 0.3 * noise

    shapes = jax.eval_shape(model.init, jax.random.key(seed), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("depth", "count"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_parameter_counts_are_the_published_ones(depth, count):
    model, x = ResNet(depth), np.zeros((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
    assert model.strides == {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}


@functools.cache
def narrow(stem):
    model = ResNet(50, stem=stem, width=2)
    return model, jax.eval_shape(model.init, jax.random.key(0), images(1, 64, 64, 3))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("size", [(64, 96), (65, 33), (63, 1), (37, 100)])
def test_strides_are_true(stem, size):
    model, variables = narrow(stem)
    apply = functools.partial(model.apply, method="features")
    maps = jax.eval_shape(apply, variables, images(1, *size, 3))
    assert list(maps) == list(model.strides) == ["stage1", "stage2", "stage3", "stage4"]
    for number, (name, stride) in enumerate(model.strides.items()):
        height, width = (-(-length // stride) for length in size)
        assert maps[name].shape == (1, height, width, 4 * 2 * 2**number), name


def test_features_need_no_head():
    model = ResNet(**TINY, stem="cifar")
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, method="features"), images(1, 8, 8, 3)
    )
    assert "head" not in variables["params"]


def reference_conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Cross-correlation, one output pixel after the other, with padding kernel // 2 all round."""
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    batch, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (height + 2 * pad - size) // stride + 1, (width + 2 * pad - size) // stride + 1
    y = np.zeros((batch, height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.tensordot(window, kernel, 3)
    return y


def reference_max_pool(x: np.ndarray) -> np.ndarray:
    """3x3, stride 2, padding 1."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    height, width = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    rows = [
        [padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(width)]
        for i in range(height)
    ]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def reference_resnet(variables: dict, x: np.ndarray, model: ResNet) -> np.ndarray:
    """The logits in evaluation, written from the paper in float64 and from the names alone."""
    params, statistics = variables["params"], variables["batch_stats"]

    def norm(x, params, statistics):
        x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
        return x * params["scale"] + params["bias"]

    large = model.stem == "imagenet"
    x = reference_conv(x.astype(np.float64), params["stem_conv"]["kernel"], 2 if large else 1)
    x = np.maximum(norm(x, params["stem_norm"], statistics["stem_norm"]), 0)
    x = reference_max_pool(x) if large else x
    # Version 1.5: in a bottleneck it is the second convolution that strides.
    count, strided = (3, 2) if model.block == "bottleneck" else (2, 1)
    for stage, size in enumerate(model.stage_sizes, start=1):
        for number in range(size):
            name = f"stage{stage}_{number}"
            block, stats = params[name], statistics[name]
            stride = 2 if stage > 1 and number == 0 else 1
            y = x
            for layer in range(1, count + 1):
                y = reference_conv(
                    y, block[f"conv{layer}"]["kernel"], stride if layer == strided else 1
                )
                y = norm(y, block[f"norm{layer}"], stats[f"norm{layer}"])
                y = np.maximum(y, 0) if layer < count else y
            if "shortcut_conv" in block:
                x = reference_conv(x, block["shortcut_conv"]["kernel"], stride)
                x = norm(x, block["shortcut_norm"], stats["shortcut_norm"])
            x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_equals_a_slow_reference(stem, block):
    model = ResNet(**TINY, stem=stem, block=block)
    x = images(2, 11, 14, 3)
    variables = initialize(model, x)
    expected = reference_resnet(variables, x, model)
    actual = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_block_begins_as_the_identity():
    model = ResNet(num_classes=5, width=4, stage_sizes=(3,), stem="cifar")
    x = images(2, 8, 8, 3)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    for name in ("stage1_0", "stage1_1", "stage1_2"):
        assert not params[name]["norm2"]["scale"].any()
        assert params[name]["norm1"]["scale"].all()


def loss_and_gradient(model: ResNet, variables: dict, x: np.ndarray):
    def loss(params):
        logits, state = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(logits)), state

    (value, state), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return value, state["batch_stats"], gradient


def test_remat_changes_nothing_but_memory():
    x = images(3, 9, 9, 3)
    variables = initialize(ResNet(**TINY, stem="cifar"), x)
    plain = loss_and_gradient(ResNet(**TINY, stem="cifar"), variables, x)
    remat = loss_and_gradient(ResNet(**TINY, stem="cifar", remat=True), variables, x)
    assert jax.tree.structure(plain) == jax.tree.structure(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)


def test_bfloat16_computes_but_does_not_store():
    x = images(4, 9, 9, 3)
    whole, half = ResNet(**TINY, stem="cifar"), ResNet(**TINY, stem="cifar", dtype="bfloat16")
    variables = initialize(whole, x)
    shapes = jax.eval_shape(half.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    maps = jax.jit(lambda v, x: half.apply(v, x, method="features"))(variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(maps)} == {jnp.dtype("bfloat16")}

    _, statistics, gradient = loss_and_gradient(half, variables, x)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((statistics, gradient))}
    assert dtypes == {jnp.dtype("float32")}
    logits = np.asarray(jax.jit(half.apply)(variables, x))
    assert logits.dtype == jnp.float32
    expected = np.asarray(jax.jit(whole.apply)(variables, x))
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_statistics_are_those_of_the_valid_rows(stem):
    model = ResNet(**TINY, stem=stem)
    x = images(6, 17, 17, 3)
    valid = np.array([True, False, True, True, False, True])
    variables = initialize(model, x)

    @jax.jit
    def apply(x, valid=None):
        return model.apply(variables, x, train=True, valid=valid, mutable=["batch_stats"])

    logits, state = jax.device_get(apply(x, valid))
    expected, expected_state = apply(x[valid])
    np.testing.assert_allclose(logits[valid], expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, expected_state
    )


def test_evaluation_reads_the_running_average():
    model = ResNet(**TINY, stem="cifar")
    x = images(4, 8, 8, 3)
    variables = initialize(model, x)
    apply = jax.jit(model.apply)
    together, alone = (np.asarray(apply(variables, x)) for x in (x, x[:1]))
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depth=20), "depth is 20; it can be 18, 34, 50, 101 or 152"),
        (dict(stem="large"), "stem is 'large'; it can be 'imagenet' or 'cifar'"),
        (dict(block="wide"), "block is 'wide'"),
        (dict(stage_sizes=()), "stage_sizes is ()"),
        (dict(stage_sizes=(1, 0)), "stage_sizes[1] is 0"),
        (dict(depth=50, width=4, base_width=8), "width is 4 and base_width 8; their product"),
        (dict(variant="d", width=1), "width is 1; it must be at least 2"),
    ],
)
def test_impossible_fields_say_what_is_possible(fields, message):
    with pytest.raises(InputError) as error:
        ResNet(**fields)
    assert message in str(error.value)
