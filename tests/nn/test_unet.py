"""The U-Net: shapes at any size, gradients, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.attention import SelfAttention
from cvjax.nn.dit import DiT
from cvjax.nn.embeddings import sinusoidal
from cvjax.nn.text_encoder import TextEncoder
from cvjax.nn.unet import AttentionBlock, Block, UNet, _resized

SMALL = dict(num_classes=3, width=8, multipliers=(1, 2), blocks=1, attention=(1,), head_features=8)


def inputs(height=8, width=8, channels=1, batch=2):
    x = np.random.default_rng(0).normal(size=(batch, height, width, channels))
    return x.astype(np.float32), np.linspace(0.2, 0.9, batch, dtype=np.float32), np.arange(batch)


def random_params(network, *args):
    """Parameters without the zeros of the beginning, which would hide what is behind them."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)


@pytest.mark.parametrize("size", [(28, 28), (27, 27), (13, 30), (5, 9), (1, 1)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 2)])
def test_output_has_the_shape_of_the_input(size, multipliers):
    network = UNet(**(SMALL | dict(multipliers=multipliers, blocks=2, attention=(0,))))
    x, *rest = inputs(*size, channels=3)
    shape, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x, *rest)
    assert shape.shape == x.shape and shape.dtype == jnp.float32


def test_no_image_is_a_batch_too():
    text = TextEncoder(vocabulary=3, length=2, width=4)
    for network in (UNet(**SMALL), UNet(**SMALL, text=text), DiT(width=8, depth=1, heads=2),
                    DiT(width=8, depth=1, heads=2, text=text)):  # fmt: skip
        x, t, label = inputs(batch=0)
        label = np.zeros((0, 2), np.int32) if network.text else label
        shape, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x, t, label)
        assert shape.shape == (0, 8, 8, 1)


@pytest.mark.parametrize("size", [(28, 28), (14, 30), (6, 2)])
def test_patches_keep_the_shape(size):
    x, *rest = inputs(*size, channels=3)
    network = UNet(patch=2, **SMALL)
    shape, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x, *rest)
    assert shape.shape == x.shape


def test_size_that_is_no_multiple_of_the_patch_is_one_line():
    with pytest.raises(InputError, match="27 x 28, patch is 2; .* multiples of 2"):
        jax.eval_shape(UNet(patch=2, **SMALL).init, jax.random.key(0), *inputs(27, 28))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(blocks=0), dict(patch=0), dict(multipliers=()), dict(attention=(2,)),
        dict(num_classes=-1), dict(embedding=1), dict(out_channels=0),
    ],
)  # fmt: skip
def test_impossible_fields(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        UNet(**(SMALL | wrong))


def test_maps_are_resized_with_the_filter_1_3_3_1():
    x = inputs(8, 8, 2)[0]
    weights = np.array([1, 3, 3, 1]) / 8
    half = np.zeros((2, 2, 2, 2))  # without the border
    for i, j in np.ndindex(2, 2):
        part = x[:, 2 * i + 1 : 2 * i + 5, 2 * j + 1 : 2 * j + 5]
        half[:, i, j] = np.einsum("bhwc,h,w->bc", part, weights, weights)
    np.testing.assert_allclose(_resized(x, 4, 4)[:, 1:3, 1:3], half, atol=1e-6)
    apart = np.zeros((2, 16, 16, 2))
    apart[:, ::2, ::2] = x
    double = np.zeros((2, 12, 12, 2))
    for i, j in np.ndindex(12, 12):
        part = apart[:, i : i + 4, j : j + 4]
        double[:, i, j] = np.einsum("bhwc,h,w->bc", part, 2 * weights, 2 * weights)
    np.testing.assert_allclose(_resized(x, 16, 16)[:, 2:14, 2:14], double, atol=1e-6)


def test_ncsn_options():
    """They need no other parameters; rescaled sums; any size."""
    plain, other = (UNet(**SMALL, **fields) for fields in ({}, dict(rescale=True, anti_alias=True)))
    args = inputs(7, 10)
    params = random_params(plain, *args)
    assert jax.tree.map(jnp.shape, random_params(other, *args)) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def both(params):
        return [network.apply(params, *args) for network in (plain, other)]

    one, two = map(np.asarray, both(params))
    assert one.shape == two.shape and np.all(np.isfinite(two)) and not np.allclose(one, two)
    x, condition = np.ones((1, 4, 4, 8), np.float32), np.ones((1, 8), np.float32)
    for make, rest in ((Block, (condition,)), (AttentionBlock, ())):
        params = random_params(make(8), x, *rest)
        found = [
            np.asarray(jax.jit(make(8, rescale=rescale).apply)(params, x, *rest))
            for rescale in (False, True)
        ]
        np.testing.assert_allclose(found[1], found[0] / np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize("anti_alias", [False, True])
def test_the_ways_of_ncsn_beside_the_network(anti_alias):
    """What each adds, by hand, where the blocks add nothing; and any size."""
    fields = dict(multipliers=(1, 2), attention=(), anti_alias=anti_alias)
    plain = UNet(**(SMALL | fields))
    both = UNet(**(SMALL | fields), residual_input=True, skip_output=True, rescale=True)
    args = inputs(7, 10)
    params = random_params(both, *args)["params"]
    more = set(params) - set(random_params(plain, *args)["params"])
    assert more == {"down1_beside", "up1_head_norm", "up1_head"}
    assert params["down1_beside"]["kernel"].shape == (3, 3, 1, 16)

    @jax.jit
    def apply(params):
        return both.apply({"params": params}, *args, capture_intermediates=True)

    def seen(name, outputs=None):
        return np.asarray((outputs or state["intermediates"])[name]["__call__"][0])

    found, state = apply(params)
    beside = (seen("down1_beside") + seen("down1_halve")) / np.sqrt(2)
    # The coarsest map enters block and output alike where the blocks are the identity.
    still = {
        name: jax.tree.map(np.zeros_like, leaf) if name == "conv2" else leaf
        for name, leaf in params["down1_0"].items()
    }
    _, outputs = apply({**params, "down1_0": still})
    np.testing.assert_allclose(
        seen("down1_0", outputs["intermediates"]), beside / np.sqrt(2), rtol=1e-5, atol=1e-6
    )
    coarse = seen("up1_head")
    if anti_alias:
        coarse = np.asarray(_resized(coarse, 7, 10))
    else:
        coarse = coarse.repeat(2, 1).repeat(2, 2)[:, :7, :10]
    np.testing.assert_allclose(found, seen("head") + coarse, rtol=1e-5, atol=1e-6)


def test_begins_as_zero():
    network, args = UNet(**(SMALL | dict(multipliers=(1,), attention=()))), inputs()
    y, _ = jax.jit(network.init_with_output)(jax.random.key(0), *args)
    np.testing.assert_array_equal(y, 0.0)


def test_parameters_and_output_are_float32_under_bfloat16():
    args = inputs()
    params = jax.eval_shape(UNet(**SMALL, dtype=jnp.bfloat16).init, jax.random.key(0), *args)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    params = random_params(UNet(**SMALL), *args)
    exact = np.asarray(jax.jit(UNet(**SMALL).apply)(params, *args))
    half = np.asarray(jax.jit(UNet(**SMALL, dtype=jnp.bfloat16).apply)(params, *args))
    assert half.dtype == np.float32
    # bfloat16 keeps 8 bits; some 20 layers lose a few more.
    assert np.linalg.norm(half - exact) < 0.1 * np.linalg.norm(exact)
    assert np.any(half != exact)


@functools.cache
def gradient(remat=False):
    args, network = inputs(), UNet(**SMALL, remat=remat)  # labels 0 and 1, of 3 and the null class
    params = random_params(network, *args)
    found = jax.jit(jax.grad(lambda p: jnp.sum(network.apply(p, *args) ** 2)))(params)
    return jax.device_get(found)


def test_remat_changes_no_gradient():
    expected, found = gradient(), gradient(remat=True)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest),
        found,
        expected,
    )


def test_the_gradient_reaches_every_parameter_and_only_the_embeddings_of_labels_seen():
    found = gradient()["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.linalg.norm(leaf) > 1e-3, jax.tree_util.keystr(path)
    table = np.linalg.norm(found["class"]["table"]["embedding"], axis=-1)
    np.testing.assert_array_equal(table > 0, [True, True, False, False])


def test_rows_do_not_see_each_other():
    x, t, label = inputs()
    network = UNet(**SMALL)
    params = random_params(network, x, t, label)
    row = lambda x: jnp.sum(network.apply(params, x, t, label)[0])  # noqa: E731
    seen = np.asarray(jax.jit(jax.grad(row))(x)) != 0
    assert seen[0].all() and not seen[1].any()


def test_label_out_of_range_is_not_silent():
    network, args = UNet(**SMALL), inputs()
    params = random_params(network, *args)
    assert np.all(np.isnan(jax.jit(network.apply)(params, *args[:2], np.array([4, -1]))))
    text = TextEncoder(vocabulary=3, length=2, width=4)
    params = random_params(text, np.zeros((1, 2), np.int32))
    vectors, _ = jax.jit(text.apply)(params, np.array([[0, 3], [0, 4], [-1, 0]]))
    assert np.isfinite(vectors[0]).all() and np.isnan(vectors[1:]).all()


def test_times_are_told_apart():
    code = jax.jit(sinusoidal, static_argnums=1)(np.linspace(0, 1, 201, dtype=np.float32), 32)
    assert code.shape == (201, 32) and code.dtype == jnp.float32
    code = np.asarray(code)
    distances = np.linalg.norm(code[:, None] - code[None], axis=-1)
    assert np.min(distances + 10 * np.eye(201)) > 0.5


def test_attention_against_a_slow_reference():
    x = inputs(2, 5, 12, batch=1)[0][0]
    attention = SelfAttention(heads=3)
    params = random_params(attention, x)
    weights = {name: np.asarray(p["kernel"]) for name, p in params["params"].items()}
    biases = {name: np.asarray(p["bias"]) for name, p in params["params"].items()}
    causal = np.tril(np.ones((1, 1, 5, 5), bool))
    qkv = x @ weights["query_key_value"] + biases["query_key_value"]
    expected = np.zeros((2, 5, 12))
    for b in range(2):
        for head in range(3):
            q, k, v = (qkv[b, :, 12 * i + 4 * head : 12 * i + 4 * head + 4] for i in range(3))
            for i in range(5):
                scores = np.exp(k[: i + 1] @ q[i] / 2.0)  # the square root of 4 channels
                expected[b, i, head * 4 : head * 4 + 4] = scores @ v[: i + 1] / scores.sum()
    expected = expected @ weights["output"] + biases["output"]
    found = jax.jit(attention.apply)(params, x, mask=causal)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="12 channels do not divide into 5 heads"):
        jax.eval_shape(SelfAttention(heads=5).init, jax.random.key(0), x)
