"""What holds for every detector: edges, padding, one compilation, and the picture."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvjax import draw
from cvjax.detection.centernet import CenterNet, CenterNetHead
from cvjax.detection.fcos import FCOS, FCOSHead
from cvjax.detection.retinanet import RetinaNet, RetinaNetHead
from cvjax.detection.task import Detection
from cvjax.errors import InputError
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.resnet import ResNet
from cvjax.train.task import Task

CLASSES, SIZE = 3, (36, 50)  # neither side is a multiple of the largest stride


def pyramid(dtype):
    return Pyramid(ResNet(width=8, stage_sizes=(1, 1), dtype=dtype), FPN(8, dtype=dtype))


@functools.cache
def detector(kind, dtype="float32"):
    if kind == "retinanet":
        head = RetinaNetHead(CLASSES, 2, 8, 1, 2, dtype=dtype)
        return RetinaNet(pyramid(dtype), head, octaves=1, ratios=(1.0, 2.0), outputs=7)
    if kind == "centernet":
        return CenterNet(pyramid(dtype), CenterNetHead(CLASSES, 8, 1, 2, dtype=dtype), outputs=7)
    return FCOS(pyramid(dtype), FCOSHead(CLASSES, 8, 1, 2, dtype=dtype), outputs=7)


KINDS = pytest.mark.parametrize("kind", ["retinanet", "fcos", "centernet"])


def batch_of(b=4, n=5, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, (25, 18), (b, n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(4, 20, (b, n, 2))], axis=-1)
    return {
        "image": rng.uniform(size=(b, *SIZE, 3)).astype(np.float32),
        "boxes": boxes.astype(np.float32),
        "box_label": rng.integers(CLASSES, size=(b, n), dtype=np.int32),
        "box_valid": np.ones((b, n), bool),
        "valid": np.ones(b, bool),
    }


@functools.cache
def initialized(kind):
    init = jax.jit(Detection(detector(kind)).init)
    return jax.device_get(init(jax.random.key(0), batch_of()))


@functools.cache
def step_of(kind, dtype="float32"):
    """The jitted gradient, metrics and detections; it counts how often it is traced."""
    task = Detection(detector(kind, dtype))
    traces = []

    def step(params, model_state, batch):
        traces.append(1)
        state = SimpleNamespace(model_state=model_state)
        loss = task.objectives[0].loss
        result = jax.value_and_grad(loss, has_aux=True)(params, state, batch, jax.random.key(1))
        return result, [
            method(params, model_state, batch, jax.random.key(0))
            for method in (task.evaluate, task.predict)
        ]

    return jax.jit(step), traces


def run(kind, batch, dtype="float32"):
    return jax.device_get(step_of(kind, dtype)[0](*initialized(kind), batch))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edges():
    """Batches at the edges, all of one shape."""
    yield "full", batch_of()
    empty = batch_of()
    empty["box_valid"][1] = False
    yield "one empty image", empty
    empty = batch_of()
    empty["box_valid"][:] = False
    yield "no object anywhere", empty
    nothing = batch_of()
    nothing["valid"][:] = False
    yield "no image", nothing
    odd = batch_of()
    odd["boxes"][0, 0] = 10, 10, 10, 10
    odd["boxes"][0, 1] = 10, 10, 30, 10
    odd["boxes"][1, 0] = -90, -90, -50, -50
    odd["boxes"][1, 1] = 80, 80, 120, 90
    odd["boxes"][2, 0] = -1e4, -1e4, 1e4, 1e4
    odd["boxes"][2, 1] = 20, 20, 20 + 1e-5, 20 + 1e-5
    odd["boxes"][3, :] = odd["boxes"][3, 0]
    yield "zero area, outside, huge, tiny, twins", odd


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_finite_at_all_edges_in_one_compilation(kind, dtype):
    for name, batch in edges():
        trained, (metrics, outputs) = run(kind, batch, dtype)
        everything = jax.tree.leaves((trained, metrics, outputs))
        assert all(np.isfinite(leaf).all() for leaf in everything), name
        assert {leaf.dtype for leaf in jax.tree.leaves(trained[1])} == {jnp.dtype("float32")}
    assert len(step_of(kind, dtype)[1]) == 1


@KINDS
def test_no_image_teaches_nothing(kind):
    batch = dict(edges())["no image"]
    (result, gradient), (metrics, _) = run(kind, batch)
    assert result[0] == 0 and metrics["loss"].count == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert_equal(result[1][0], initialized(kind)[1])


@KINDS
def test_garbage_in_the_padding_changes_nothing_bit_for_bit(kind):
    one, other = batch_of(), batch_of()
    for batch in (one, other):
        batch["valid"][2] = False
        batch["box_valid"][0, 3:] = batch["box_valid"][1, 0] = batch["box_valid"][3] = False
    other["image"][2] = np.nan
    other["boxes"][2] = np.nan
    other["boxes"][~other["box_valid"]] = np.nan
    other["box_label"][~other["box_valid"]] = -77
    other["box_label"][2] = 99
    other["boxes"][1, 0] = np.inf
    assert_equal(run(kind, one), run(kind, other))


@KINDS
def test_an_invalid_row_is_as_if_it_was_not_there(kind):
    """Two images beside two that are not valid, and the two twice."""
    beside, twice = batch_of(), batch_of()
    beside["valid"][2:] = False
    twice = {name: np.concatenate([value[:2]] * 2) for name, value in twice.items()}
    (_, (found, _)), (_, (expected, _)) = run(kind, beside), run(kind, twice)
    for name in expected:
        assert (found[name].count, expected[name].count) == (2, 4)
        # Sums of other numbers of terms may be taken in another order.
        np.testing.assert_allclose(found[name].compute(), expected[name].compute(), rtol=1e-5)


BOXES = "boxes", "box_label", "box_valid"


@KINDS
def test_the_order_of_the_boxes_changes_nothing(kind):
    batch = batch_of(seed=1)  # no two in one cell, of which CenterNet learns the first
    batch["box_valid"][:, 3:] = False
    turned = {**batch, **{name: batch[name][:, ::-1] for name in BOXES}}
    (_, (found, _)), (_, (expected, _)) = run(kind, batch), run(kind, turned)
    for name in expected:
        np.testing.assert_allclose(found[name].compute(), expected[name].compute(), rtol=1e-5)


def test_the_number_of_padding_rows_changes_nothing():
    """Of the task alone: what the losses see of an image they see through the assigners' vmap."""
    task, (params, model_state) = Detection(detector("fcos")), initialized("fcos")
    evaluate = jax.jit(task.evaluate)
    batch = batch_of()
    batch["box_valid"][:, 3:] = False
    shorter = {**batch, **{name: batch[name][:, :3] for name in BOXES}}
    hidden = {**batch, "box_valid": np.zeros_like(batch["box_valid"])}
    none = {**batch, **{name: batch[name][:, :0] for name in BOXES}}
    for one, other in ((batch, shorter), (hidden, none)):
        expected, found = run("fcos", one)[1][0], evaluate(params, model_state, other, None)
        for name in expected:
            np.testing.assert_allclose(found[name].compute(), expected[name].compute(), rtol=1e-5)


@KINDS
def test_huge_logits_have_finite_losses_and_gradients(kind):
    model, batch = detector(kind), batch_of()
    truth = {name: value for name, value in batch.items() if name != "image"}
    params, model_state = initialized(kind)
    shapes = jax.eval_shape(model.apply, {"params": params["model"], **model_state}, batch["image"])
    slopes = jax.value_and_grad(lambda outputs: sum(model.losses(outputs, truth, SIZE).values()))
    everything = jax.jit(lambda outputs: (slopes(outputs), model.detections(outputs, SIZE)))
    rng = np.random.default_rng(0)
    for values in ([100.0], [-100.0], [-100.0, 100.0], [0.0]):
        outputs = jax.tree.map(
            lambda x, v=values: rng.choice(v, x.shape).astype(np.float32), shapes
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything(outputs)))


@KINDS
def test_detections_have_a_fixed_shape_and_lie_in_the_image(kind):
    assert isinstance(Detection(detector(kind)), Task)
    _, (_, found) = run(kind, batch_of())
    assert {name: (value.shape, value.dtype.name) for name, value in found.items()} == {
        "boxes": ((4, 7, 4), "float32"),
        "scores": ((4, 7), "float32"),
        "labels": ((4, 7), "int32"),
        "detected": ((4, 7), "bool"),
    }
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= np.array([50, 36, 50, 36])).all()
    assert (np.diff(found["scores"], axis=1) <= 0).all()


@KINDS
def test_a_batch_is_learned_by_heart(kind):
    """Gradient descent on four scenes finds all their objects before all else."""
    batch = batch_of(seed=1)
    batch["box_valid"][:, 2:] = False
    for row in range(4):  # A colour for each class, on grey: there is something to see.
        batch["image"][row] = 0.5
        batch["boxes"][row, :2] = [[2, 2, 18, 20], [22 + row, 8, 40 + row, 30]]
        for i, (x1, y1, x2, y2) in enumerate(batch["boxes"][row, :2].astype(int)):
            batch["image"][row, y1:y2, x1:x2] = np.eye(3)[batch["box_label"][row, i]]
    params, model_state = initialized(kind)
    step, _ = step_of(kind)
    steps = 150
    # Smaller steps at the end: else where it stands after the last one is a matter of rounding.
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    update = jax.jit(lambda gradient, moments, params: _apply(optimizer, gradient, moments, params))
    moments = jax.jit(optimizer.init)(params)
    for _ in range(steps):
        ((_, (model_state, _)), gradient), (_, found) = step(params, model_state, batch)
        params, moments = update(gradient, moments, params)
    for row in range(4):
        assert found["scores"][row, 1] > max(0.2, 1.2 * found["scores"][row, 2])
        boxes, labels = (np.asarray(found[name][row])[:2] for name in ("boxes", "labels"))
        order = np.argsort(boxes[:, 0])
        np.testing.assert_allclose(boxes[order], batch["boxes"][row, :2], atol=4.0)
        np.testing.assert_array_equal(labels[order], batch["box_label"][row, :2])


def _apply(optimizer, gradient, moments, params):
    updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(params, updates), moments


def test_the_picture_has_truth_left_and_prediction_right():
    batch = batch_of()
    batch["valid"][1] = False
    batch["box_valid"][0, 2:] = False
    visualize = jax.jit(Detection(detector("centernet")).visualize)
    picture = np.asarray(visualize(*initialized("centernet"), batch, None)["detection"])
    assert picture.shape == (2 + 38, 2 + 4 * 102, 3)
    assert not picture[2:38, 104:204].any()
    # Nothing is sure yet: on the right there is only the image.
    np.testing.assert_array_equal(picture[2:38, 52:102], batch["image"][0])
    expected = draw.boxes(batch["image"][0], batch["boxes"][0, 1::-1], batch["box_label"][0, 1::-1])
    np.testing.assert_allclose(picture[2:38, 2:52], expected, atol=1e-6)


def test_a_label_that_is_no_class_is_not_passed_over():
    """Nor taken for the background; where a box is not valid any label will do."""
    task, batch = Detection(detector("fcos")), batch_of()
    task.check(batch)
    with pytest.raises(InputError, match="the batch has no 'box_label'"):
        task.check({name: value for name, value in batch.items() if name != "box_label"})
    measure = jax.jit(lambda batch: task.evaluate(*initialized("fcos"), batch, jax.random.key(0)))
    for label in (CLASSES, -1):
        labels = batch["box_label"].copy()
        labels[1, 2] = label
        wrong = {**batch, "box_label": labels}
        with pytest.raises(InputError, match=f"box_label is {label}, but num_c"):
            task.check(wrong)
        assert np.isnan(measure(wrong)["loss"].total)
        hidden = {**wrong, "box_valid": labels != label}
        task.check(hidden)
        task.check({**wrong, "box_valid": (labels != label).astype(int)})
        assert np.isfinite(measure(hidden)["loss"].total)


def test_weights_of_losses_that_are_not_there():
    with pytest.raises(InputError, match=r"weights\.box is -2\.0; it must be at least 0"):
        Detection(detector("fcos"), weights={"box": -2.0})
    task, batch = Detection(detector("fcos"), weights={"box": 2.0, "boxes": 1.0}), batch_of()
    with pytest.raises(
        InputError, match="weights has 'boxes', .* there are: box, centerness, class"
    ):
        jax.eval_shape(task.evaluate, *initialized("fcos"), batch, jax.random.key(0))
