"""The numbers of torchvision and Hugging Face with the same weights, up to what is detected."""

import importlib.util
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from cvjax.detection import published
from cvjax.detection.published import MEAN, STD
from cvjax.detection.task import Detection
from cvjax.nn import pretrained
from cvjax.nn.pretrained import load_pretrained
from cvjax.nn.resnet import ResNet
from tests.detection import parity
from tests.detection.parity import thin, weights

RECORDED = parity.read()
PUBLISHED = json.loads(parity.PUBLISHED.read_text())
OURS = parity.ours()


def near(actual, expected, name, most=1e-5):
    """Both compute in float32, in another order: 1e-5 of the largest is what that may cost."""
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < most, (name, error)


def older(name):
    """The name in files of before torchvision's version 0.13, such as the published ones."""
    tower = re.compile(r"(head\.(?:classification|regression)_head\.conv)\.(\d)\.0\.")
    name = tower.sub(lambda match: f"{match[1]}.{2 * int(match[2])}.", name)
    name = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0", r"\1.\2", name)
    name = name.replace("rpn.head.conv.0.0", "rpn.head.conv")
    layer = re.compile(r"mask_head\.(\d)\.0")
    return layer.sub(lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}", name)


def empty(task, batch):
    """Parameters and state that are all not a number."""
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    return jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)


def loaded(fresh, arrays, file):
    """The parameters and the state with what the file has, and the table of what was loaded."""
    safetensors.numpy.save_file(arrays, file)
    return load_pretrained(*fresh, path=file)


@pytest.mark.parametrize("peer", ["retinanet", "fcos", "rcnn"])
def test_every_map_and_all_that_is_detected_is_theirs(peer, tmp_path):
    shapes, theirs = RECORDED[peer]
    task = Detection(OURS[peer], mean=MEAN, std=STD)
    batch = {"image": parity.images(), "valid": np.ones(2, bool)}
    arrays = weights(shapes)
    fresh = empty(task, batch)
    params, state, table = loaded(fresh, arrays, tmp_path / "weights.safetensors")
    assert {row.status for row in table.rows} <= {"loaded", "no weight"}, str(table)
    arrays = {older(name) if peer != "fcos" else name: array for name, array in arrays.items()}
    assert (arrays.keys() == shapes.keys()) == (peer == "fcos")
    again, _, table = loaded(fresh, arrays, tmp_path / "older.safetensors")
    assert {row.status for row in table.rows} <= {"loaded", "no weight"}, str(table)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    @jax.jit
    def ours(params, state):
        first = "rpn" if peer == "rcnn" else "head"
        outputs, kept = task.model.apply(
            {"params": params["model"], **state},
            task._input(batch),
            capture_intermediates=lambda module, _: module.name in ("encoder", first),
        )
        kept = kept["intermediates"]
        (levels,), (dense,) = kept["encoder"]["__call__"], kept[first]["__call__"]
        return levels, dense, outputs, task.model.detections(outputs, parity.SIZE)

    levels, dense, outputs, found = jax.device_get(ours(params, state))
    for i, level in enumerate(levels):
        near(thin(np.asarray(level)), theirs[f"level{i}"], i)
    names = {"logits": "cls_logits", "deltas": "bbox_regression", "centerness": "bbox_ctrness"}
    names |= {"distances": "bbox_regression"}
    if peer == "rcnn":
        dense["logits"] = dense["logits"][..., None]
        names = {"logits": "objectness", "deltas": "rpn_deltas"}
    for name, value in dense.items():
        value = np.maximum(value, 0) if name == "distances" else np.asarray(value)
        near(thin(value), theirs[names[name]], name)

    rows = np.asarray(found["detected"])
    for i in range(2):
        near(np.asarray(found["boxes"][i][rows[i]]), theirs[f"boxes{i}"], i)
        near(np.asarray(found["scores"][i][rows[i]]), theirs[f"scores{i}"], i)
        background = 1 if peer == "rcnn" else 0
        labels = np.asarray(found["labels"][i][rows[i]]) + background
        np.testing.assert_array_equal(labels, theirs[f"labels{i}"])
    if peer == "rcnn":
        for name, key in (("mask", "mask"), ("keypoints", "keypoint")):
            value = np.asarray(outputs["heads"][name])[rows]
            # A box that is rounded in another way is read a little beside.
            near(thin(value), theirs[f"{key}_logits"], name, most=5e-5)
        for i in range(2):
            points = np.asarray(found["keypoints"][i][rows[i]])[..., :2]
            near(points, theirs[f"keypoints{i}"][..., :2], "keypoints")


def test_detr_says_in_each_layer_and_loses_what_theirs_does(tmp_path):
    shapes, theirs = RECORDED["detr"]
    task = Detection(OURS["detr"], mean=MEAN, std=STD)
    batch = {"image": parity.images(), "valid": np.ones(2, bool)}
    arrays = weights(shapes)
    fresh = empty(task, batch)
    params, state, table = loaded(fresh, arrays, tmp_path / "weights.safetensors")
    assert {row.status for row in table.rows} == {"loaded"}, str(table)
    size = parity.SIZE

    @jax.jit
    def ours(params, state):
        variables, x = {"params": params["model"], **state}, task._input(batch)
        outputs, kept = task.model.apply(variables, x, capture_intermediates=True)
        memory = kept["intermediates"]["encoder_1"]["__call__"][0]
        last = {name: value[:, -1:] for name, value in outputs.items()}
        return outputs, memory, task.model.losses(last, parity.truth(), size)

    outputs, memory, losses = ours(params, state)
    near(thin(np.asarray(memory)), theirs["memory"], "memory")
    near(np.asarray(outputs["logits"]), theirs["logits"], "logits")
    near(np.asarray(outputs["boxes"]), theirs["cxcywh"], "boxes")
    for name, key in (("classification", "ce"), ("box", "bbox"), ("giou", "giou")):
        np.testing.assert_allclose(losses[name], theirs[f"loss_{key}"], rtol=1e-5)
    assert np.abs(theirs["logits"][:, 0] - theirs["logits"][:, 1]).max() > 0.1


def test_another_number_of_classes_has_fresh_last_layers(tmp_path):
    model = published.faster_rcnn(2, backbone=ResNet(18, stage_sizes=(1, 1, 1, 1)), features=64)
    task = Detection(model.clone(box_head=model.box_head.clone(features=64)))
    batch = {"image": parity.images(), "valid": np.ones(2, bool)}
    arrays = weights(RECORDED["rcnn"][0])
    params, _, table = loaded(empty(task, batch), arrays, tmp_path / "w.safetensors")
    fresh = {row.path: row.status for row in table.rows if row.status.startswith("fresh")}
    assert fresh == {
        "params/box_head/bbox_pred/bias": "fresh: [24] in the file",
        "params/box_head/bbox_pred/kernel": "fresh: [24, 64] in the file",
        "params/box_head/cls_score/bias": "fresh: [6] in the file",
        "params/box_head/cls_score/kernel": "fresh: [6, 64] in the file",
    }
    left = {row.path.split(".")[1] for row in table.rows if row.status == "left"}
    assert left == {"mask_head", "mask_predictor", "keypoint_head", "keypoint_predictor"}
    assert not np.isnan(params["model"]["box_head"]["fc6"]["kernel"]).any()


def needs_their_packages():
    for package in ("torch", "torchvision", "timm", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is in the extra `parity`")


def test_the_record_is_what_they_give():
    needs_their_packages()
    from tests.detection import record_parity

    assert record_parity.published_shapes() == PUBLISHED
    peers = record_parity.peers()
    peers = {peer: record_parity.record(network) for peer, network in peers.items()}
    for peer, (shapes, given) in {**peers, "detr": record_parity.record_detr()}.items():
        recorded_shapes, recorded = RECORDED[peer]
        assert shapes == recorded_shapes, peer
        assert given.keys() == recorded.keys()
        for name, value in given.items():
            np.testing.assert_allclose(
                value, recorded[name], rtol=1e-4, atol=1e-4, err_msg=f"{peer} {name}"
            )


@pytest.mark.parametrize("peer", [peer for peer in PUBLISHED if peer != "all"])
def test_the_published_models_take_every_array_of_theirs(peer, monkeypatch):
    """No numbers are written, or made: zeros that take no memory have the shapes of theirs."""
    shapes = PUBLISHED["all"] | PUBLISHED[peer]
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    monkeypatch.setattr(pretrained, "read_weights", lambda path: arrays)
    monkeypatch.setattr(jax, "device_put", lambda array, _: array)
    batch = {"image": np.zeros((1, 128, 128, 3), np.float32), "valid": np.ones(1, bool)}
    task = Detection(getattr(published, peer)())
    fresh = jax.eval_shape(task.init, jax.random.key(0), batch)
    _, _, table = load_pretrained(*fresh, path="theirs")
    assert {row.status for row in table.rows} <= {"loaded", "no weight"}, str(table)
