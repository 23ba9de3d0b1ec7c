"""What all backbones promise: published sizes, strides, remat, bfloat16, dropout, valid rows."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
from cvjax.errors import InputError
from cvjax.nn.bicubic import resize_bicubic
from cvjax.nn.convnext import ConvNeXt
from cvjax.nn.efficientnet import EfficientNet
from cvjax.nn.mobilenet_v3 import SMALL, MobileNetV3
from cvjax.nn.resnet import ResNet
from cvjax.nn.stochastic_depth import drop_rates
from cvjax.nn.swin import Swin
from cvjax.nn.text_encoder import TextEncoder
from cvjax.nn.vit import ViT

# As torchvision's and timm's documentation give them, for 1000 classes at 224 pixels.
PUBLISHED = [
    (ResNet(18, variant="d"), 11_708_744),
    (ResNet(50, variant="d"), 25_576_264),
    (ResNet(50, groups=32, base_width=4), 25_028_904),
    (ResNet(101, groups=32, base_width=8), 88_791_336),
    (ResNet(101, groups=64, base_width=4), 83_455_272),
    (ResNet(50, base_width=128), 68_883_240),
    (ResNet(101, base_width=128), 126_886_696),
    (ConvNeXt("tiny"), 28_589_128),
    (ConvNeXt("small"), 50_223_688),
    (ConvNeXt("base"), 88_591_464),
    (ConvNeXt("large"), 197_767_336),
    (ConvNeXt("xlarge"), 350_196_968),
    (EfficientNet("b0"), 5_288_548),
    (EfficientNet("b1"), 7_794_184),
    (EfficientNet("b2"), 9_109_994),
    (EfficientNet("b3"), 12_233_232),
    (EfficientNet("b4"), 19_341_616),
    (EfficientNet("b5"), 30_389_784),
    (EfficientNet("b6"), 43_040_704),
    (EfficientNet("b7"), 66_347_960),
    (EfficientNet("lite0"), 4_652_008),
    (EfficientNet("lite1"), 5_416_680),
    (EfficientNet("lite2"), 6_092_072),
    (EfficientNet("lite3"), 8_197_096),
    (EfficientNet("lite4"), 13_006_568),
    (MobileNetV3("large"), 5_483_032),
    (MobileNetV3("small"), 2_542_856),
    (MobileNetV3("large", width=0.75), 3_993_528),
    (MobileNetV3("small", width=0.75), 2_041_872),
    (MobileNetV3("small", width=0.5, stem=16), 1_593_224),
    (ViT("ti"), 5_717_416),
    (ViT("s"), 22_050_664),
    (ViT("b"), 86_567_656),
    (ViT("l"), 304_326_632),
    (ViT("b", patch=32), 88_224_232),
    (Swin("tiny"), 28_288_354),
    (Swin("small"), 49_606_258),
    (Swin("base"), 87_768_224),
    (Swin("large"), 196_532_476),
]
ROWS = (SMALL[0], SMALL[3], SMALL[4])
TINY = {
    "resnet-d": (ResNet, dict(block="bottleneck", width=8, stage_sizes=(1, 2), variant="d")),
    "resnext": (ResNet, dict(block="bottleneck", width=8, stage_sizes=(1, 1), groups=2)),
    "convnext": (ConvNeXt, dict(blocks=(1, 1), channels=(4, 6), layer_scale=0.5)),
    "efficientnet": (EfficientNet, dict(width=0.5, stages=((1, 3, 1, 16, 1), (6, 5, 2, 16, 2)))),
    "lite": (EfficientNet, dict(size="lite4", stages=((1, 3, 1, 16, 1), (6, 5, 2, 16, 2)))),
    "mobilenet": (MobileNetV3, dict(width=0.25, blocks=ROWS)),
    "vit": (ViT, dict(patch=8, image_size=32, width=12, depth=3, heads=2, registers=2)),
    "swin": (Swin, dict(window=3, width=8, blocks=(1, 1), heads=(2, 4))),
}
FAMILIES = pytest.mark.parametrize("family", TINY)
# What the others are made of; a gradient takes long to compile.
BUILDING_BLOCKS = pytest.mark.parametrize("family", ["convnext", "mobilenet", "vit", "swin"])


def tiny(family, **fields):
    make, given = TINY[family]
    return make(num_classes=5, **given, **fields)


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def far_from_the_start(model, x, seed=0):
    """Variables of which none is zero or one, so that none can be forgotten."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        match path[-1].key:
            case "kernel":
                return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
            case "scale" | "var":
                return np.exp(0.3 * noise)
            case _:
                return 0.3 * noise

    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(seed), x), x)
    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


@pytest.mark.parametrize(
    ("model", "count"), PUBLISHED, ids=lambda value: str(value)[:40].split(" at 0x")[0]
)
def test_parameter_counts_are_the_published_ones(model, count, monkeypatch):
    # The faster forms have the same parameters and take half of the time of tracing.
    for name in ("depthwise_conv", "fast_conv"):
        monkeypatch.setattr(f"cvjax.nn.convolution.{name}", jax.lax.conv_general_dilated)
    x = np.zeros((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@FAMILIES
def test_strides_are_true(family):
    model = tiny(family)
    x = np.zeros((2, 64, 32, 3), np.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    apply = functools.partial(model.apply, method="features")
    for size in ((64, 32), (33, 47), (7, 19), (1, 1)):
        maps = jax.eval_shape(apply, variables, np.zeros((2, *size, 3), np.float32))
        assert list(maps) == list(model.strides) == [f"stage{i + 1}" for i in range(len(maps))]
        for name, stride in model.strides.items():
            expected = tuple(-(-length // stride) for length in size)
            assert maps[name].shape[:3] == (2, *expected), (name, size)


@BUILDING_BLOCKS
def test_all_variables_matter_and_remat_and_bfloat16_change_nothing(family):
    x = images(3, 24, 16, 3)
    train = family != "mobilenet"  # normalized by three pixels, it forgets all others
    plain, remat, half = tiny(family), tiny(family, remat=True), tiny(family, dtype="bfloat16")
    variables = far_from_the_start(plain, x)
    shapes = jax.eval_shape(lambda x: half.init(jax.random.key(0), x), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert jax.tree.structure(dict(shapes)) == jax.tree.structure(variables)
    maps = jax.eval_shape(lambda x: half.apply(variables, x, method="features"), x)
    assert {leaf.dtype for leaf in maps.values()} == {jnp.dtype("bfloat16")}

    def value(params, model):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=train, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )  # fmt: skip
        return jnp.sum(jnp.sin(logits)), logits

    @jax.jit
    def everything(params):
        of = jax.value_and_grad(value, has_aux=True)
        return of(params, plain), of(params, remat), value(params, half)[1]

    ((loss, logits), gradients), recomputed, rough = everything(variables["params"])
    given = ((loss, logits), gradients)
    for a, b in zip(*map(jax.tree.leaves, (given, recomputed)), strict=True):
        scale = max(np.abs(a).max(), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-3)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, path
    assert rough.dtype == logits.dtype == jnp.float32
    # 8 bits of mantissa and some ten roundings one after the other.
    assert np.abs(rough - logits).max() < 0.2 * np.abs(logits).max()


@FAMILIES
def test_a_gradient_goes_through_remat(family):
    model = tiny(family, remat=True, stochastic_depth=0.1)

    def loss(variables, x):
        key = jax.random.key(0)
        return model.apply(variables, x, train=True, mutable=True, rngs={"dropout": key})[0].sum()

    x = np.zeros((2, 16, 16, 3), np.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    gradient = jax.eval_shape(jax.grad(loss), variables, x)
    assert jax.tree.structure(gradient) == jax.tree.structure(variables)
    assert "remat" in str(jax.make_jaxpr(lambda x: model.init(jax.random.key(0), x))(x))


@pytest.mark.parametrize("family", ["resnet-d", "mobilenet"])
def test_statistics_are_those_of_the_valid_rows(family):
    model, x = tiny(family), images(6, 24, 16, 3)
    valid = np.array([True, False, True, True, False, True])
    variables = far_from_the_start(model, x)

    @jax.jit
    def apply(x, valid=None):
        return model.apply(variables, x, train=True, valid=valid, mutable=["batch_stats"])

    logits, state = apply(x, valid)
    expected, expected_state = apply(x[valid])
    np.testing.assert_allclose(logits[valid], expected, rtol=1e-3, atol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state, expected_state
    )


@BUILDING_BLOCKS
def test_stochastic_depth_and_dropout_are_in_training_only(family):
    plain = tiny(family)
    deep, dropping = tiny(family, stochastic_depth=0.9), tiny(family, dropout=0.5)
    x = np.repeat(images(1, 16, 16, 3), 32, axis=0)  # 32 times the same image
    variables = far_from_the_start(plain, x[:1])

    @jax.jit
    def apply(x):
        def trained(model):
            keys = {"dropout": jax.random.key(1)}
            return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=keys)[0]

        return trained(deep), trained(dropping)

    with_depth, with_dropout = (np.asarray(given) for given in apply(x))
    assert np.ptp(with_depth, axis=0).max() > 1e-2
    assert np.ptp(with_dropout, axis=0).max() > 1e-2
    # Without an rng, a draw in evaluation would be an error.
    jax.eval_shape(lambda x: tiny(family, stochastic_depth=0.9, dropout=0.5).apply(variables, x), x)


def test_a_dropped_branch_is_dropped_for_a_whole_example_and_keeps_the_mean():
    from flax import linen as nn

    from cvjax.nn.stochastic_depth import drop_branch

    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return drop_branch(x, 0.25, train)

    x = images(4000, 3, 2)
    y = Branch().apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    ratio = np.asarray(y) / x
    kept = ratio.reshape(4000, -1).max(1) > 0
    np.testing.assert_allclose(ratio, np.where(kept, 4 / 3, 0)[:, None, None] * np.ones((3, 2)),
                               rtol=1e-6)  # fmt: skip
    # Four standard deviations of a binomial.
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    np.testing.assert_array_equal(Branch().apply({}, x, False), x)
    np.testing.assert_allclose(drop_rates(0.3, 4), [0.0, 0.1, 0.2, 0.3])
    assert drop_rates(0.3, 1) == [0.0]
    with pytest.raises(InputError, match="stochastic_depth is 1"):
        drop_rates(1.0, 3)


def test_swin_windows_see_only_themselves():
    """The gradient of one pixel's output is zero outside the windows that it has been in."""
    model = Swin(num_classes=5, window=4, width=8, blocks=(1,), heads=(2,), patch=1)
    x = images(1, 8, 12, 3)
    variables = far_from_the_start(model, x)

    def pixel(x, model=model, variables=variables):
        return model.apply(variables, x, method="features")["stage1"][0, 5, 6].sum()

    seen = np.abs(jax.jit(jax.grad(pixel))(x))[0].max(-1) > 0
    expected = np.zeros((8, 12), bool)
    expected[4:8, 4:8] = True
    np.testing.assert_array_equal(seen, expected)

    model = Swin(num_classes=5, window=4, width=8, blocks=(2,), heads=(2,), patch=1)
    variables = far_from_the_start(model, x)
    seen = np.abs(jax.jit(jax.grad(lambda x: pixel(x, model, variables)))(x))[0].max(-1) > 0
    # Moved by two, the window of (5, 6) is rows 2 to 5 and columns 6 to 9: of four old windows.
    expected = np.zeros((8, 12), bool)
    expected[0:8, 4:12] = True
    np.testing.assert_array_equal(seen, expected)


def test_vit_tokens():
    """Mean pooling reads the patches alone; registers and the class token are no pixels."""
    x = images(2, 16, 24, 3)
    fields = dict(num_classes=5, patch=8, image_size=(16, 24), width=8, depth=2, heads=2)
    mean = ViT(pooling="mean", registers=3, **fields)
    variables = far_from_the_start(mean, x)
    assert {"class_token", "class_position"}.isdisjoint(variables["params"])
    assert variables["params"]["position"].shape == (2, 3, 8)
    maps = mean.apply(variables, x, method="features")
    assert list(maps) == ["stage1", "stage2"] and maps["stage2"].shape == (2, 2, 3, 8)
    last = np.asarray(maps["stage2"], np.float64)
    last = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    params = variables["params"]
    last = last * params["norm"]["scale"] + params["norm"]["bias"]
    expected = last.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(mean.apply(variables, x), expected, atol=1e-4)

    # With the norm behind the mean the class token stays, and weights of one are not the other's.
    behind = mean.clone(pooling="mean_norm")
    params = {**params, "mean_norm": params["norm"]}
    params["class_token"] = params["class_position"] = np.ones(8, np.float32)
    del params["norm"]
    shapes = jax.eval_shape(lambda: behind.init(jax.random.key(0), x))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, dict(shapes))
    variables = {"params": params}
    last = np.asarray(behind.apply(variables, x, method="features")["stage2"], np.float64)
    patches = behind.apply(variables, x, method="encode")
    np.testing.assert_allclose(patches, last.reshape(2, 6, 8), atol=1e-6)
    pooled = last.mean((1, 2))
    pooled = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(
        pooled.var(-1, keepdims=True) + 1e-6
    )
    pooled = pooled * params["mean_norm"]["scale"] + params["mean_norm"]["bias"]
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(behind.apply(variables, x), expected, atol=1e-4)


def brute_force_bicubic(grid, height, width):
    """Pixel by pixel, from the kernel's formula, with the border repeated."""

    def kernel(d, a=-0.75):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    old_height, old_width, _ = grid.shape
    result = np.zeros((height, width, grid.shape[2]))
    for i in range(height):
        for j in range(width):
            y = (i + 0.5) * old_height / height - 0.5
            x = (j + 0.5) * old_width / width - 0.5
            for row in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for column in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    weight = kernel(y - row) * kernel(x - column)
                    r, c = np.clip(row, 0, old_height - 1), np.clip(column, 0, old_width - 1)
                    result[i, j] += weight * grid[r, c]
    return result


@pytest.mark.parametrize("size", [(5, 3), (4, 4), (9, 2), (1, 1), (13, 7)])
def test_bicubic(size):
    grid = images(4, 4, 3)
    np.testing.assert_allclose(
        resize_bicubic(grid, *size), brute_force_bicubic(grid, *size), atol=1e-5
    )
    ones = np.ones((4, 6, 1), np.float32)
    np.testing.assert_allclose(resize_bicubic(ones, *size), 1.0, atol=1e-6)
    one = images(1, 1, 2)
    np.testing.assert_allclose(
        resize_bicubic(one, *size), np.broadcast_to(one, (*size, 2)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(50, variant="e"), "variant is 'e'"),
        (lambda: ResNet(18, groups=2), "only bottlenecks have them"),
        (lambda: ConvNeXt("huge"), "size is 'huge'; it can be 'tiny'"),
        (lambda: ConvNeXt(blocks=(1, 2)), "channels None"),
        (lambda: ConvNeXt(blocks=(1, 2), channels=(4,)), "the same length"),
        (lambda: EfficientNet("b8"), "size is 'b8'"),
        (lambda: EfficientNet(padding="valid"), "padding is 'valid'"),
        (lambda: EfficientNet(width=0), "width is 0"),
        (lambda: EfficientNet(stages=((1, 3, 1, 16),)), "five positive numbers"),
        (lambda: MobileNetV3("medium"), "size is 'medium'"),
        (lambda: MobileNetV3(blocks=()), "blocks is empty"),
        (lambda: MobileNetV3(stem=0), "stem is 0"),
        (lambda: ViT("h"), "size is 'h'"),
        (lambda: ViT(pooling="max"), "pooling is 'max'"),
        (lambda: ViT(image_size=225), "image_size is 225; it must be a multiple of patch=16"),
        (lambda: ViT(depth=0), "depth is 0"),
        (lambda: ViT(registers=-1), "registers is -1"),
        (lambda: Swin("huge"), "size is 'huge'"),
        (lambda: Swin(blocks=(1,)), "the same length"),
        (lambda: Swin(window=0), "window is 0"),
        (lambda: Swin(heads=(3, 0, 12, 24)), "heads[1] is 0; it must be at least 1"),
        (lambda: ConvNeXt(num_classes=-1), "num_classes is -1; it must be at least 1"),
        (
            lambda: ConvNeXt(blocks=(), channels=()),
            "blocks is (); it must have at least one",
        ),
        (lambda: ConvNeXt(dropout=1.5), "dropout is 1.5; it must be in [0, 1]"),
        (lambda: ViT(image_size=(16,)), "image_size is (16,); it must be a multiple of patch=16"),
        (lambda: ViT(stochastic_depth=float("nan")), "stochastic_depth is nan"),
        (lambda: EfficientNet(num_classes=0), "num_classes is 0"),
        (lambda: MobileNetV3(num_classes=0), "num_classes is 0"),
        (lambda: TextEncoder(vocabulary=0, length=4), "vocabulary is 0"),
    ],
)
def test_impossible_fields_say_what_is_possible(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value)


def test_heads_must_divide_the_channels():
    with pytest.raises(InputError, match="8 channels do not divide into 3 heads"):
        Swin(width=8, blocks=(1,), heads=(3,)).init(jax.random.key(0), images(1, 8, 8, 3))


OWN = """
import flax.linen as nn

class Tiny(nn.Module):
    num_classes: int = 10
    width: int = 8
    strides = {"stage1": 2}

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(self.width, (3, 3), 2)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
"""


def test_a_backbone_of_ones_own(tmp_path, monkeypatch, capfd):
    (tmp_path / "my_lab_backbones.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    workdir = f"--workdir={tmp_path / 'run'}"
    recipe = "configs/classification.py:tiny"
    own = "--config.task.model.type=my_lab_backbones.Tiny"
    flags = ["--config.task.model.width=5", "--config.steps=2", "--config.evaluate_every=2"]
    assert main.main([f"--config={recipe}", own, workdir, *flags]) == 0
    assert main.main(["--mode=evaluate", workdir]) == 0
    assert "accuracy" in capfd.readouterr().out
    # Gone, it is named.
    (tmp_path / "my_lab_backbones.py").unlink()
    monkeypatch.delitem(sys.modules, "my_lab_backbones")
    assert main.main(["--mode=evaluate", workdir]) == 2
    assert "my_lab_backbones" in capfd.readouterr().err
