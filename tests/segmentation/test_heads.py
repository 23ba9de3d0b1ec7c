"""Heads on backbones: sizes, rows that are padding, and closed forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.bilinear import resize_bilinear
from cvjax.nn.resnet import ResNet
from cvjax.segmentation import heads
from cvjax.segmentation.model import Segmenter
from tests.nn.test_bilinear import slow_resize

CLASSES = 3
HEADS = {
    "FCN": heads.FCN(CLASSES, maps=2),
    "FCN, one map": heads.FCN(CLASSES, maps=1, subpixel=4),
    "UNet": heads.UNet(CLASSES, features=(6, 5)),
    "UNet, subpixel": heads.UNet(CLASSES, features=(6, 5), subpixel=2),
    "DeepLabV3Plus": heads.DeepLabV3Plus(CLASSES, 6, rates=(1, 2), outline_features=4),
    "SegFormer": heads.SegFormer(CLASSES, 6),
}
SMALL = dict(width=4, stage_sizes=(1, 1, 1))


def test_each_place_scores_a_square_of_pixels():
    score = np.arange(2 * 3 * 4 * 2, dtype=np.float32).reshape(1, 2, 3, 8)
    found = np.asarray(heads.to_pixels(score, (4, 6), 2))
    for y, x, k in np.ndindex(4, 6, 2):
        assert found[0, y, x, k] == score[0, y // 2, x // 2, (2 * (y % 2) + x % 2) * 2 + k]
    # A map of an odd image was rounded up: what is too much is at the right and the bottom.
    np.testing.assert_array_equal(heads.to_pixels(score, (3, 5), 2), found[:, :3, :5])
    np.testing.assert_array_equal(heads.to_pixels(score, (9, 11), 2), resize_bilinear(found, 9, 11))


@pytest.mark.parametrize("strides", [(4, 8, 16), (1, 2, 4), (16, 16, 16)])
@pytest.mark.parametrize("name", HEADS)
def test_any_size_of_image_gives_logits_of_that_size(name, strides):
    head = HEADS[name]
    for size in ((17, 33), (1, 1), (5, 64)):
        maps = [
            jax.ShapeDtypeStruct((2, *(-(-side // s) for side in size), c), jnp.bfloat16)
            for c, s in enumerate(strides, start=4)
        ]
        init = functools.partial(head.init_with_output, size=size)
        if name == "UNet, subpixel" and strides[0] == 1 and size != (1, 1):
            # More pixels than there are: they would be those of the upper left part alone.
            with pytest.raises(InputError, match="subpixel is 2, of a map that is"):
                jax.eval_shape(init, jax.random.key(0), maps)
            continue
        logits, _ = jax.eval_shape(init, jax.random.key(0), maps)
        assert logits.shape == (2, *size, CLASSES) and logits.dtype == jnp.float32


@pytest.mark.parametrize("name", HEADS)
def test_rows_that_are_not_valid_change_nothing_and_all_parameters_learn(name):
    head = HEADS[name]
    rng = np.random.default_rng(0)
    shapes = (4, 5, 6, 4), (4, 3, 3, 5), (4, 2, 2, 6)
    maps = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    valid = np.array([True, False, True, True])
    apply = functools.partial(head.apply, size=(9, 11), train=True, mutable=["batch_stats"])

    @jax.jit
    def step(maps, valid):
        variables = head.init(jax.random.key(0), maps, (9, 11))

        def loss(params):
            rngs = {"dropout": jax.random.key(1)}
            logits, state = apply({**variables, "params": params}, maps, valid=valid, rngs=rngs)
            return jnp.sum(jnp.sin(logits) * valid[:, None, None, None]), state

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    one = step(maps, valid)
    two = step([np.where(valid[:, None, None, None], x, 7.0) for x in maps], valid)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    for path, gradient in jax.tree_util.tree_leaves_with_path(one[1]):
        assert np.isfinite(gradient).all() and gradient.any(), path


def test_fcn_is_a_sum_of_linear_scores():
    rng = np.random.default_rng(0)
    fine, coarse = (rng.normal(size=(2, *s)).astype(np.float32) for s in ((6, 5, 4), (3, 3, 8)))
    head = heads.FCN(CLASSES, maps=2)
    variables = jax.jit(head.init, static_argnums=2)(jax.random.key(0), [fine, coarse], (11, 9))
    layers = jax.tree.map(np.float64, variables["params"])
    apply = jax.jit(head.apply, static_argnums=2)

    def score(x, layer):
        return x @ layers[layer]["kernel"] + layers[layer]["bias"]

    up = np.stack([slow_resize(one, 6, 5) for one in score(coarse, "score0")])
    expected = np.stack([slow_resize(one, 11, 9) for one in up + score(fine, "score1")])
    found = apply(variables, [fine, coarse], (11, 9))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    again = apply(variables, [fine + 99, fine, coarse], (11, 9))
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_an_atrous_convolution_sees_every_rate_th_pixel(rate):
    layer = heads.ConvNormRelu(1, dilation=rate)
    x = np.ones((1, 9, 9, 1), np.float32)
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, False, None), x)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)

    def middle(x):
        return layer.apply(variables, x, False, None)[0, 4, 4, 0]

    seen = np.argwhere(np.asarray(jax.jit(jax.grad(middle))(x + 1))[0, ..., 0])
    steps = [4 - rate, 4, 4 + rate]
    np.testing.assert_array_equal(seen, [(y, x) for y in steps for x in steps])


def test_deeplab_sees_the_whole_image_and_the_outline():
    maps = [np.ones(shape, np.float32) for shape in ((1, 16, 16, 2), (1, 4, 4, 3))]
    head = HEADS["DeepLabV3Plus"]
    variables = jax.jit(head.init, static_argnums=2)(jax.random.key(1), maps, (32, 32))
    # Everything positive: no path is cut by a ReLU.
    variables = jax.tree.map(lambda x: np.abs(x) + np.float32(0.1), variables)
    corner = jax.jit(jax.grad(lambda maps: head.apply(variables, maps, (32, 32))[0, 0, 0, 0]))
    gradients = jax.device_get(corner(maps))
    assert gradients[1].all(), "the pooled branch reaches the far corner"
    assert gradients[0][0, 0, 0].all() and not gradients[0][0, 8:, 8:].any()


def test_parameters_are_as_many_as_the_papers_layers_have():
    k, key = 21, jax.random.key(0)
    count = lambda variables: sum(x.size for x in jax.tree.leaves(variables["params"]))  # noqa: E731
    maps, backbone = jax.eval_shape(
        lambda x: ResNet(50).init_with_output(key, x, method="features"),
        jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),
    )
    # torchvision's ResNet-50, 25,557,032, less its last layer.
    assert count(backbone) == 25_557_032 - 2049 * 1000
    networks = {
        "fcn": heads.FCN(k), "unet": heads.UNet(k), "deeplab": heads.DeepLabV3Plus(k),
        "segformer": heads.SegFormer(k),
    }  # fmt: skip
    found = {
        name: count(
            jax.eval_shape(functools.partial(head.init, size=(64, 64)), key, [*maps.values()])
        )
        for name, head in networks.items()
    }
    stages, norm = (256, 512, 1024, 2048), 2
    last = 256 * k + k
    assert found["fcn"] == sum(c * k + k for c in stages[1:])
    levels = [(2048 + 1024, 256), (256 + 512, 128), (128 + 256, 64)]
    assert found["unet"] == 64 * k + k + sum(
        9 * before * c + 9 * c * c + 2 * norm * c for before, c in levels
    )
    aspp = 2048 * 256 * (1 + 3 * 9 + 1) + 5 * 256 * 256 + 6 * norm * 256
    decoder = 256 * 48 + norm * 48 + 9 * (256 + 48) * 256 + 9 * 256 * 256 + 2 * norm * 256
    assert found["deeplab"] == aspp + decoder + last
    assert (
        found["segformer"] == sum(c * 256 + 256 for c in stages) + 4 * 256 * 256 + norm * 256 + last
    )


class Plain(nn.Module):
    """A backbone of one's own: no `valid`, maps named and ordered in another way."""

    strides = {"whole": 8, "a": 2, "b": 4}

    @nn.compact
    def features(self, x, *, train=False):
        maps = {}
        for name in ("a", "b", "whole"):
            stride = self.strides[name]
            maps[name] = nn.Conv(4, (stride, stride), strides=stride, name=name)(x)
        return {name: maps[name] for name in ("b", "whole", "a")}


def test_a_backbone_of_ones_own_is_read_in_the_order_of_its_strides():
    seen = []

    class Look(nn.Module):
        @nn.compact
        def __call__(self, maps, size, *, train=False, valid=None):
            seen.extend(x.shape[1] for x in maps)
            return heads.FCN(2, name="fcn")(maps, size, train=train, valid=valid)

    model = Segmenter(Plain(), Look())
    x, valid = np.ones((2, 16, 16, 3), np.float32), np.ones(2, bool)
    logits, variables = jax.eval_shape(
        lambda x, valid: model.init_with_output(jax.random.key(0), x, valid=valid), x, valid
    )
    assert logits.shape == (2, 16, 16, 2) and seen == [8, 4, 2]
    assert set(variables["params"]) == {"backbone", "head"}


@pytest.mark.parametrize(
    "head, message",
    [
        (heads.FCN(0), "num_classes is 0"),
        (heads.FCN(2, maps=4), "maps is 4; the backbone has only 3"),
        (heads.UNet(2, features=(4,)), "there must be 2, one for each map but the coarsest"),
        (heads.UNet(2, features=(4, 4), subpixel=0), "subpixel is 0"),
        (heads.DeepLabV3Plus(2, outline=3), "outline is 3; the maps are 0..2"),
        (heads.DeepLabV3Plus(2, rates=(6, 0)), r"rates\[1\] is 0"),
        (heads.DeepLabV3Plus(2, outline_features=0), "outline_features is 0"),
        (heads.DeepLabV3Plus(2, dropout=1.5), "dropout is 1.5"),
        (heads.SegFormer(-1), "num_classes is -1"),
        (heads.SegFormer(2, dropout=-0.1), "dropout is -0.1"),
    ],
)
def test_heads_that_cannot_be(head, message):
    model = Segmenter(ResNet(stem="cifar", **SMALL), head)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
