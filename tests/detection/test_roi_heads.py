"""The box, mask and keypoint heads: each operation against a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection.box_head import BoxHead
from cvjax.detection.deconvolution import Deconvolution
from cvjax.detection.keypoint_head import KeypointHead, heat_map_place, peaks
from cvjax.detection.mask_head import MaskHead, crop_masks, paste_masks
from cvjax.detection.sampling import Samples
from cvjax.errors import InputError

SIZE = (24, 30)
crop = jax.jit(crop_masks, static_argnames="size")
paste = jax.jit(paste_masks, static_argnames=("size", "threshold"))
place_of = jax.jit(heat_map_place, static_argnames="side")


def samples_of(boxes, index, foreground, valid):
    rows = np.zeros(len(boxes), np.int32)
    return Samples(
        rows, np.float32(boxes), np.int32(index), np.array(foreground, bool), np.array(valid, bool)
    )


# Boxes.

PROPOSALS = [[2, 3, 12, 17], [1, 1, 9, 20], [14, 2, 29, 12], [0, 0, 5, 5]]


def test_the_losses_of_the_box_head():
    rng = np.random.default_rng(0)
    head = BoxHead(num_classes=3)
    logits, deltas = rng.normal(size=(4, 4)), rng.normal(size=(4, 4, 4))
    truth = {"boxes": np.float32([[3, 4, 11, 19], [15, 1, 28, 13]]), "box_label": np.array([2, 0])}
    samples = samples_of(PROPOSALS, [0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0])
    outputs = {"logits": np.float32(logits), "deltas": np.float32(deltas)}
    entropy = steps = 0
    for row, label in ((0, 3), (1, 0), (2, 1)):
        entropy -= np.log(np.exp(logits[row, label]) / np.exp(logits[row]).sum())
        if label:
            (x1, y1, x2, y2), (u1, v1, u2, v2) = PROPOSALS[row], truth["boxes"][row // 2]
            w, h = x2 - x1, y2 - y1
            target = [10 * ((u1 + u2) - (x1 + x2)) / 2 / w, 10 * ((v1 + v2) - (y1 + y2)) / 2 / h,
                      5 * np.log((u2 - u1) / w), 5 * np.log((v2 - v1) / h)]  # fmt: skip
            away = np.abs(target - deltas[row, label])
            steps += np.where(away < 1 / 9, away**2 * 9 / 2, away - 1 / 18).sum()
    found = jax.jit(head.losses)(outputs, samples, truth)
    np.testing.assert_allclose(found["classification"], [entropy, 3], rtol=1e-5)
    np.testing.assert_allclose(found["box"], [steps, 3], rtol=1e-5)


def test_detections_are_those_of_the_slow_loop():
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 20, (14, 2))
    proposals = np.float32(np.concatenate([corner, corner + rng.uniform(4, 12, (14, 2))], -1))
    proposals[7] = proposals[3] = proposals[2]
    valid = np.arange(14) < 12
    outputs = {
        "logits": np.float32(rng.normal(size=(14, 4))),
        "deltas": np.float32(rng.normal(size=(14, 4, 4), scale=0.6)),
    }
    outputs["logits"][13] = 0, 0, 90, 0  # Best of all, were it not padding.
    outputs["deltas"][5, 1:, :2] = 90  # beside the image
    head = BoxHead(num_classes=3, score=0.2, iou=0.3, outputs=20)
    found = jax.tree.map(
        np.asarray, jax.jit(lambda *x: head.detections(*x, SIZE))(outputs, proposals, valid)
    )
    expected = []
    for label in range(3):
        alive = []
        share = np.exp(np.float64(outputs["logits"]))
        share = share[:, label + 1] / share.sum(1)
        for row in np.argsort(-share):
            x1, y1, x2, y2 = np.float64(proposals[row])
            dx, dy, dw, dh = outputs["deltas"][row, label + 1] / [10, 10, 5, 5]
            w, h = x2 - x1, y2 - y1
            x, y = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
            w, h = w * np.exp(dw), h * np.exp(dh)
            box = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, [30, 24, 30, 24])
            if row >= 12 or share[row] <= 0.2 or min(box[2:] - box[:2]) <= 0:
                continue
            if all(_iou(box, other) <= 0.3 for _, other, _ in alive):
                alive.append((share[row], box, label))
        expected += alive
    assert 5 < len(expected) < 20
    expected.sort(key=lambda one: -one[0])
    count = found["detected"].sum()
    assert count == len(expected) and found["detected"][:count].all()
    np.testing.assert_allclose(found["scores"][:count], [one[0] for one in expected], rtol=1e-5)
    np.testing.assert_allclose(found["boxes"][:count], [one[1] for one in expected], atol=1e-4)
    np.testing.assert_array_equal(found["labels"][:count], [one[2] for one in expected])
    assert not found["boxes"][count:].any() and not found["scores"][count:].any()


def _iou(a, b):
    inside = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return inside / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inside)


def test_the_box_head_reads_channels_first():
    """fc6 of published weights has columns in the order channel, row, column."""
    head = BoxHead(num_classes=2, features=5, size=2)
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)
    out, variables = jax.jit(head.init_with_output)(jax.random.key(0), x)
    params = variables["params"]
    kernel = np.asarray(params["fc6"]["kernel"]).T.reshape(5, 4, 2, 2)  # as torch has it
    y = np.maximum(np.einsum("ncij,fcij->nf", x.transpose(0, 3, 1, 2), kernel), 0)
    y = np.maximum(y @ params["fc7"]["kernel"], 0)
    np.testing.assert_allclose(out["logits"], y @ params["cls_score"]["kernel"], atol=1e-5)
    deltas = (y @ params["bbox_pred"]["kernel"]).reshape(3, 3, 4)
    np.testing.assert_allclose(out["deltas"], deltas, atol=1e-6)


# The transposed convolution.


@pytest.mark.parametrize("kernel", [2, 4, 6, 8])
def test_the_transposed_convolution_pixel_by_pixel(kernel):
    rng = np.random.default_rng(kernel)
    x, weight = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(kernel, kernel, 5, 3))
    bias = rng.normal(size=3)
    layer = Deconvolution(3, kernel)
    params = {"kernel": np.float32(weight), "bias": np.float32(bias)}
    found = jax.jit(layer.apply)({"params": params}, np.float32(x))
    whole = np.zeros((2, 2 * 4 + kernel - 2, 2 * 3 + kernel - 2, 3))
    for i in range(4):
        for j in range(3):
            stamp = np.einsum("nc,yxcf->nyxf", x[:, i, j], weight)
            whole[:, 2 * i : 2 * i + kernel, 2 * j : 2 * j + kernel] += stamp
    cut = kernel // 2 - 1
    whole = whole[:, cut : cut + 8, cut : cut + 6] + bias
    np.testing.assert_allclose(found, whole, atol=1e-4)
    with pytest.raises(InputError, match="kernel is 3"):
        Deconvolution(3, 3)


# Masks.

BOXES = np.float32(
    [[2, 3, 18, 19], [2.25, 3.5, 9.25, 22.75], [-6.5, -4, 11.5, 9], [20.5, 10, 44, 31],
     [11.25, 8.5, 11.75, 9.25], [5, 5, 5, 9], [40, 3, 60, 9], [9, 9, 3, 4]]
)  # fmt: skip


def test_a_cell_of_a_cropped_mask_is_the_share_of_it_that_is_covered():
    """Exactly: boxes at quarters of pixels, cells at 16ths, so that fine pixels can be counted."""
    rng = np.random.default_rng(0)
    masks, fine, cells = rng.random((3, *SIZE)) < 0.5, 16, 4
    index = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    found = crop(masks, index, BOXES, cells)
    around = 40  # pixels of nothing on all sides
    for row, (x1, y1, x2, y2) in enumerate(BOXES):
        big = np.pad(masks[index[row]], around).repeat(fine, 0).repeat(fine, 1)
        expected = np.zeros((cells, cells))
        for i in range(cells):
            for j in range(cells):
                top, bottom = ((y1 + (y2 - y1) * k / cells + around) * fine for k in (i, i + 1))
                left, right = ((x1 + (x2 - x1) * k / cells + around) * fine for k in (j, j + 1))
                part = big[round(top) : round(bottom), round(left) : round(right)]
                expected[i, j] = part.mean() if part.size else 0
        np.testing.assert_allclose(found[row], expected, atol=1e-5, err_msg=str(row))


def pasted(mask, box, height, width):
    cells, (x1, y1, x2, y2) = len(mask), np.float64(box)
    padded, out = np.pad(np.float64(mask), 2), np.zeros((height, width))
    if x2 <= x1 or y2 <= y1:
        return out
    for i in range(height):
        for j in range(width):
            y, x = (
                (i + 0.5 - y1) / (y2 - y1) * cells - 0.5,
                (j + 0.5 - x1) / (x2 - x1) * cells - 0.5,
            )
            if min(x, y) > -1 and max(x, y) < cells:
                a, b = int(np.floor(y)), int(np.floor(x))
                v, u = y - a, x - b
                window = padded[a + 2 : a + 4, b + 2 : b + 4]
                out[i, j] = [1 - v, v] @ window @ [1 - u, u]
    return out


def test_masks_are_pasted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    masks = rng.random((len(BOXES), 5, 5)).astype(np.float32)
    found = paste(masks, BOXES, SIZE, 0.4)
    for row, box in enumerate(BOXES):
        value = pasted(masks[row], box, *SIZE)
        np.testing.assert_array_equal(found[row], value >= 0.4, err_msg=str(row))
    assert found[0].any() and not found[5:].any()


def test_what_is_exactly_at_the_threshold_belongs():
    """To the mask that is pasted, and to that which a cell is told."""
    masks = np.full((1, 2, 2), np.float32(0.5))
    assert paste(masks, np.float32([[2, 2, 6, 6]]), (8, 8), 0.5)[0, 3:5, 3:5].all()
    half = np.zeros((1, 4, 4), bool)
    half[0, :, :2] = True
    samples = samples_of([[0, 0, 4, 4]], [0], [1], [1])
    truth = {"masks": half, "box_label": np.zeros(1, int)}
    logits = np.full((1, 1, 1, 2), np.float32(3))
    loss, _ = jax.jit(MaskHead(1).losses)(logits, samples, truth)["mask"]
    np.testing.assert_allclose(loss, np.log1p(np.exp(-3.0)), rtol=1e-5)


@pytest.mark.parametrize("size", [(24, 24), (13, 20), (7, 29)])
def test_a_mask_that_is_cropped_and_pasted_is_itself(size):
    """Of a rectangle that fills its box; and of any shape where a cell is a pixel."""
    height, width = size
    full = np.zeros((1, 40, 40), bool)
    full[0, 6 : 6 + height, 4 : 4 + width] = True
    box = np.float32([[4, 6, 4 + width, 6 + height]])
    masks = crop(full, np.array([0]), box, 28)
    np.testing.assert_array_equal(paste(masks, box, (40, 40), 0.5), full)
    any_shape = full & (np.random.default_rng(0).random((1, 40, 40)) < 0.5)
    box = np.float32([[4, 6, 32, 34]])
    masks = crop(any_shape, np.array([0]), box, 28)
    inside = any_shape & (np.arange(40) < 34)[:, None] & (np.arange(40) < 32)
    np.testing.assert_array_equal(paste(masks, box, (40, 40), 0.5), inside)


def test_the_loss_and_detections_of_the_mask_head():
    rng = np.random.default_rng(2)
    head = MaskHead(num_classes=2)
    outputs = np.float32(rng.normal(size=(3, 4, 4, 3)))
    truth = {"masks": rng.random((2, *SIZE)) < 0.6, "box_label": np.array([1, 0])}
    samples = samples_of(BOXES[:3], [1, 0, 0], [1, 1, 0], [1, 1, 1])
    expected = 0
    for row, index in ((0, 1), (1, 0)):
        target = (
            np.asarray(crop(truth["masks"], np.array([index]), BOXES[row : row + 1], 4))[0] >= 0.5
        )
        logit = np.float64(outputs[row, ..., truth["box_label"][index] + 1])
        p = 1 / (1 + np.exp(-logit))
        expected -= np.log(np.where(target, p, 1 - p)).mean()
    found = jax.jit(head.losses)(outputs, samples, truth)
    np.testing.assert_allclose(found["mask"], [expected, 2], rtol=1e-5)
    seen = {
        "boxes": BOXES[:3],
        "labels": np.array([1, 0, 0]),
        "detected": np.array([1, 1, 0], bool),
    }
    masks = jax.jit(lambda *x: head.detections(*x, SIZE))(outputs, seen)["masks"]
    p = 1 / (1 + np.exp(-np.float64(outputs)))
    for row, label in enumerate((1, 0)):
        value = pasted(p[row, ..., label + 1], BOXES[row], *SIZE)
        np.testing.assert_array_equal(masks[row], value >= 0.5)
    assert masks[0].any() and not masks[2].any() and masks.dtype == bool


# Keypoints.


def test_where_a_point_lies_in_its_map():
    box = [10.0, 20.0, 24.0, 34.0]  # cells of a quarter of a pixel
    cases = [  # x, y, visibility -> column, row or None
        (10, 20, 2, (0, 0)), (10.24, 20.26, 2, (0, 1)), (10.25, 20.5, 1, (1, 2)),
        (23.99, 33.9, 2, (55, 55)), (24, 34, 2, (55, 55)), (24, 27, 2, (55, 28)),
        (9.99, 27, 2, None), (24.01, 27, 2, None), (17, 34.01, 2, None), (17, 19.9, 2, None),
        (17, 27, 0, None), (np.inf, 27, 2, None), (-1e9, 1e9, 2, None),
    ]  # fmt: skip
    points = np.float32([case[:3] for case in cases])
    place, counts = place_of(points[None], np.float32([box]), 56)
    for found, seen, (*_, expected) in zip(place[0], counts[0], cases, strict=True):
        assert seen == (expected is not None)
        assert found == (expected[1] * 56 + expected[0] if expected else 0)
    _, counts = place_of(np.float32([[[5, 5, 2]]] * 2), np.float32([[5, 5, 5, 9], [9, 9, 3, 4]]), 8)
    assert not counts.any()


def test_the_loss_of_the_keypoint_head():
    rng = np.random.default_rng(0)
    outputs = np.float32(rng.normal(size=(3, 4, 4, 2)))
    truth = {"keypoints": np.float32([[[3, 4, 2], [7, 9, 0]], [[5, 6, 1], [6, 3, 2]]])}
    boxes = np.float32([[1, 2, 9, 10], [2, 2, 10, 10], [0, 0, 9, 9]])
    samples = samples_of(boxes, [0, 1, 1], [1, 1, 0], [1, 1, 1])
    expected = 0
    for row, point, x, y in ((0, 0, 3, 4), (1, 0, 5, 6), (1, 1, 6, 3)):
        logit = np.float64(outputs[row, ..., point])
        column, line = int((x - boxes[row, 0]) / 2), int((y - boxes[row, 1]) / 2)
        expected -= np.log(np.exp(logit[line, column]) / np.exp(logit).sum())
    found = jax.jit(KeypointHead(2).losses)(outputs, samples, truth)
    np.testing.assert_allclose(found["keypoints"], [expected, 3], rtol=1e-5)


def bicubic(values, at):
    """The cubic convolution of one row [s] at one place, the border continued; a = -0.75."""
    first, total = int(np.floor(at)), 0.0
    for i in range(first - 1, first + 3):
        d = abs(at - i)
        if d <= 1:
            weight = 1.25 * d**3 - 2.25 * d**2 + 1
        else:
            weight = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        total += weight * values[min(max(i, 0), len(values) - 1)]
    return total


def test_peaks_are_found_pixel_by_pixel():
    rng = np.random.default_rng(0)
    boxes = np.float32([[2, 3, 18, 19], [2.25, 3.5, 9.5, 22.75], [0, 0, 30, 24], [4, 4, 4, 4.5]])
    maps = np.float32(rng.normal(size=(4, 6, 6, 2)))
    maps[0, ..., 1] = 0  # a tie
    found = jax.jit(peaks, static_argnums=2)(maps, boxes, SIZE)
    for row, (x1, y1, x2, y2) in enumerate(np.float64(boxes)):
        w, h = max(x2 - x1, 1), max(y2 - y1, 1)
        wide, high = int(np.ceil(w)), int(np.ceil(h))
        for point in range(2):
            best = -np.inf
            for i in range(high):
                for j in range(wide):
                    lines = [
                        bicubic(line, (j + 0.5) * 6 / wide - 0.5) for line in maps[row, ..., point]
                    ]
                    value = bicubic(lines, (i + 0.5) * 6 / high - 0.5)
                    if value > best + 1e-5:
                        best, place = value, (x1 + (j + 0.5) * w / wide, y1 + (i + 0.5) * h / high)
            if (row, point) == (0, 1):
                np.testing.assert_allclose(found[row, point], (x1 + 0.5, y1 + 0.5), atol=1e-4)
            else:
                np.testing.assert_allclose(found[row, point], place, atol=1e-4)


def test_an_encoded_point_is_found_again():
    """Of a heat map with a smooth peak in the true cell, within half a cell and half a pixel."""
    rng = np.random.default_rng(0)
    box, side = np.float32([[3, 2, 27.5, 22.25]]), 56
    extent = box[0, 2:] - box[0, :2]
    points = np.concatenate([rng.uniform((3, 2), (27.5, 22.25), (20, 2)), np.full((20, 1), 2)], 1)
    place, counts = place_of(np.float32(points)[None], box, side)
    assert counts.all()
    row, column = np.divmod(np.asarray(place[0]), side)
    y, x = np.mgrid[:side, :side][..., None]
    maps = np.float32(-((y - row) ** 2 + (x - column) ** 2) / 8)[None]
    seen = {"boxes": box, "detected": np.array([True])}
    detect = jax.jit(lambda maps, seen: KeypointHead(20).detections(maps, seen, SIZE))
    found = np.asarray(detect(maps, seen)["keypoints"])[0]
    away = np.abs(found[:, :2] - points[:, :2])
    assert (away <= 0.5 * extent / side + 0.5 * extent / np.ceil(extent) + 1e-4).all()
    share = np.exp(maps[0]).reshape(-1, 20)
    np.testing.assert_allclose(found[:, 2], (share / share.sum(0)).max(0), rtol=1e-4)


def test_the_heads_have_the_layers_of_torchvision():
    for head, expected in (
        (MaskHead(90), {"mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4", "conv5_mask",
                        "mask_fcn_logits"}),
        (KeypointHead(17), {*(f"conv_fcn{i}" for i in range(1, 9)), "kps_score_lowres"}),
        (BoxHead(90), {"fc6", "fc7", "cls_score", "bbox_pred"}),
    ):  # fmt: skip
        x = jnp.zeros((2, head.size, head.size, 256))
        outputs, variables = jax.eval_shape(
            lambda x, h=head: h.init_with_output(jax.random.key(0), x), x
        )
        assert set(variables["params"]) == expected
        shapes = {
            "MaskHead": (2, 28, 28, 91), "KeypointHead": (2, 56, 56, 17),
            "BoxHead": {"logits": (2, 91), "deltas": (2, 91, 4)},
        }  # fmt: skip
        assert jax.tree.map(jnp.shape, outputs) == shapes[type(head).__name__]
