"""R-CNN with masks, keypoints and a head of one's own, as a whole: edges, padding, compilations."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvjax import draw
from cvjax.detection.box_head import BoxHead
from cvjax.detection.boxes import paired_iou
from cvjax.detection.keypoint_head import KeypointHead
from cvjax.detection.mask_head import MaskHead
from cvjax.detection.rcnn import RCNN, PyramidPool, pixels_of
from cvjax.detection.roi_align import roi_align
from cvjax.detection.rpn import RPN, RPNHead
from cvjax.detection.task import Detection
from cvjax.errors import InputError
from cvjax.nn.features import Patches
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.resnet import ResNet

CLASSES, POINTS, SIZE = 3, 2, (36, 50)  # neither side is a multiple of the largest stride


class PriceHead(nn.Module):
    """A head of one's own: a number for each object. Two functions, and nothing else to do."""

    size: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x.mean((1, 2), dtype=jnp.float32))[:, 0]

    def losses(self, outputs, samples, truth):
        away = jnp.abs(outputs - truth["price"][samples.index])
        foreground = samples.foreground
        return {"price": (jnp.sum(jnp.where(foreground, away, 0.0)), jnp.sum(foreground))}

    def detections(self, outputs, found, size):
        return {"price": jnp.where(found["detected"], outputs, 0.0)}


@functools.cache
def task_of(dtype="float32"):
    backbone = Patches(ResNet(stem="cifar", width=8, stage_sizes=(1, 1), dtype=dtype), 2)
    model = RCNN(
        Pyramid(backbone, FPN(16, "pool", 1, dtype=dtype)),
        RPN(RPNHead(3, 16, dtype=dtype), scale=4.0, samples=2000, fraction=1.0, candidates=20,
            proposals=12),
        BoxHead(CLASSES, 32, 4, candidates=40, outputs=5, dtype=dtype),
        {
            "mask": MaskHead(CLASSES, 8, 1, 5, dtype=dtype),
            "keypoints": KeypointHead(POINTS, 8, 1, 4, dtype=dtype),
            "price": PriceHead(),
        },
        PyramidPool(2, 16.0, 2, 1),
        samples=20,  # all of the 12 proposals and 5 true boxes, and padding
        fraction=1.0,
    )  # fmt: skip
    return Detection(model, fields=("price",))


def batch_of(b=4, n=5, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, (25, 18), (b, n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(6, 20, (b, n, 2))], axis=-1)
    points = rng.uniform(boxes[:, :, None, :2], boxes[:, :, None, 2:], (b, n, POINTS, 2))
    return {
        "image": rng.uniform(size=(b, *SIZE, 3)).astype(np.float32),
        "boxes": boxes.astype(np.float32),
        "box_label": rng.integers(CLASSES, size=(b, n), dtype=np.int32),
        "box_valid": np.ones((b, n), bool),
        "masks": rng.random((b, n, *SIZE)) < 0.5,
        "keypoints": np.concatenate(
            [points, rng.integers(0, 3, (b, n, POINTS, 1))], -1, dtype=np.float32
        ),
        "price": rng.random((b, n), np.float32),
        "valid": np.ones(b, bool),
    }


@functools.cache
def initialized():
    """Random parameters without the minute that compiling their distributions would take."""
    shapes = jax.eval_shape(task_of().init, jax.random.key(0), batch_of())
    rng = np.random.default_rng(0)

    def array(path, x):
        name = path[-1].key
        if name == "kernel":
            deviation = 1 / np.sqrt(np.prod(x.shape[:-1]))
            return (deviation * rng.normal(size=x.shape)).astype(np.float32)
        return np.full(x.shape, name in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(array, shapes)


@functools.cache
def step_of(dtype="float32"):
    """The jitted gradient, detections and picture; it counts how often it is traced.

    `look` is whether the latter two are wanted: they are zeros else.
    """
    task, traces = task_of(dtype), []

    @jax.jit  # Traced once for both its shapes and its values.
    def see(*given):
        return [method(*given) for method in (task.predict, task.visualize)]

    def step(params, model_state, batch, rng, look):
        traces.append(1)
        state = SimpleNamespace(model_state=model_state)
        loss = task.objectives[0].loss
        result = jax.value_and_grad(loss, has_aux=True)(params, state, batch, rng)
        if dtype != "float32":
            return result, ()
        given = params, model_state, batch, rng
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(see, *given))
        return result, jax.lax.cond(look, see, lambda *given: zeros, *given)

    return jax.jit(step), traces


def run(batch, dtype="float32", seed=1):
    return jax.device_get(step_of(dtype)[0](*initialized(), batch, jax.random.key(seed), True))


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
    odd["masks"][2] = False
    odd["keypoints"][0, 2:, :, :2] = odd["boxes"][0, 2:, None, 2:]
    odd["keypoints"][3, :, :, :2] = 1e9
    yield "zero area, outside, huge, tiny, twins, no mask, points on the border and far", odd


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_finite_at_all_edges_in_one_compilation(dtype):
    for name, batch in edges():
        results = run(batch, dtype)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results)), name
        assert {leaf.dtype for leaf in jax.tree.leaves(results[0][1])} == {jnp.dtype("float32")}
    (_, (_, metrics)), gradient = run(batch_of(), dtype)[0]
    assert set(metrics) == {"loss", "rpn_objectness", "rpn_box", "classification", "box", "mask",
                            "keypoints", "price"}  # fmt: skip
    if dtype == "float32":  # Everything learns something.
        still = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
            if not leaf.any()
        ]
        # A bias before a norm over the batch, and the norms that begin as 0 are not among them.
        assert not still, still
    assert len(step_of(dtype)[1]) == 1


def test_detections_have_fixed_shapes_and_lie_in_the_image():
    _, (found, _) = run(batch_of())
    assert {name: (value.shape, value.dtype.name) for name, value in found.items()} == {
        "boxes": ((4, 5, 4), "float32"),
        "scores": ((4, 5), "float32"),
        "labels": ((4, 5), "int32"),
        "detected": ((4, 5), "bool"),
        "masks": ((4, 5, 36, 50), "bool"),
        "keypoints": ((4, 5, POINTS, 3), "float32"),
        "price": ((4, 5), "float32"),
    }
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= np.array([50, 36, 50, 36])).all()
    assert (np.diff(found["scores"], axis=1) <= 0).all() and found["detected"].any()


def test_no_image_teaches_nothing():
    (result, gradient), _ = run(dict(edges())["no image"])
    assert result[0] == 0 and result[1][1]["loss"].count == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert_equal(result[1][0], initialized()[1])


def test_garbage_in_the_padding_changes_nothing_bit_for_bit():
    one, other = batch_of(), batch_of()
    for batch in (one, other):
        batch["valid"][2] = False
        batch["box_valid"][0, 3:] = batch["box_valid"][1, 0] = batch["box_valid"][3] = False
    other["image"][2] = np.nan
    for name in ("boxes", "keypoints", "price"):
        other[name][2] = np.nan
        other[name][~other["box_valid"]] = np.nan
    other["masks"][2] = other["masks"][~other["box_valid"]] = True
    other["box_label"][~other["box_valid"]] = -77
    other["box_label"][2] = 99
    other["boxes"][1, 0] = np.inf
    unknown = other["keypoints"][..., 2] == 0  # A point without annotation may be anywhere.
    other["keypoints"][..., :2][unknown] = np.nan
    assert_equal(run(one), run(other))


def test_the_samples_are_drawn_by_the_key_and_the_order_of_the_truth_does_not_matter():
    """Where all candidates are samples, the loss is that of any key."""
    batch = batch_of()
    batch["box_valid"][:, 3:] = False
    rows = {name: batch[name][:, ::-1] for name in batch if name not in ("image", "valid")}
    (expected, _), (found, _) = run(batch)
    for other, seed in (({**batch, **rows}, 1), (batch, 2)):
        (result, _), (found_other, _) = run(other, seed=seed)
        np.testing.assert_allclose(result[0], expected[0], rtol=1e-5)
        assert_equal(found, found_other)
    assert_equal(run(batch)[0][0], expected)


def test_a_batch_is_learned_by_heart():
    """Gradient descent on four scenes finds their objects, shapes, points and prices."""
    batch = batch_of(seed=1)
    batch["box_valid"][:, 2:] = False
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for row in range(4):  # An ellipse, with a colour for each class, on grey.
        batch["image"][row] = 0.5
        batch["boxes"][row, :2] = [[2, 2, 18, 20], [22 + row, 8, 40 + row, 30]]
        for i, (x1, y1, x2, y2) in enumerate(batch["boxes"][row, :2]):
            middle, half = np.array([x1 + x2, y1 + y2]) / 2, np.array([x2 - x1, y2 - y1]) / 2
            mask = ((x - middle[0]) / half[0]) ** 2 + ((y - middle[1]) / half[1]) ** 2 < 1
            batch["masks"][row, i] = mask
            batch["image"][row, mask] = np.eye(3)[batch["box_label"][row, i]]
            batch["keypoints"][row, i] = [[middle[0], y1 + 1, 2], [x1 + 1, middle[1], 1]]
            batch["price"][row, i] = batch["box_label"][row, i]
    # What is asked is asked on average: where a single box stands after the last step is a matter
    # of rounding. For 8 keys of the samples the averages were twice as good as they must be.
    steps = 200
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    params, model_state = initialized()
    moments = jax.jit(optimizer.init)(params)

    @jax.jit
    def apply(gradient, moments, params):
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments

    step, _ = step_of()
    for number in range(steps):
        ((_, (model_state, _)), gradient), (found, pictures) = step(
            params, model_state, batch, jax.random.key(number), number + 1 == steps
        )
        params, moments = apply(gradient, moments, params)
    found = jax.tree.map(np.asarray, found)
    order = np.argsort(found["boxes"][:, :2, 0])
    two = lambda values: np.stack([v[:2][o] for v, o in zip(values, order, strict=True)])  # noqa: E731
    pick = {name: two(found[name]) for name in ("boxes", "labels", "masks", "keypoints", "price")}
    np.testing.assert_array_equal(pick["labels"], batch["box_label"][:, :2])
    overlap = paired_iou(pick["boxes"], batch["boxes"][:, :2])
    assert np.mean(overlap) > 0.8
    both, either = (
        op(pick["masks"], batch["masks"][:, :2]).sum((2, 3))
        for op in (np.logical_and, np.logical_or)
    )
    assert np.mean(both / either) > 0.8
    away = pick["keypoints"][..., :2] - batch["keypoints"][:, :2, :, :2]
    assert np.mean(abs(away)) < 1.6  # pixels
    assert np.mean(abs(pick["price"] - batch["price"][:, :2])) < 0.1
    assert found["scores"][:, 1].mean() > 1.5 * found["scores"][:, 2].mean()
    # The picture: left what is true, right what is sure, masks below boxes below points.
    picture = np.asarray(pictures["detection"])
    assert picture.shape == (2 + 38, 2 + 4 * 102, 3)
    sure = found["scores"][0] >= 0.5
    assert sure.any()
    names = ("boxes", "labels", "masks", "keypoints")
    truth = {**batch, "labels": batch["box_label"]}
    for column, objects in (
        (2, [truth[name][0, 1::-1] for name in names]),
        (52, [found[name][0][sure][::-1] for name in names]),
    ):
        boxes, labels, masks, points = objects  # the first on top
        expected = draw.masks(batch["image"][0], masks, labels)
        expected = draw.boxes(expected, boxes, labels)
        corner = np.floor(points[..., ::-1, :2].reshape(-1, 2) - 1)  # three pixels, whole
        squares = np.concatenate([corner, corner + 3], -1)
        expected = draw.boxes(expected, squares, np.tile(np.arange(POINTS)[::-1], len(points)))
        np.testing.assert_allclose(picture[2:38, column : column + 50], expected, atol=1e-5)


def test_faster_rcnn_needs_neither_masks_nor_points_and_huge_outputs_are_fine():
    task = Detection(task_of().model.clone(heads={}))
    batch = {k: v for k, v in batch_of().items() if k not in ("masks", "keypoints", "price")}
    params, model_state = initialized()
    params = {"model": {k: v for k, v in params["model"].items() if not k.startswith("heads")}}
    key, model, truth = jax.random.key(0), task.model, task._truth(batch)
    assert set(jax.eval_shape(task.predict, params, model_state, batch, key)) == {
        "boxes", "scores", "labels", "detected"}  # fmt: skip
    outputs = jax.eval_shape(
        lambda: model.apply(
            {"params": params["model"], **model_state}, batch["image"], truth=truth,
            rngs={"sample": key},
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    fixed = {
        "anchors": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), outputs["anchors"]),
        "samples": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), outputs["samples"]),
    }
    for name in fixed:
        shape = outputs[name].foreground.shape
        corner = rng.uniform(0, 20, (*shape, 2))
        fixed[name] = fixed[name]._replace(
            boxes=np.float32(np.concatenate([corner, corner + 9], -1)),
            foreground=rng.random(shape) < 0.5, valid=np.ones(shape, bool),
        )  # fmt: skip

    @jax.jit
    @jax.value_and_grad
    def loss(said):
        return sum(model.losses({**said, **fixed, "heads": {}}, truth, SIZE).values())

    for values in ([100.0], [-100.0], [-100.0, 100.0], [0.0]):
        said = {
            name: jax.tree.map(
                lambda x, v=values: np.float32(rng.choice(v, x.shape)), outputs[name]
            )
            for name in ("rpn", "box")
        }
        results = loss(said)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_each_box_is_pooled_from_the_level_of_its_size():
    rng = np.random.default_rng(0)
    levels = [rng.normal(size=(1, 64 // s, 64 // s, 2)).astype(np.float32) for s in (4, 8, 16)]
    boxes = np.float32([[[0, 0, 31, 31], [1, 2, 34, 34], [0, 3, 60, 20], [5, 5, 5, 5]]])
    pool = PyramidPool(2, canonical_size=32.0, canonical_level=3, samples=1)

    @jax.jit
    def both(levels, boxes):
        of_level = [
            roi_align([level], boxes, strides=(stride,), output_size=(3, 3), samples=1)
            for level, stride in zip(levels[:2], (4, 8), strict=True)
        ]
        return pool(levels, boxes, (4, 8, 16), 3), of_level

    found, of_level = both(levels, boxes)
    for i, level in enumerate((0, 1, 0, 0)):  # 60 x 17 is 31.9 squared.
        np.testing.assert_allclose(found[:, i], of_level[level][:, i], atol=1e-5)


def test_a_head_with_detail_sees_the_pixels_of_the_box():
    image = np.random.default_rng(0).normal(size=(2, 20, 24, 3)).astype(np.float32)
    boxes = np.float32([[[3, 5, 11, 13]], [[16, 12, 24, 20]]])  # 8 x 8 pixels, up to the corner
    seen = np.asarray(jax.jit(pixels_of, static_argnums=(2, 3))(image, boxes, 4, 2))
    assert seen.shape == (2, 1, 4, 4, 12)
    for i, (x, y, *_) in enumerate(boxes[:, 0].astype(int)):
        for row, column in np.ndindex(4, 4):
            top, left = y + 2 * row, x + 2 * column
            cell = image[i, top : top + 2, left : left + 2]
            # Samples in the middle of pixels: their weights are 1 and 0 but for float32's rounding.
            np.testing.assert_allclose(seen[i, 0, row, column], cell.reshape(-1), atol=1e-5)


def test_with_detail_the_first_convolution_reads_features_and_pixels():
    model = task_of().model
    heads = {
        "mask": MaskHead(CLASSES, 8, 1, 5, detail=2),
        "keypoints": KeypointHead(POINTS, 8, 1, 4, detail=3),
    }
    model = model.clone(heads=heads)
    task = Detection(model)
    params, _ = jax.eval_shape(task.init, jax.random.key(0), batch_of())
    shapes = {
        name: params["model"][f"heads_{name}"][f"{first}_fcn1"]["kernel"].shape
        for name, first in (("mask", "mask"), ("keypoints", "conv"))
    }
    assert shapes == {"mask": (3, 3, 16 + 4 * 3, 8), "keypoints": (3, 3, 16 + 9 * 3, 8)}
    # Without a truth the heads see what was found.
    outputs = jax.eval_shape(
        lambda params, x: model.apply({"params": params}, x, mutable=["batch_stats"])[0],
        params["model"], batch_of()["image"],
    )  # fmt: skip
    assert outputs["heads"]["mask"].shape == (4, 5, 10, 10, CLASSES + 1)


class Spy(nn.Module):
    """A model that says nothing and shows the truth that it was given."""

    @nn.compact
    def __call__(self, x, *, train=False, truth=None):
        self.param("bias", nn.initializers.zeros, ())
        assert truth is None or truth["boxes"].dtype == jnp.float32
        return {}

    def losses(self, outputs, truth, size):
        names = ("box_valid", "masks", "keypoints", "boxes")
        return {name: jnp.sum(truth[name]).astype(jnp.float32) for name in names}


def test_crowds_and_what_is_to_be_ignored_are_no_truth():
    task, batch = Detection(Spy()), batch_of()
    batch["crowd"], batch["ignore"] = np.zeros((2, 4, 5), bool)
    batch["crowd"][0, 1] = batch["ignore"][3, 2] = True
    batch["masks"] = np.where(batch["crowd"][..., None, None], np.nan, batch["masks"])
    real = ~(batch["crowd"] | batch["ignore"])
    evaluate, key = jax.jit(task.evaluate), jax.random.key(0)
    params, model_state = jax.jit(task.init)(key, batch)
    found = evaluate(params, model_state, batch, key)
    assert found["box_valid"].compute() == 18
    numbers = {k: v.astype(float) if v.dtype == bool else v for k, v in batch.items()}
    again = evaluate(params, model_state, numbers, key)
    assert {k: v.compute() for k, v in again.items()} == {k: v.compute() for k, v in found.items()}
    assert found["masks"].compute() == batch["masks"][real].sum()
    points = batch["keypoints"][real]
    np.testing.assert_allclose(
        found["keypoints"].compute(), points[points[..., 2] > 0].sum(), rtol=1e-5
    )
    none = {
        name: value if name in ("image", "valid") else value[:, :0] for name, value in batch.items()
    }
    found = evaluate(params, model_state, none, key)
    assert all(found[name].compute() == 0 for name in ("box_valid", "masks", "keypoints", "boxes"))
    with pytest.raises(InputError, match="the batch has no 'door', only image, boxes, "):
        Detection(Spy(), fields=("door",)).evaluate(params, model_state, batch, key)
    with pytest.raises(InputError, match="the batch has no 'boxes', only image, valid"):
        task.evaluate(params, model_state, {k: batch[k] for k in ("image", "valid")}, key)


@pytest.mark.parametrize("heads, classes, expected", [
    ({"mask": MaskHead(90)}, 90, 44_401_393),  # maskrcnn_resnet50_fpn
    ({"keypoints": KeypointHead(17)}, 1, 59_137_258),  # keypointrcnn_resnet50_fpn
])  # fmt: skip
def test_the_number_of_parameters_is_that_of_torchvision(heads, classes, expected):
    model = RCNN(Pyramid(ResNet(50), FPN(256, "pool", 1)), RPN(RPNHead()), BoxHead(classes), heads)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    )
    norms = 53_120  # Those of torchvision's are frozen and do not count.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) - norms == expected


def test_impossible_settings():
    with pytest.raises(InputError, match="normalizer is 'epoch'"):
        RCNN(None, None, None, normalizer="epoch")
    with pytest.raises(InputError, match=r"weights\[2\] is 0.0; it must be above 0"):
        BoxHead(CLASSES, weights=(1.0, 1.0, 0.0, 1.0))
    with pytest.raises(InputError, match="it must be four numbers"):
        BoxHead(CLASSES, weights=(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="threshold is 0.0; it must be above 0"):
        MaskHead(CLASSES, threshold=0.0)
    x, truth = np.zeros((2, 4, 4, CLASSES + 1)), {"keypoints": np.zeros((5, POINTS, 3))}
    with pytest.raises(InputError, match="the batch has no masks"):
        MaskHead(CLASSES).losses(x, None, truth)
    with pytest.raises(InputError, match="keypoints=17, the batch has 2"):
        KeypointHead(17).losses(x, None, truth)
    with pytest.raises(InputError, match="keypoints=17, the batch has no"):
        KeypointHead(17).losses(x, None, {})
    outputs = {"logits": np.zeros((1, 3 * 80)), "deltas": np.zeros((1, 3 * 80, 4))}
    with pytest.raises(InputError, match="240 logits for 160 anchors; it needs anchors=2"):
        RPN(RPNHead(3), ratios=(1.0, 2.0)).propose(outputs, (32, 40), (4,))
