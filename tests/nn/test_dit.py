"""The diffusion transformer, the text encoder and cross-attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.attention import CrossAttention
from cvjax.nn.dit import Block, DiT, modulate, positions
from cvjax.nn.text_encoder import TextEncoder
from cvjax.nn.unet import UNet

SMALL = dict(num_classes=3, width=8, depth=2, heads=2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(height=4, width=6, channels=1, batch=2):
    x = normal(batch, height, width, channels)
    return x, np.linspace(0.2, 0.9, batch, dtype=np.float32), np.arange(batch)


def random_params(network, *args):
    """Parameters without the zeros of the beginning, which would hide what is behind them."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda x: (0.2 * draw(x.shape)).astype(x.dtype), shapes)


def count(network, *args):
    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size, millions", [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_parameters_as_published(size, millions):
    """Latents of 32 x 32 x 4, 1,000 classes, a variance for each channel: table 1.

    The published numbers have the position embeddings, 256 x channels, among the parameters; ours
    are constants.
    """
    network = DiT(size, num_classes=1000, patch=2, out_channels=8)
    channels = network._numbers[0]
    found = count(network, *inputs(32, 32, 4)) + 256 * channels
    assert abs(found / 1e6 - millions) < 0.6
    if size == "xl":
        assert found == 675_129_632  # as the authors' program prints it


def test_positions_by_their_formula():
    found = positions(3, 5, 8)
    assert found.shape == (3, 5, 8)
    for row, column in ((0, 0), (2, 4), (1, 3)):
        expected = []
        for place in (column, row):
            angles = [place / 10_000 ** (k / 2) for k in range(2)]
            expected += [*np.sin(angles), *np.cos(angles)]
        np.testing.assert_allclose(found[row, column], expected, atol=1e-6)


def test_it_begins_as_zero_and_then_depends_on_everything():
    x, t, label = inputs()
    network = DiT("s", patch=2, **SMALL)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, t, label)
    head = shapes["params"]["head"]["kernel"]
    assert head.shape == (8, 4)
    start, params = jax.jit(network.init)(jax.random.key(0), x, t, label), random_params(
        network, x, t, label
    )  # fmt: skip
    run = jax.jit(network.apply)
    apply = lambda *args: np.asarray(run(*args))  # noqa: E731
    np.testing.assert_array_equal(apply(start, x, t, label), np.zeros_like(x))
    one = apply(params, x, t, label)
    assert one.shape == x.shape and one.dtype == jnp.float32
    for other in ((x, t + 0.05, label), (x, t, label + 1)):
        assert np.all(np.abs(apply(params, *other) - one).max((1, 2, 3)) > 1e-4)
    # Every place looks at every other, and no image at another.
    moved = x.copy()
    moved[0, 0, 0, 0] += 0.5
    seen = np.abs(apply(params, moved, t, label) - one).max(-1)
    assert np.all(seen[0] > 0) and np.all(seen[1] == 0)


def test_the_block_by_hand():
    """adaLN-Zero: with a gate of zero nothing happens; the modulation is a scale and a shift."""
    x, condition = normal(2, 5, 8), normal(2, 8, seed=1)
    block = Block(2)
    params = random_params(block, x, condition)["params"]
    zeros = jax.tree.map(np.zeros_like, params["modulation"])
    apply = jax.jit(block.apply)
    still = apply({"params": {**params, "modulation": zeros}}, x, condition)
    np.testing.assert_array_equal(still, x)
    # Only the second gate is open: the perceptron of the normed tokens, shifted and scaled.
    bias = np.repeat(np.float32([0.3, 0.2, 0.0, 0.5, -0.1, 2.0]), 8)
    opened = {"kernel": zeros["kernel"], "bias": bias}
    found = apply({"params": {**params, "modulation": opened}}, x, condition)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = modulate(normed, 0.5, -0.1)
    np.testing.assert_allclose(y, 0.9 * normed + 0.5, rtol=1e-6)
    y = np.asarray(y) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    y = np.asarray(jax.nn.gelu(y)) @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(found, x + 2.0 * y, atol=1e-5)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_captions_flags_and_channels(kind):
    """Every word matters, the order too; bf16 and remat change nothing but the digits."""
    x, t, _ = inputs(4, 4)
    tokens = np.array([[1, 2, 0], [3, 1, 0]])

    def make(**flags):
        text = TextEncoder(vocabulary=4, length=3, width=8)
        if kind == "dit":
            return DiT("s", text=text, out_channels=2, **(SMALL | dict(depth=1)), **flags)
        fields = dict(width=8, multipliers=(1,), blocks=1, attention=(0,), num_classes=0)
        return UNet(text=text, out_channels=2, **fields, **flags)

    params = random_params(make(), x, t, tokens)
    apply = jax.jit(make().apply)
    one = np.asarray(apply(params, x, t, tokens))
    assert one.shape == (2, 4, 4, 2)
    for other in ([[2, 1, 0], [1, 3, 0]], [[1, 2, 4], [3, 1, 4]], [[0, 0, 0]] * 2):
        moved = np.abs(apply(params, x, t, np.array(other)) - one).max((1, 2, 3))
        assert np.all(moved > 1e-4) and np.all(np.isfinite(moved))
    remat = jax.jit(make(remat=True).apply)(params, x, t, tokens)
    np.testing.assert_allclose(remat, one, atol=1e-4)
    half = np.asarray(jax.jit(make(dtype=jnp.bfloat16).apply)(params, x, t, tokens))
    assert half.dtype == jnp.float32
    # bf16 has 8 bits: a few per cent of the output after some ten layers.
    assert 0 < np.abs(half - one).mean() < 0.1 * np.abs(one).mean()


def test_cross_attention_by_hand():
    x, words = normal(2, 5, 4), normal(2, 3, 6, seed=1)
    layer = CrossAttention(heads=2)
    params = random_params(layer, x, words)["params"]
    found = jax.jit(layer.apply)({"params": params}, x, words)
    dense = lambda name, y: y @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    query, (key, value) = dense("query", x), np.split(dense("key_value", words), 2, axis=-1)
    heads = []
    for head in (slice(0, 2), slice(2, 4)):
        logits = query[..., head] @ key[..., head].swapaxes(1, 2) / np.sqrt(2)
        heads.append(np.asarray(jax.nn.softmax(logits)) @ value[..., head])
    expected = dense("output", np.concatenate(heads, axis=-1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="4 channels do not divide into 3 heads"):
        jax.eval_shape(CrossAttention(3).init, jax.random.key(0), x, words)


def test_mistakes_are_one_line():
    with pytest.raises(InputError, match="size is 'm'"):
        DiT("m")
    with pytest.raises(InputError, match="depth is 0"):
        DiT(depth=0)
    with pytest.raises(InputError, match="num_classes is -1"):
        DiT(num_classes=-1)
    with pytest.raises(InputError, match="width is 6.*multiple of 4"):
        DiT(width=6)
    with pytest.raises(InputError, match="5 x 6, patch is 2"):
        jax.eval_shape(DiT(**SMALL).init, jax.random.key(0), *inputs(5, 6))
    tokens = np.zeros((2, 4), int)
    with pytest.raises(InputError, match=r"tokens are \[2, 4\]; they must be \[b, 3\]"):
        jax.eval_shape(TextEncoder(4, 3).init, jax.random.key(0), tokens)
