"""A head of somebody else's: two functions and a field of the data, and the detector learns it."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cvjax.detection.sampling import Samples

FILE = Path(__file__).parents[2] / "experiments/door_corners/run.py"


@pytest.fixture(scope="module")
def doors():
    spec = importlib.util.spec_from_file_location("door_corners", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_records_are_exact_and_always_the_same(doors):
    for split in ("train", "test"):
        source = doors.Doors(split, 50)
        for index in (0, 7, 49):
            record, again = source[index], doors.Doors(split, 8)[index]
            for name, value in record.items():
                np.testing.assert_array_equal(value, again[name])
            valid = record["box_valid"]
            assert record["image"].shape == (64, 64, 3) and valid.any()
            corners, boxes = record["corners"][valid], record["boxes"][valid]
            np.testing.assert_array_equal(corners.min(1), boxes[:, :2])
            np.testing.assert_array_equal(corners.max(1), boxes[:, 2:])
            assert (corners >= 0).all() and (corners <= 64).all()
            # The upper left one is left of the upper right and above the lower left.
            assert (corners[:, 0, 0] < corners[:, 1, 0]).all()
            assert (corners[:, 0, 1] < corners[:, 3, 1]).all()


def test_the_two_functions_of_the_head(doors):
    rng, head = np.random.default_rng(0), doors.CornerHead()
    boxes = np.array([[4, 6, 24, 46], [30, 2, 60, 50], [0, 0, 9, 9]], np.float32)
    corners = rng.uniform(0, 64, (2, 4, 2)).astype(np.float32)
    index, foreground = np.array([1, 0, 0]), np.array([True, True, False])
    samples = Samples(np.arange(3), boxes, index, foreground, np.ones(3, bool))
    outputs = rng.normal(size=(3, 4, 2)).astype(np.float32)
    expected = 0
    for box, row, said in zip(boxes[:2], index[:2], outputs[:2], strict=True):
        for corner, told in zip(corners[row], said, strict=True):
            for axis in range(2):
                half = (box[axis + 2] - box[axis]) / 2
                away = abs(told[axis] - (corner[axis] - box[axis] - half) / half)
                expected += away**2 / 0.2 if away < 0.1 else away - 0.05
    total, count = head.losses(outputs, samples, {"corners": corners})["corners"]
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 2
    found = head.detections(outputs, {"boxes": boxes}, (64, 64))["corners"]
    # What was detected, as truth, costs nothing.
    samples = samples._replace(index=np.arange(3), foreground=np.ones(3, bool))
    total, count = head.losses(outputs, samples, {"corners": found})["corners"]
    assert total < 1e-8 and count == 3


def test_the_detector_trains_and_says_corners(doors):
    task = doors.task(width=4)
    source = doors.Doors("train", 2)
    batch = {name: np.stack([source[0][name], source[1][name]]) for name in source[0]}
    batch |= {"image": batch["image"] / np.float32(255), "valid": np.ones(2, bool)}
    key = jax.random.key(0)
    params, state = jax.jit(task.init)(key, batch)
    assert params["model"]["heads_corners"]["Dense_1"]["kernel"].shape == (64, 8)
    metrics = jax.eval_shape(task.evaluate, params, state, batch, key)
    assert {"corners", "box", "classification", "rpn_box", "rpn_objectness"} < set(metrics)

    @jax.jit
    @jax.value_and_grad
    def loss_of(params):
        return task.loss(params, SimpleNamespace(model_state=state), batch, key)[0]

    loss, gradient = loss_of(params)
    assert np.isfinite(loss) and loss > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    head = gradient["model"]["heads_corners"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(head))
    found = jax.eval_shape(task.predict, params, state, batch, key)
    assert found["corners"].shape == (2, 4, 4, 2) and found["boxes"].shape == (2, 4, 4)


def test_the_error_is_that_of_the_doors_that_were_found(doors):
    true = np.array([[[0, 0], [9, 0], [9, 20], [0, 20]], [[30, 0], [39, 0], [39, 20], [30, 20]]])
    batch = {"corners": true[None], "box_valid": np.ones((1, 2), bool), "valid": np.ones(1, bool)}
    said = np.stack([true[1] + [3, 4], true[0] + 100, true[1]])[None]
    evaluator = doors.CornerError()
    evaluator.add({"corners": said, "detected": np.array([[True, True, False]])}, batch)
    assert evaluator.result() == {"corner_error": 5.0, "found": 0.5}
