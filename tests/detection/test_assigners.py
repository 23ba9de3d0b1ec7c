"""Assigners against loops over truths and anchors, scipy, and garbage in the padding."""

import functools

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from cvjax.detection import assigners, boxes, coders
from cvjax.detection.anchors import grid_anchors, grid_points
from cvjax.detection.heatmaps import centre_heatmap, gaussian_radius
from cvjax.detection.hungarian import detr_cost, hungarian
from cvjax.errors import InputError

ANCHORS = np.concatenate([
    grid_anchors(8, 8, 8, (16,), offset=0.5, rounded=False),
    grid_anchors(4, 4, 16, (32,), offset=0.5, rounded=False),
])  # fmt: skip
POINTS = np.concatenate([grid_points(8, 8, 8, offset=0.5), grid_points(4, 4, 16, offset=0.5)])
STRIDES = np.repeat(np.float32([8, 16]), [64, 16])
RANGES = np.repeat(np.float32([[0, 16], [16, 1e8]]), [64, 16], 0)
overlaps = jax.jit(boxes.iou)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(80, 3)).astype(np.float32)
PREDICTED = np.concatenate([POINTS - 12, POINTS + RNG.uniform(4, 20, (80, 2))], 1).astype("f")


def truth(seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 40, (6, 2))
    box = np.concatenate([low, low + rng.uniform(3, 40, (6, 2))], 1).astype(np.float32)
    box[1] = box[0]  # a tie
    box[2, 2:] = box[2, :2]  # no area
    return box, rng.integers(0, 3, 6), np.arange(6) < 5


def of_max_iou(box, label, valid):
    return assigners.max_iou(
        ANCHORS, box, valid, foreground=0.5, background=0.3, low_quality=True
    )  # fmt: skip


def of_atss(box, label, valid):
    return assigners.atss(ANCHORS, box, valid, (192, 48))


def of_fcos(box, label, valid):
    return assigners.fcos(POINTS, box, valid, RANGES, STRIDES)


def of_sim_ota(box, label, valid):
    return assigners.sim_ota(POINTS, STRIDES, box, label, valid, LOGITS, PREDICTED)


def of_centres(box, label, valid):
    return centre_heatmap(box, label, valid, height=16, width=15, stride=4, num_classes=3)[1]


def of_hungarian(box, label, valid):
    return hungarian(detr_cost(LOGITS, PREDICTED / 64, box / 64, label), valid)


@functools.cache
def compiled(assign):
    return jax.jit(jax.vmap(assign))


def assigned(assign, box, label, valid, other=slice(None)):
    """Of the second image of two, behind one whose valid rows are those that are padding here."""
    both = compiled(assign)(
        np.stack([box[other], box]), np.stack([label, label]), np.stack([~valid, valid])
    )
    return jax.tree.map(lambda x: np.asarray(x)[1], both)


ALL = [of_max_iou, of_atss, of_fcos, of_sim_ota, of_centres, of_hungarian]


@pytest.mark.parametrize("assign", ALL)
def test_padding_empty_and_batches(assign):
    box, label, valid = truth(0)
    clean = assigned(assign, box, label, valid)
    assert clean.foreground.any() and clean.index.dtype == np.int32
    assert not np.any(clean.index[~clean.foreground])
    assert valid[clean.index[clean.foreground]].all()
    for junk in (np.nan, np.inf, -np.inf):
        dirty, odd = box.copy(), label.copy()
        dirty[~valid], odd[~valid] = junk, 10**6
        jax.tree.map(np.testing.assert_array_equal, clean, assigned(assign, dirty, odd, valid))
    nobody = assigned(assign, box * np.nan, label, valid & False)
    assert not nobody.foreground.any() and (nobody.weight == 1).all()
    assert not np.any(jax.jit(assign)(box[:0], label[:0], valid[:0]).foreground)
    turned = assigned(assign, box, label, valid, other=slice(None, None, -1))
    jax.tree.map(np.testing.assert_array_equal, clean, turned)


@jax.jit
def there_and_back(box, anchors):
    return coders.decode_deltas(coders.encode_deltas(box, anchors), anchors)


@pytest.mark.parametrize("seed", range(4))
def test_max_iou(seed):
    box, label, valid = truth(seed)
    out, overlap = assigned(of_max_iou, box, label, valid), np.asarray(overlaps(box, ANCHORS))
    for k in range(len(ANCHORS)):
        column = [overlap[i, k] for i in range(5)]
        saved = any(column[i] == overlap[i].max() > 0 for i in range(5))
        if max(column) >= 0.5 or saved:
            assert out.foreground[k] and out.index[k] == int(np.argmax(column))
        else:
            assert not out.foreground[k] and out.weight[k] == (max(column) < 0.3)
    # What the matched truth is encoded to gives it back.
    back = np.asarray(there_and_back(box[out.index], ANCHORS))[out.foreground]
    np.testing.assert_allclose(back, box[out.index][out.foreground], atol=1e-4)
    with pytest.raises(InputError, match="background"):
        assigners.max_iou(ANCHORS, box, valid, foreground=0.3, background=0.4, low_quality=True)


def test_max_iou_at_its_thresholds():
    anchors = np.float32([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2.5], [0, 0, 10, 2]])
    out = jax.jit(functools.partial(
        assigners.max_iou, foreground=0.5, background=0.25, low_quality=False
    ))(anchors, anchors[:1], np.ones(1, bool))  # fmt: skip
    assert out.foreground.tolist() == [True, True, False, False]
    assert out.weight.tolist() == [1, 1, 0, 1]


def test_without_anchors_nobody_is_assigned():
    box, _, valid = truth(0)
    for low_quality in (False, True):
        out = assigners.max_iou(
            np.zeros((0, 4)), box, valid, foreground=0.5, background=0.3, low_quality=low_quality
        )
        assert out.index.shape == out.weight.shape == out.foreground.shape == (0,)


@pytest.mark.parametrize("seed", range(4))
def test_atss(seed):
    box, label, valid = truth(seed)
    out, overlap = assigned(of_atss, box, label, valid), np.asarray(overlaps(box, ANCHORS))
    centre = (ANCHORS[:, :2] + ANCHORS[:, 2:]) / 2
    best = np.zeros(len(ANCHORS)) - 1
    index = np.zeros(len(ANCHORS), int)
    for i in range(5):
        away = ((centre - (box[i, :2] + box[i, 2:]) / 2) ** 2).sum(-1)
        near = [a + np.argsort(away[a:b], kind="stable")[:9] for a, b in ((0, 192), (192, 240))]
        near = np.concatenate(near)
        threshold = overlap[i, near].mean() + overlap[i, near].std(ddof=1)
        for k in near:
            inside = (box[i, :2] < centre[k]).all() and (centre[k] < box[i, 2:]).all()
            if inside and overlap[i, k] >= threshold and overlap[i, k] > best[k]:
                best[k], index[k] = overlap[i, k], i
    np.testing.assert_array_equal(out.foreground, best > -1)
    np.testing.assert_array_equal(out.index, index)


def test_for_atss_a_centre_on_a_side_is_not_inside():
    anchors, box = np.float32([[-4, 0, 4, 8], [4, 0, 12, 8]]), np.float32([[0, 0, 8, 8]])
    out = jax.jit(lambda box: assigners.atss(anchors, box, np.ones(1, bool), (2,)))(box)
    assert not out.foreground.any()


def test_atss_with_equal_overlaps_has_all_of_them():
    """The threshold is then what all of them have, but for the rounding of the mean."""
    anchors = grid_anchors(16, 16, 8, (8,), offset=0.5, rounded=False)
    assign = jax.jit(lambda box: assigners.atss(anchors, box, np.ones(1, bool), (len(anchors),)))
    rng = np.random.default_rng(0)
    for _ in range(40):
        corner, side = rng.uniform(0, 60, 2), rng.uniform(40, 60)
        box = np.float32([[*corner, *(corner + side)]])
        count = assign(box).foreground.sum()
        assert count == 9, (box, count)


@pytest.mark.parametrize("seed", range(4))
def test_fcos(seed):
    box, label, valid = truth(seed)
    out = assigned(of_fcos, box, label, valid)
    for k, (x, y) in enumerate(POINTS):
        best = None
        for i in range(5):
            x1, y1, x2, y2 = box[i]
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            fits = min(sides) > 0 and RANGES[k, 0] <= max(sides) <= RANGES[k, 1]
            fits &= max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * STRIDES[k]
            size = (x2 - x1) * (y2 - y1)
            if fits and (best is None or size < best[0]):
                best = size, i
        assert out.foreground[k] == (best is not None)
        assert out.index[k] == (best[1] if best else 0)


def test_fcos_at_its_borders():
    """Of ranges the ends count, of the box and of its middle they do not."""
    box = np.float32([[0, 0, 8, 8]])
    run = jax.jit(
        functools.partial(assigners.fcos, strides=np.float32([2])), static_argnames="radius"
    )
    for point, ends, radius, expected in (
        ((4, 4), (0, 4), 1.5, True), ((4, 4), (4, 9), 1.5, True), ((4, 4), (4.1, 9), 1.5, False),
        ((6, 4), (0, 99), 1.0, False), ((0, 4), (0, 99), None, False),
        ((7, 1), (0, 99), None, True), ((7, 1), (0, 99), 1.5, False),
    ):  # fmt: skip
        out = run(np.float32([point]), box, np.ones(1, bool), np.float32([ends]), radius=radius)
        assert out.foreground.tolist() == [expected], (point, ends, radius)


@pytest.mark.parametrize("seed", range(4))
def test_sim_ota(seed):
    box, label, valid = truth(seed)
    out, overlap = assigned(of_sim_ota, box, label, valid), np.asarray(overlaps(box, PREDICTED))
    p = 1 / (1 + np.exp(-LOGITS.astype(float)))
    taken = {}
    for i in range(5):
        middle = (box[i, :2] + box[i, 2:]) / 2
        cost, ious = {}, []
        for k, point in enumerate(POINTS):
            inside = (box[i, :2] < point).all() and (point < box[i, 2:]).all()
            central = np.abs(point - middle).max() < 2.5 * STRIDES[k]
            if inside or central:
                target = np.arange(3) == label[i]
                entropy = -np.log(np.where(target, p[k], 1 - p[k])).sum()
                cost[k] = entropy - 3 * np.log(overlap[i, k] + 1e-8)
                cost[k] += 0 if inside and central else 1e5
                ious.append(overlap[i, k])
        count = max(1, int(sum(sorted(ious)[-10:])))
        for k in sorted(cost, key=cost.get)[:count]:
            if k not in taken or cost[k] < taken[k][0]:
                taken[k] = cost[k], i
    assert set(np.flatnonzero(out.foreground)) == set(taken)
    # Rows 0 and 1 are the same box: with the same label either is right.
    for k, (_, i) in taken.items():
        got = int(out.index[k])
        assert got == i or ({got, i} == {0, 1} and label[0] == label[1])


solve = jax.jit(hungarian)


@pytest.mark.parametrize("kind", ["normal", "ties", "huge", "shifted"])
def test_hungarian_is_exact(kind):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cost = rng.normal(size=(7, 9))
        cost = {"normal": cost, "ties": rng.integers(0, 3, (7, 9)), "huge": cost * 1e20,
                "shifted": cost - 50}[kind].astype(np.float32)  # fmt: skip
        valid = rng.random(7) < 0.7
        out = jax.tree.map(np.asarray, solve(np.where(valid[:, None], cost, np.nan), valid))
        columns = np.flatnonzero(out.foreground)
        rows = out.index[columns]
        assert sorted(rows) == list(np.flatnonzero(valid))
        best = linear_sum_assignment(cost[valid])
        least = cost[valid].astype(float)[best].sum()
        np.testing.assert_allclose(cost.astype(float)[rows, columns].sum(), least, rtol=1e-5)
    with pytest.raises(InputError, match="truth"):
        hungarian(cost.T, np.ones(9, bool))


def test_hungarian_takes_arrays_of_numpy_outside_of_jit():
    out = hungarian(np.float32([[2, 1]]), np.ones(1, bool))
    assert out.foreground.tolist() == [False, True] and out.index.tolist() == [0, 0]


def test_hungarian_avoids_what_is_not_finite():
    cost = np.array([[np.nan, 5.0, 1.0], [np.inf, 9.0, 1.0]], np.float32)
    out = jax.tree.map(np.asarray, solve(cost, np.ones(2, bool)))
    assert list(out.foreground) == [False, True, True] and list(out.index) == [0, 0, 1]
    # At the limits of float32 it ends, too.
    cost = np.array([[3e38, -3e38, np.inf], [1, 2, np.inf], [0, -3e38, 3e38]], np.float32)
    assert solve(cost, np.ones(3, bool)).index.tolist() == [1, 0, 2]
    # It is worse than all others together.
    cost = np.float32([[10, np.inf], [-10, 10]])
    assert solve(cost, np.ones(2, bool)).index.tolist() == [0, 1]


def test_detr_cost():
    box, label, _ = truth(1)
    box = np.abs(box) / 100
    out = np.asarray(jax.jit(detr_cost)(LOGITS, PREDICTED / 64, box, label))
    p = np.exp(LOGITS[7]) / np.exp(LOGITS[7]).sum()
    ends = [
        np.concatenate([v[:2] - v[2:] / 2, v[:2] + v[2:] / 2]) for v in (box[3], PREDICTED[7] / 64)
    ]
    overlap = jax.jit(boxes.paired_giou)(*ends)
    expected = -p[label[3]] + 5 * np.abs(box[3] - PREDICTED[7] / 64).sum() - 2 * overlap
    np.testing.assert_allclose(out[3, 7], expected, rtol=1e-5)


def test_gaussian_radius():
    radius, iou = jax.jit(gaussian_radius), jax.jit(boxes.paired_iou)
    for height, width in ((10.0, 20.0), (3.0, 50.0), (7.0, 7.0)):
        r = float(radius(height, width))

        def overlaps(r, height=height, width=width):
            whole = np.array([0, 0, width, height], np.float32)
            moves = np.array([[r, r, r, r], [r, r, -r, -r], [-r, -r, r, r]], np.float32)
            return float(np.min(iou(whole, whole + moves)))

        np.testing.assert_allclose(overlaps(r), 0.7, atol=1e-4)
    np.testing.assert_allclose(overlaps(float(radius(height, width, 0.5))), 0.5, atol=1e-4)


def test_heatmap():
    box = np.array([[8, 8, 40, 32], [20, 4, 60, 60], [500, 0, 600, 9], [9, 9, 9, 9]], np.float32)
    make = jax.jit(functools.partial(centre_heatmap, height=16, width=15, stride=4, num_classes=2))
    heat, out = jax.tree.map(np.asarray, make(box, np.array([0, 0, 1, 1]), np.ones(4, bool)))
    radius = jax.jit(gaussian_radius)
    expected = np.zeros((16, 15))
    for row in range(2):
        x1, y1, x2, y2 = box[row] / 4
        x, y = int((x1 + x2) / 2), int((y1 + y2) / 2)
        r = int(radius(y2 - y1, x2 - x1))
        for j in range(max(0, y - r), min(16, y + r + 1)):
            for i in range(max(0, x - r), min(15, x + r + 1)):
                bump = np.exp(-((i - x) ** 2 + (j - y) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                expected[j, i] = max(expected[j, i], bump)
        assert heat[y, x, 0] == 1 and out.foreground[y * 15 + x] and out.index[y * 15 + x] == row
    np.testing.assert_allclose(heat[..., 0], expected, atol=1e-6)
    assert not heat[..., 1].any() and out.foreground.sum() == 2


def test_centres_beside_the_map_have_no_cell_and_the_first_of_two_has_it():
    box = [[-12, -12, -2, -2], [0, 70, 10, 90], [-9, 20, -1, 30], [8, 8, 16, 16], [7, 7, 17, 17]]
    make = jax.jit(functools.partial(centre_heatmap, height=16, width=15, stride=4, num_classes=1))
    for first in (3, 4):
        order = [0, 1, 2, first, 7 - first]
        heat, out = make(np.float32(box)[order], np.zeros(5, int), np.ones(5, bool))
        assert np.flatnonzero(out.foreground).tolist() == [3 * 15 + 3] and heat[3, 3, 0] == 1
        assert out.index[3 * 15 + 3] == 3
        beside = np.arange(5) < 3
        heat, _ = make(np.float32(box)[order], np.zeros(5, int), beside)
        assert not heat.any()
