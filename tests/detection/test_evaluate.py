"""Average precision against the tool of COCO where it is installed, and by known numbers."""

import numpy as np
import pytest

from cvjax.detection.evaluate import (
    PERSON_SIGMAS,
    CocoEvaluator,
    VocEvaluator,
    _match,
    keypoint_similarity,
    ragged,
    voc_average_precision,
)
from cvjax.errors import InputError

SIGMAS = (0.05, 0.07, 0.09)


def random_set(seed, images=6, n=7, m=12, size=160, classes=3):
    """Truth and noisy detections of it, of all sizes, with crowds, ties and empty images."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (images, n, 2)).round()
    boxes = np.concatenate([corner, corner + rng.uniform(3, 150, (images, n, 2)).round()], -1)
    valid = rng.random((images, n)) < 0.8
    valid[0] = False
    crowd = rng.random((images, n)) < 0.2
    points = rng.uniform(0, size, (images, n, 3, 3)).round()
    points[..., 2] = rng.integers(0, 3, (images, n, 3))
    pick = rng.integers(0, n, (images, m))
    rows = np.arange(images)[:, None]
    label = rng.integers(0, classes, (images, n))
    batch = {
        "boxes": boxes.astype(np.float32), "box_label": label.astype(np.int32),
        "box_valid": valid, "crowd": crowd, "keypoints": points.astype(np.float32),
        "masks": filled(boxes, size), "valid": np.ones(images, bool),
        "area": ((boxes[..., 2:] - boxes[..., :2]).prod(-1) * 0.8).astype(np.float32),
    }  # fmt: skip
    noise = rng.choice([0, 0, 1, 4, 15], (images, m, 1))
    found = boxes[rows, pick] + (rng.normal(size=(images, m, 4)) * noise).round()
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 1)
    spots = points[rows, pick] + (rng.normal(size=(images, m, 3, 3)) * noise[..., None]).round()
    detected = rng.random((images, m)) < 0.9
    detected[1] = False
    wrong = rng.random((images, m)) < 0.2
    outputs = {
        "boxes": found.astype(np.float32), "keypoints": spots.astype(np.float32),
        "scores": rng.integers(1, 12, (images, m)).astype(np.float32) / 12,
        "labels": np.where(wrong, 0, label[rows, pick]).astype(np.int32),
        "detected": detected, "masks": filled(found, size),
    }  # fmt: skip
    return outputs, batch


def filled(boxes, size):
    y, x = np.mgrid[:size, :size] + 0.5
    x1, y1, x2, y2 = (boxes[..., i, None, None] for i in range(4))
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def by_pycocotools(outputs, batch, kind, classes=3, sigmas=SIGMAS, first_id=1):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    mask = pytest.importorskip("pycocotools.mask")

    class Judge(cocoeval.COCOeval):
        """pycocotools forgets what shall be ignored but is no crowd."""

        def _prepare(self):
            super()._prepare()
            for one in (one for many in self._gts.values() for one in many):
                one["ignore"] = one["ignore"] or one["left_out"]

    def rle(array):
        return mask.encode(np.asfortranarray(array.astype(np.uint8)))

    def described(arrays, i, k, label):
        x1, y1, x2, y2 = arrays["boxes"][i, k].astype(float)
        one = {"image_id": int(i), "category_id": int(arrays[label][i, k])}
        if kind == "keypoints":
            one["keypoints"] = arrays["keypoints"][i, k].astype(float).ravel().tolist()
        if kind == "segm":
            return {**one, "segmentation": rle(arrays["masks"][i, k])}
        if kind == "bbox" or label == "box_label":
            one["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        return one

    truth = coco.COCO()
    annotations = []
    left_out = batch.get("ignore", np.zeros_like(batch["crowd"]))
    for i, k in np.argwhere(batch["box_valid"]):
        one = described(batch, i, k, "box_label")
        extra = {
            "id": len(annotations) + first_id, "iscrowd": int(batch["crowd"][i, k]),
            "area": float(batch["area"][i, k]), "left_out": bool(left_out[i, k]),
        }  # fmt: skip
        if kind == "keypoints":
            extra["num_keypoints"] = int((batch["keypoints"][i, k, :, 2] > 0).sum())
        annotations.append({**one, **extra})
    size = batch["masks"].shape[-1]
    truth.dataset = {
        "images": [{"id": i, "height": size, "width": size} for i in range(len(batch["valid"]))],
        "categories": [{"id": i} for i in range(classes)], "annotations": annotations, "info": {},
    }  # fmt: skip
    truth.createIndex()
    found = [
        {**described(outputs, i, k, "labels"), "score": float(outputs["scores"][i, k])}
        for i, k in np.argwhere(outputs["detected"])
    ]
    judge = Judge(truth, truth.loadRes(found), kind)
    if kind == "keypoints":
        judge.params.kpt_oks_sigmas = np.array(sigmas)
    judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge.stats


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "kind, part", [("bbox", "boxes"), ("segm", "masks"), ("keypoints", "keypoints")]
)
def test_the_numbers_are_those_of_pycocotools(kind, part, seed):
    outputs, batch = random_set(seed)
    evaluator = CocoEvaluator(3, parts=(part,), sigmas=SIGMAS)
    half = len(batch["valid"]) // 2
    for rows in (slice(0, half), slice(half, None)):
        evaluator.add(*({k: v[rows] for k, v in d.items()} for d in (outputs, batch)))
    # Equal but for the order of sums in double precision.
    found = list(evaluator.result().values())
    np.testing.assert_allclose(found, by_pycocotools(outputs, batch, kind), atol=1e-9)


def ties(outputs, batch):
    outputs["scores"][:] = 0.5


def twins(outputs, batch):
    """Each truth is there twice, at one place."""
    for name in ("boxes", "masks", "keypoints", "box_label", "area"):
        batch[name][:, 1::2] = batch[name][:, : 2 * (batch[name].shape[1] // 2) : 2]


def only_crowds(outputs, batch):
    batch["crowd"][:] = True


def ignored(outputs, batch):
    batch["ignore"] = np.random.default_rng(5).random(batch["crowd"].shape) < 0.4


def all_ignored(outputs, batch):
    batch["ignore"] = np.ones_like(batch["crowd"])


def one_class_never_found(outputs, batch):
    outputs["detected"] &= outputs["labels"] != 1


def one_class_never_there(outputs, batch):
    batch["box_valid"] &= batch["box_label"] != 2


def images_without_truth(outputs, batch):
    batch["box_valid"][::2] = False


def images_without_detections(outputs, batch):
    outputs["detected"][1:] = False


def areas_on_the_border(outputs, batch):
    """32 x 32 is small and medium, 96 x 96 medium and large; found exactly, or not at all."""
    side = np.where(np.arange(batch["boxes"].shape[1]) % 2, 32.0, 96.0)[:, None]
    corner = batch["boxes"][..., :2] % 60
    batch["boxes"] = np.concatenate([corner, corner + side], -1).astype(np.float32)
    batch["masks"] = filled(batch["boxes"], 160)
    batch["area"][:] = side[:, 0] ** 2
    rows, pick = np.arange(len(corner))[:, None], np.arange(outputs["boxes"].shape[1]) % 7
    for name in ("boxes", "masks", "keypoints"):
        outputs[name] = batch[name][rows, pick]
    outputs["labels"] = batch["box_label"][rows, pick]
    outputs["boxes"][:, ::3] += np.float32(70)
    outputs["masks"][:, ::3] = filled(outputs["boxes"][:, ::3], 160)


def no_area_and_no_size(outputs, batch):
    batch["area"][:, ::2] = 0
    outputs["boxes"][:, ::2, 2:] = outputs["boxes"][:, ::2, :2]
    outputs["masks"][:, ::2] = False


NASTY = (
    ties, twins, only_crowds, ignored, all_ignored, one_class_never_found, one_class_never_there,
    images_without_truth, images_without_detections, areas_on_the_border, no_area_and_no_size,
)  # fmt: skip


@pytest.mark.parametrize("change", NASTY, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "kind, part", [("bbox", "boxes"), ("segm", "masks"), ("keypoints", "keypoints")]
)
def test_the_numbers_are_those_of_pycocotools_where_it_is_nasty(kind, part, change):
    outputs, batch = random_set(7)
    change(outputs, batch)
    evaluator = CocoEvaluator(3, parts=(part,), sigmas=SIGMAS)
    evaluator.add(outputs, batch)
    found = list(evaluator.result().values())
    np.testing.assert_allclose(found, by_pycocotools(outputs, batch, kind), atol=1e-9)


@pytest.mark.parametrize("kind, part", [("bbox", "boxes"), ("keypoints", "keypoints")])
def test_more_detections_than_count(kind, part):
    """The 100 (20) best of each class and image: those that follow find nothing."""
    outputs, batch = random_set(2, images=2, n=9, m=400, classes=2)
    batch["box_valid"][:] = outputs["detected"][:] = True
    outputs["scores"] = np.random.default_rng(0).random(outputs["scores"].shape, np.float32)
    evaluator = CocoEvaluator(3, parts=(part,), sigmas=SIGMAS)
    evaluator.add(outputs, batch)
    found = list(evaluator.result().values())
    np.testing.assert_allclose(found, by_pycocotools(outputs, batch, kind), atol=1e-9)
    per_label = [(outputs["labels"] == label).sum(axis=1).min() for label in range(2)]
    assert min(per_label) > 100, "both limits are passed"


def test_a_point_that_is_not_annotated_may_be_anything():
    points = np.array([[[5, 5, 2], [np.nan, np.nan, 0], [9, 9, 2]]])
    box, area = np.array([[4.0, 4.0, 10.0, 10.0]]), np.array([36.0])
    found = np.array([[[5, 5, 1], [1, 1, 1], [9, 9, 1]]])
    np.testing.assert_array_equal(keypoint_similarity(found, points, box, area, (0.1,) * 3), 1.0)
    with pytest.raises(InputError, match=r"sigmas\[1\] is 0.0; it must be above 0"):
        CocoEvaluator(3, parts=("keypoints",), sigmas=(0.1, 0.0))
    with pytest.raises(InputError, match="threshold is nan; it must be in"):
        VocEvaluator(3, threshold=float("nan"))


def test_seventeen_points_have_the_sigmas_of_coco():
    outputs, batch = random_set(4)
    for arrays in (outputs, batch):
        more = np.random.default_rng(1).uniform(-3, 3, (*arrays["keypoints"].shape[:2], 17, 3))
        arrays["keypoints"] = (arrays["keypoints"].repeat(6, axis=2)[:, :, :17] + more).round()
        arrays["keypoints"] = np.maximum(arrays["keypoints"], 0).astype(np.float32)
    evaluator = CocoEvaluator(3, parts=("keypoints",))
    evaluator.add(outputs, batch)
    found = list(evaluator.result().values())
    expected = by_pycocotools(outputs, batch, "keypoints", sigmas=PERSON_SIGMAS)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found[0] > 0.01


def test_the_first_annotation_counts_whatever_its_id():
    """Where ids begin with 0 pycocotools takes what matches that one for a false alarm."""
    outputs, batch = ({k: v[2:] for k, v in arrays.items()} for arrays in random_set(1))
    first = int(batch["box_valid"][0].argmax())
    batch["crowd"][0, first] = False
    outputs["boxes"][0, 0], outputs["labels"][0, 0] = (
        batch["boxes"][0, first],
        batch["box_label"][0, first],
    )
    outputs["scores"][0, 0] = outputs["detected"][0, 0] = True
    evaluator = CocoEvaluator(3)
    evaluator.add(outputs, batch)
    found = list(evaluator.result().values())
    np.testing.assert_allclose(found, by_pycocotools(outputs, batch, "bbox"), atol=1e-9)
    assert abs(found - by_pycocotools(outputs, batch, "bbox", first_id=0)).max() > 1e-3


def test_overlaps_that_differ_in_the_last_bit_are_no_tie():
    overlap = np.array([[0.7000000000000001, 0.7]])
    for crowd in ([False, False], [True, True]):
        ignored = np.array([crowd])
        is_match, _ = _match(np.repeat(overlap, 2, axis=0), ignored, np.zeros(2, bool))
        assert is_match[0, 0].tolist() == [True, True]
        taken_first = _match(overlap, np.array([[False, True]]), np.zeros(2, bool))[1]
        assert not taken_first[0, 0, 0], "the one that counts is better and taken"
    only_second = _match(
        np.array([[0.7, 0.7000000000000001]]), np.array([[False, True]]), np.zeros(2, bool)
    )
    assert not only_second[1][0, 0, 0], "one that counts goes before a better one that does not"
    # The second detection fits the second truth alone: the first must have left it.
    rows = np.array([[0.7000000000000001, 0.7], [0.1, 0.6]])
    assert _match(rows, np.zeros((1, 2), bool), np.zeros(2, bool))[0][0, 0].tolist() == [True, True]


@pytest.mark.parametrize("scale", [0.37, 3.0])
def test_resized_images_give_the_numbers_of_the_annotated_ones(scale):
    """Small, medium and large are meant in the pixels in which the truth was drawn."""
    outputs, batch = random_set(8)
    # In float32 a resized box is another one in the last bits: no overlap may be at a threshold.
    for arrays in (outputs, batch):
        noise = np.random.default_rng(3).uniform(0, 0.4, arrays["boxes"].shape)
        arrays["boxes"] = arrays["boxes"] + noise.astype(np.float32)
    evaluator = CocoEvaluator(3, parts=("boxes", "keypoints"), sigmas=SIGMAS)
    expected = [*by_pycocotools(outputs, batch, "bbox")]
    expected += [*by_pycocotools(outputs, batch, "keypoints")]
    for arrays in (outputs, batch):
        arrays["boxes"] = (arrays["boxes"] * scale).astype(np.float32)
        arrays["keypoints"] = arrays["keypoints"] * np.array([scale, scale, 1], np.float32)
    batch["area"] = (batch["area"] * scale**2).astype(np.float32)
    batch["scale"] = np.full(len(batch["valid"]), scale, np.float32)
    evaluator.add(outputs, batch)
    np.testing.assert_allclose([*evaluator.result().values()], expected, atol=1e-6)
    assert -1 not in expected and 0 not in expected


def test_each_class_in_a_table():
    outputs, batch = random_set(3)
    evaluator = CocoEvaluator(4, ("boxes", "masks"), class_names=("cat", "dog", "hen", "never"))
    evaluator.add(outputs, batch)
    table = evaluator.table()
    assert list(table) == [
        "class", "box AP", "box AP50", "box AR", "mask AP", "mask AP50", "mask AR",
    ]  # fmt: skip
    assert table["class"] == ["cat", "dog", "hen", "never"]
    assert table["box AP"] == evaluator.per_class() and table["mask AR"][3] == -1
    for column, name in (("box AP", "box_AP"), ("box AP50", "box_AP50"), ("box AR", "box_AR_100")):
        assert np.mean(table[column][:3]) == pytest.approx(evaluator.result()[name])
    picture = evaluator.pictures()["coco_classes"]
    assert picture.ndim == 3 and picture.min() == 0 and picture.max() == 1
    assert CocoEvaluator(2).table()["class"] == ["0", "1"]
    with pytest.raises(InputError, match="1 class_names are fewer than num_classes=2"):
        CocoEvaluator(2, class_names=("cat",))


def test_flags_may_be_numbers_and_what_is_missing_is_named():
    outputs, batch = random_set(6)
    evaluator, other = CocoEvaluator(3), CocoEvaluator(3)
    evaluator.add(outputs, batch)
    numbers = lambda arrays: {k: v.astype(int) if v.dtype == bool else v for k, v in arrays.items()}  # noqa: E731
    other.add(numbers(outputs), numbers(batch))
    assert other.result() == evaluator.result()
    for arrays, message in ((outputs, "the outputs have none"), (batch, "the batch have none")):
        given = [
            {k: v for k, v in one.items() if k != "masks" or one is not arrays}
            for one in (outputs, batch)
        ]
        with pytest.raises(InputError, match=f"parts has 'masks', but {message}"):
            CocoEvaluator(3, ("masks",)).add(*given)
    other = CocoEvaluator(3, ("masks",))
    other.add({name: value for name, value in outputs.items() if name != "boxes"}, batch)
    assert other.result()["mask_AP"] > 0


def one_image(truth, found, scores, **more):
    n, m = len(truth), len(found)
    batch = {
        "boxes": np.array(truth, np.float32).reshape(1, n, 4), "valid": np.ones(1, bool),
        "box_label": np.zeros((1, n), np.int32), "box_valid": np.ones((1, n), bool),
        **{name: np.array([value]) for name, value in more.items()},
    }  # fmt: skip
    outputs = {
        "boxes": np.array(found, np.float32).reshape(1, m, 4),
        "scores": np.array(scores, np.float32).reshape(1, m),
        "labels": np.zeros((1, m), np.int32), "detected": np.ones((1, m), bool),
    }  # fmt: skip
    return outputs, batch


A, B, FAR = [0, 0, 40, 40], [50, 0, 90, 40], [100, 100, 140, 140]


@pytest.mark.parametrize(
    "truth, found, scores, more, expected",
    [
        ([A], [A], [0.5], {}, 1.0),
        ([A], [], [], {}, 0.0),
        ([], [A], [0.5], {}, -1.0),
        ([], [], [], {}, -1.0),
        ([A], [FAR, A], [0.9, 0.8], {}, 0.5),
        ([A], [A, FAR], [0.9, 0.8], {}, 1.0),
        ([A, B], [A], [0.9], {}, 51 / 101),  # recalls 0, 0.01, ..., 0.5
        ([A, B], [A, B, B], [0.9, 0.7, 0.8], {}, 1.0),
        ([A], [[0, 0, 40, 30]], [0.9], {}, 0.6),  # IoU 0.75: thresholds 0.5 to 0.75
        ([A, B], [A, B], [0.8, 0.9], {"ignore": [False, True]}, 1.0),
        ([A, B], [A, B, B], [0.7, 0.9, 0.8], {"ignore": [False, True]}, 0.5),  # once only
        ([A, B], [A, B, B], [0.7, 0.9, 0.8], {"crowd": [False, True]}, 1.0),  # many times
        ([A, B], [A, [50, 0, 60, 10]], [0.7, 0.9], {"crowd": [False, True]}, 1.0),
        ([A, B], [A, [50, 0, 60, 10]], [0.7, 0.9], {"ignore": [False, True]}, 0.5),
    ],
)
def test_known_numbers(truth, found, scores, more, expected):
    evaluator = CocoEvaluator(2)
    evaluator.add(*one_image(truth, found, scores, **more))
    assert evaluator.result()["box_AP"] == pytest.approx(expected, abs=1e-12)
    assert evaluator.per_class() == [pytest.approx(expected, abs=1e-12), -1.0]
    assert len(evaluator.result()) == 12


def test_padding_and_invalid_examples_count_nowhere():
    outputs, batch = random_set(3)
    batch["valid"] = np.arange(6) % 3 > 0
    before = CocoEvaluator(3, ("boxes", "masks", "keypoints"), SIGMAS)
    before.add(outputs, batch)
    rng = np.random.default_rng(0)
    for arrays, real in ((outputs, "detected"), (batch, "box_valid")):
        for name, value in arrays.items():
            if name not in (real, "valid"):
                noise = rng.uniform(0, 99, value.shape).astype(value.dtype)
                keep = arrays[real] & batch["valid"][:, None]
                keep = keep.reshape(*keep.shape, *(value.ndim - 2) * [1])
                arrays[name] = np.where(keep, value, noise)
    after = CocoEvaluator(3, ("boxes", "masks", "keypoints"), SIGMAS)
    after.add(outputs, batch)
    assert after.result() == before.result()
    assert len(after.result()) == 34


def test_points_need_their_sigmas_and_labels_their_class():
    outputs, batch = random_set(0)
    with pytest.raises(InputError, match="3 keypoints but 17 sigmas"):
        CocoEvaluator(3, ("keypoints",)).add(outputs, batch)
    with pytest.raises(InputError, match="labels is 2, but num_classes is 2"):
        CocoEvaluator(2).add(outputs, batch)
    with pytest.raises(InputError, match="'box' is none of"):
        CocoEvaluator(2, ("box",))
    # One of two points off by d, with 2 sigma = 0.2 and area 100: d^2 / (2 * 100 * 0.04).
    point = np.array([[[10.0, 10, 2], [20, 20, 2], [0, 0, 0]]])
    moved = point + np.array([[0, 0, 0], [2, 0, 0], [50, 50, 0]])
    box, area = np.array([[0.0, 0, 10, 10]]), np.array([100.0])
    found = keypoint_similarity(moved, point, box, area, (0.1, 0.1, 0.1))
    np.testing.assert_allclose(found, [[(1 + np.exp(-0.5)) / 2]], rtol=1e-12)


def test_voc_has_two_rules():
    recall, precision = np.array([0.25, 0.25, 0.5, 0.5, 0.75]), np.array([1, 0.5, 2 / 3, 0.5, 0.6])
    # Made falling: 1 to 0.25, 2/3 to 0.5, 0.6 to 0.75, then 0.
    area = 0.25 * (1 + 2 / 3 + 0.6)
    assert voc_average_precision(recall, precision) == pytest.approx(area)
    eleven = (3 * 1 + 3 * 2 / 3 + 2 * 0.6) / 11
    assert voc_average_precision(recall, precision, eleven_point=True) == pytest.approx(eleven)
    assert voc_average_precision(np.zeros(0), np.zeros(0)) == 0
    assert voc_average_precision(np.zeros(0), np.zeros(0), eleven_point=True) == 0


def test_voc_counts_a_second_detection_as_wrong_and_leaves_out_the_difficult():
    cases = [
        ([A], [A, A], [0.9, 0.8], {}, 1.0),
        ([A, B], [A, A, B], [0.9, 0.8, 0.7], {}, 0.5 + 0.5 * 2 / 3),
        ([A, B], [B, A], [0.9, 0.8], {"ignore": [False, True]}, 1.0),
        ([A], [[0, 0, 40, 20]], [0.9], {}, 0.0),  # IoU 0.5 is not above 0.5
    ]
    for truth, found, scores, more, expected in cases:
        evaluator = VocEvaluator(1)
        evaluator.add(*one_image(truth, found, scores, **more))
        assert evaluator.result()["mAP"] == pytest.approx(expected)
    assert VocEvaluator(1).result() == {}


def slow_voc(outputs, batch, label, threshold, eleven_point):
    """The rules of the development kit, one detection after the other."""
    found = [
        (-outputs["scores"][i, k], i, k)
        for i, k in np.argwhere(outputs["detected"])
        if outputs["labels"][i, k] == label
    ]
    of_class = batch["box_valid"] & (batch["box_label"] == label)
    taken, true, false, curve = set(), 0, 0, []
    count = (of_class & ~batch["ignore"]).sum()
    for _, i, k in sorted(found):
        best, place = -1.0, None
        for j in np.flatnonzero(of_class[i]):
            a, b = outputs["boxes"][i, k].astype(float), batch["boxes"][i, j].astype(float)
            both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
                0, min(a[3], b[3]) - max(a[1], b[1])
            )
            area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
            if both / (area - both) > best:
                best, place = both / (area - both), j
        if best > threshold and batch["ignore"][i, place]:
            continue
        if best > threshold and (i, place) not in taken:
            taken.add((i, place))
            true += 1
        else:
            false += 1
        curve.append((true / count, true / (true + false)))
    if eleven_point:
        return (
            sum(max([p for r, p in curve if r >= k / 10 - 1e-12], default=0.0) for k in range(11))
            / 11
        )
    recalls = sorted({r for r, _ in curve})
    return sum(
        (r - last) * max(p for other, p in curve if other >= r)
        for last, r in zip([0.0, *recalls], recalls, strict=False)
    )


@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_voc_against_one_detection_after_the_other(seed, eleven_point):
    outputs, batch = random_set(seed)
    batch["ignore"] = np.random.default_rng(seed).random(batch["crowd"].shape) < 0.2
    for threshold in (0.5, 0.75):
        evaluator = VocEvaluator(3, threshold, eleven_point, class_names=("a", "b", "c"))
        evaluator.add(outputs, batch)
        expected = [slow_voc(outputs, batch, k, threshold, eleven_point) for k in range(3)]
        np.testing.assert_allclose(evaluator.per_class(), expected, atol=1e-12)
        assert evaluator.result()["mAP"] == pytest.approx(np.mean(expected))
        assert 0.05 < np.mean(expected) < 0.9
    assert evaluator.pictures()["voc_classes"].ndim == 3


def test_ragged():
    values = np.arange(12).reshape(2, 3, 2)
    first, second = ragged(values, np.array([[True, False, True], [False] * 3]))
    np.testing.assert_array_equal(first, [[0, 1], [4, 5]])
    assert second.shape == (0, 2)


def test_the_area_of_a_truth_with_a_mask_is_that_of_the_mask():
    mask = np.zeros((1, 1, 64, 64), bool)
    mask[..., 10:30, 10:30] = True  # 400 pixels: small
    box, label = np.float32([[[0, 0, 40, 40]]]), np.zeros((1, 1), int)  # 1,600: medium
    one = np.ones((1, 1), bool)
    evaluator = CocoEvaluator(1, ("masks",))
    evaluator.add(
        {"boxes": box, "scores": np.float32(one), "labels": label, "detected": one, "masks": mask},
        {"boxes": box, "box_label": label, "box_valid": one, "valid": one[0], "masks": mask},
    )
    found = evaluator.result()
    assert found["mask_AP_small"] == 1 and found["mask_AP_medium"] == -1
