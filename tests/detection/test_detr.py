"""DETR: positions and losses by a slow loop, the edges, and the truth that is said is detected."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from cvjax.detection.detr import DETR, sine_positions
from cvjax.detection.task import Detection
from cvjax.errors import InputError
from cvjax.nn.resnet import ResNet
from tests.detection.test_task import CLASSES, SIZE, assert_equal, batch_of, edges


def detector(dtype="float32", **fields):
    backbone = ResNet(width=4, stage_sizes=(1,), dtype=dtype)
    small = dict(queries=7, features=8, heads=2, hidden=8, encoder_layers=1, decoder_layers=2)
    return DETR(backbone, CLASSES, dtype=dtype, **{**small, **fields})


MODEL = detector()
LOSS = jax.jit(jax.value_and_grad(lambda o, truth: sum(MODEL.losses(o, truth, SIZE).values())))


def test_positions_one_by_one():
    found = np.asarray(jax.jit(lambda: sine_positions(3, 5, 12))())
    for y in range(3):
        for x in range(5):
            expected = []
            for place, length in ((y, 3), (x, 5)):
                angle = 2 * np.pi * (place + 1) / length
                for i in range(3):
                    frequency = 10_000 ** (-2 * i / 6)
                    expected += [np.sin(angle * frequency), np.cos(angle * frequency)]
            # The angle 2 pi is rounded to float32, and the code of the paper adds 1e-6 to a length.
            np.testing.assert_allclose(found[5 * y + x], expected, atol=1e-5)
    with pytest.raises(InputError, match="features is 6; it must be a multiple of 4"):
        sine_positions(3, 5, 6)


def outputs_of(batch=3, layers=2, queries=7, seed=0):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        [rng.uniform(0.2, 0.8, (batch, layers, queries, 2)),
         rng.uniform(0.1, 0.6, (batch, layers, queries, 2))], -1
    )  # fmt: skip
    logits = rng.normal(size=(batch, layers, queries, CLASSES + 1))
    return {"logits": np.float32(logits), "boxes": np.float32(boxes)}


def truth_of():
    truth = {name: value[:3] for name, value in batch_of(seed=2).items() if name != "image"}
    truth["boxes"][0, 0] = -10, 5, 20, 70  # counts as far as it lies in the image
    truth["box_valid"][1, 2:] = False
    truth["box_valid"][2] = False
    truth["boxes"][~truth["box_valid"]] = 0
    return truth


def giou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = np.float64(a), np.float64(b)
    a, b = ([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in
            ((ax, ay, aw, ah), (bx, by, bw, bh)))  # fmt: skip
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    both = width * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    either = aw * ah + bw * bh - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / either - (hull - either) / hull


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_losses_are_those_of_the_slow_loop(normalizer):
    model = detector(normalizer=normalizer, no_object=0.2, class_cost=2.0, box_cost=3.0)
    outputs, truth = outputs_of(), truth_of()
    height, width = SIZE
    expected = np.zeros(3)
    for layer in range(2):
        sums, weights, counts = np.zeros((3, 3)), np.zeros(3), np.zeros(3)
        for i in range(3):
            valid = truth["box_valid"][i]
            boxes = truth["boxes"][i][valid].clip(0, [width, height] * 2) / ([width, height] * 2)
            boxes = [((a + c) / 2, (b + d) / 2, c - a, d - b) for a, b, c, d in boxes]
            labels = truth["box_label"][i][valid]
            predicted = np.float64(outputs["boxes"][i, layer])
            logits = np.float64(outputs["logits"][i, layer])
            p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            away = np.array([[np.abs(b - q).sum() for q in predicted] for b in boxes])
            overlap = np.array([[giou(b, q) for q in predicted] for b in boxes])
            target = np.full(7, CLASSES)
            if len(boxes):
                cost = -2 * p[:, labels].T + 3 * away - 2 * overlap
                rows, queries = linear_sum_assignment(cost)
                target[queries] = labels[rows]
                sums[i, 1] = away[rows, queries].sum()
                sums[i, 2] = (1 - overlap[rows, queries]).sum()
            weight = np.where(target < CLASSES, 1, 0.2)
            sums[i, 0] = -(weight * np.log(p[np.arange(7), target])).sum()
            weights[i], counts[i] = weight.sum(), len(boxes)
        divisors = np.stack([weights, counts, counts], -1)
        if normalizer == "batch":
            expected += sums.sum(0) / divisors.sum(0)
        else:
            expected += (sums / np.where(divisors > 0, divisors, 1)).mean(0)
    found = jax.jit(lambda o: model.losses(o, truth, SIZE))(outputs)
    found = [found[name] for name in ("classification", "box", "giou")]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_truth_that_is_said_is_detected_and_costs_nothing():
    truth, outputs = truth_of(), outputs_of()
    scale = np.array([SIZE[1], SIZE[0]] * 2)
    logits = np.zeros((3, 2, 7, CLASSES + 1), np.float32)
    logits[..., -1] = 50
    for i in range(3):
        for query, row in enumerate(np.flatnonzero(truth["box_valid"][i])):
            x1, y1, x2, y2 = truth["boxes"][i, row].clip(0, scale) / scale
            outputs["boxes"][i, :, 6 - query] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            # The first is the least sure.
            logits[i, :, 6 - query, truth["box_label"][i, row]] = 100 + query
    outputs["logits"] = logits
    assert LOSS(outputs, truth)[0] < 1e-4
    logits[:, 1] = np.where(logits[:, 1] >= 100, logits[:, 1] - 99, logits[:, 1] / 100)
    found = jax.jit(lambda o: MODEL.clone(score=0.3).detections(o, SIZE))(outputs)
    found = jax.device_get(found)
    for i in range(3):
        rows = np.flatnonzero(truth["box_valid"][i])[::-1]
        there = found["detected"][i]
        assert there.sum() == len(rows) and there[: len(rows)].all()
        boxes = truth["boxes"][i, rows].clip(0, scale)
        np.testing.assert_allclose(found["boxes"][i][there], boxes, atol=1e-4)
        np.testing.assert_array_equal(found["labels"][i][there], truth["box_label"][i, rows])
        best = logits[i, 1, 7 - len(rows) :].max(-1)
        p = np.exp(best) / (np.exp(best) + np.exp(0.5) + CLASSES - 1)
        np.testing.assert_allclose(found["scores"][i][there], p, rtol=1e-5)
        for name in ("boxes", "scores", "labels"):
            assert not found[name][i][~there].any()


def test_the_edges_in_one_compilation_of_bfloat16():
    """What is finite and equal in bfloat16, with all of the geometry in float32, is in float32."""
    task, rng, traces = (
        Detection(detector("bfloat16", decoder_layers=1)),
        np.random.default_rng(0),
        [],
    )
    params, model_state = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype) ** 2 / 5,
        jax.eval_shape(task.init, jax.random.key(0), batch_of()),
    )

    @jax.jit
    def step(params, batch):
        traces.append(1)
        state, rng = SimpleNamespace(model_state=model_state), jax.random.key(1)
        trained = jax.value_and_grad(task.loss, has_aux=True)(params, state, batch, rng)
        return trained, task.predict(params, model_state, batch, rng)

    for name, batch in edges():
        result = jax.device_get(step(params, batch))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result)), name
        (loss, _), gradient = result[0]
        there = any(leaf.any() for leaf in jax.tree.leaves(gradient))
        assert (loss > 0) == there == (name != "no image"), name
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}

    one, other = batch_of(), batch_of()
    for batch in (one, other):
        batch["valid"][2] = False
        batch["box_valid"][0, 3:] = batch["box_valid"][1, 0] = batch["box_valid"][3] = False
    other["image"][2] = other["boxes"][2] = other["boxes"][~other["box_valid"]] = np.nan
    other["box_label"][~other["box_valid"]] = -77
    other["box_label"][2] = 99
    other["boxes"][1, 0] = np.inf
    assert_equal(step(params, one), step(params, other))
    assert len(traces) == 1


def test_huge_logits_and_perfect_boxes_have_finite_losses_and_gradients():
    truth = truth_of()
    scale = np.array([SIZE[1], SIZE[0]] * 2)
    for size in (100.0, -100.0, 1e30):
        outputs = outputs_of()
        outputs["logits"] = np.full_like(outputs["logits"], size)
        outputs["logits"][..., ::2] *= -1
        x1, y1, x2, y2 = np.moveaxis(truth["boxes"][:, 1] / scale, -1, 0)
        exact = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)
        outputs["boxes"][:, :, 1] = exact[:, None]
        outputs["boxes"][:, :, 2, 2:] = 0
        value, gradient = LOSS(outputs, truth)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_impossible_settings():
    with pytest.raises(InputError, match="queries is 4, but images have up to 5 boxes"):
        detector(queries=4).losses(outputs_of(queries=4), truth_of(), SIZE)
    with pytest.raises(InputError, match=r"no_object is 0; it must be in \(0, 1\]"):
        detector(no_object=0)
    for wrong in (dict(score=2.0), dict(class_cost=-1.0), dict(box_cost=-5.0), dict(giou_cost="a")):
        name, value = next(iter(wrong.items()))
        with pytest.raises(InputError, match=f"DETR: {name} is {value!r}; it must be"):
            detector(**wrong)
    with pytest.raises(InputError, match="decoder_layers is 0"):
        detector(decoder_layers=0)
    with pytest.raises(InputError, match="normalizer is 'epoch'"):
        detector(normalizer="epoch")
    with pytest.raises(InputError, match="8 features do not divide into 3 heads"):
        jax.eval_shape(
            detector(heads=3).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
        )
