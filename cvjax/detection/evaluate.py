"""Average precision over a whole set: of COCO for boxes, masks and keypoints, and of VOC.

The rules of COCO are those of https://cocodataset.org/#detection-eval and #keypoints-eval. For
each image and class the detections, best first, each take the free truth that they overlap most;
truth that is ignored (a crowd, `ignore`, an area outside of the range in question) is taken only
where no other is left, and then the detection counts neither way. A crowd may be taken many times,
and the overlap with it is the share of the detection that it covers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cvjax import draw
from cvjax.checks import check_between, check_count, check_labels, check_positive
from cvjax.detection.overlap import box_area, box_overlap, keypoint_similarity, mask_overlap
from cvjax.errors import InputError

# Of the 17 points of a person in COCO, from the nose to the ankles.
PERSON_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072,
    0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089,
)  # fmt: skip
_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_AREAS = {"": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
_PARTS = ("boxes", "masks", "keypoints")
_NAMES = {"boxes": "box", "masks": "mask", "keypoints": "keypoint"}


@dataclass
class CocoEvaluator:
    """The 12 numbers of COCO for boxes, 12 for masks and 10 for keypoints.

    Outputs: boxes [b, m, 4], scores [b, m], labels [b, m], detected bool [b, m], and masks
    bool [b, m, h, w] and keypoints [b, m, k, 3] where they are asked for. Batch: boxes [b, n, 4],
    box_label [b, n], box_valid bool [b, n], valid bool [b], masks and keypoints likewise, and if
    there are any: crowd bool [b, n], ignore bool [b, n], area [b, n] in pixels. Without `area` it
    is that of the mask, or where there is none that of the box. Boxes are x1, y1, x2, y2 in pixels;
    visibility 0 is a point that was not annotated, and truth without any point is ignored. With
    `scale`, float [b], how long a pixel of the annotated image is in this one (a source that
    resizes gives it), small, medium and large are meant in pixels of the annotated image.

    Attributes:
      num_classes: labels are 0..num_classes - 1.
      parts: which of "boxes", "masks" and "keypoints" are evaluated.
      sigmas: of each keypoint, in units of the square root of the area; None are those of COCO's
        17. The similarity is the mean of exp(-d^2 / (2 area (2 sigma)^2)).
      class_names: of the classes, for the table; None are their numbers.

    Raises:
      InputError: no classes, another part, fewer names than classes, or (as data are added) a label
        that is no class, a part that is not there, or keypoints without as many sigmas.
    """

    num_classes: int
    parts: Sequence[str] = ("boxes",)
    sigmas: Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    _images: dict = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.class_names)
        for part in self.parts:
            if part not in _PARTS:
                raise InputError(f"parts: {part!r} is none of {', '.join(_PARTS)}")
        check_positive(**{f"sigmas[{i}]": sigma for i, sigma in enumerate(self.sigmas or ())})
        self._images = {part: [[] for _ in range(self.num_classes)] for part in self.parts}

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Matches the detections of a batch with its truth."""
        for part in self.parts:
            for name, arrays in (("the outputs", outputs), ("the batch", batch)):
                if part not in arrays:
                    raise InputError(
                        f"parts has {part!r}, but {name} have none: there are {', '.join(arrays)}"
                    )
        for row in np.flatnonzero(batch["valid"]):
            keep, real = _real(outputs["detected"], row), _real(batch["box_valid"], row)
            found = {
                name: np.asarray(outputs[name])[row][keep]
                for name in ("scores", "labels", *self.parts)
            }
            names = ("box_label", "boxes", *self.parts, "masks", "crowd", "ignore", "area")
            truth = {name: np.asarray(batch[name])[row][real] for name in names if name in batch}
            check_labels(found["labels"], self.num_classes, "labels")
            check_labels(truth["box_label"], self.num_classes, "box_label")
            truth = {**truth, **_usual(truth)}
            pixel = float(np.asarray(batch["scale"])[row]) ** 2 if "scale" in batch else 1.0
            for label in np.union1d(found["labels"], truth["box_label"]):
                one = {k: v[found["labels"] == label] for k, v in found.items()}
                true = {k: v[truth["box_label"] == label] for k, v in truth.items()}
                best_first = np.argsort(-one["scores"], kind="stable")
                for part in self.parts:
                    most = 20 if part == "keypoints" else 100
                    top = {k: v[best_first[:most]] for k, v in one.items()}
                    self._images[part][int(label)].append(self._matched(part, top, true, pixel))

    def result(self) -> dict[str, float]:
        """The numbers by name: `box_AP`, `box_AP50`, ..., `mask_AP`, ..., `keypoint_AP`, ....

        In [0, 1]; -1, as in COCO, where no truth counts (there is no small object, say).
        """
        result = {}
        for part in self.parts:
            prefix = _NAMES[part]
            is_points = part == "keypoints"
            areas = [area for area in _AREAS if not (is_points and area == "small")]
            precision, recall = self._curves(part, most=20 if is_points else 100)
            place = {area: list(_AREAS).index(area) for area in areas}
            result[f"{prefix}_AP"] = _mean(precision[:, 0])
            result[f"{prefix}_AP50"] = _mean(precision[:, 0, 0])
            result[f"{prefix}_AP75"] = _mean(precision[:, 0, 5])
            for area in areas[1:]:
                result[f"{prefix}_AP_{area}"] = _mean(precision[:, place[area]])
            if is_points:
                result[f"{prefix}_AR"] = _mean(recall[:, 0])
                result[f"{prefix}_AR50"] = _mean(recall[:, 0, 0])
                result[f"{prefix}_AR75"] = _mean(recall[:, 0, 5])
            else:
                for most in (1, 10, 100):
                    result[f"{prefix}_AR_{most}"] = _mean(self._curves(part, most)[1][:, 0])
            for area in areas[1:]:
                result[f"{prefix}_AR_{area}"] = _mean(recall[:, place[area]])
        return result

    def per_class(self, part: str = "boxes") -> list[float]:
        """The AP of each class, as in `result`; -1 for one without truth."""
        precision = self._curves(part, most=20 if part == "keypoints" else 100)[0]
        return [_mean(precision[label, 0]) for label in range(self.num_classes)]

    def table(self) -> dict[str, list]:
        """By columns, one row for each class: its name, and of each part AP, AP50 and AR."""
        columns: dict[str, list] = {"class": _names(self.num_classes, self.class_names)}
        for part in self.parts:
            precision, recall = self._curves(part, most=20 if part == "keypoints" else 100)
            for name, values in (
                ("AP", precision[:, 0]), ("AP50", precision[:, 0, 0]), ("AR", recall[:, 0]),
            ):  # fmt: skip
                columns[f"{_NAMES[part]} {name}"] = [_mean(one) for one in values]
        return columns

    def pictures(self) -> dict[str, np.ndarray]:
        """The table, to be read."""
        return {"coco_classes": draw.table(self.table())}

    def _matched(self, part: str, found: Mapping, truth: Mapping, pixel: float) -> tuple:
        """Scores [d], is_match and is_ignored [areas, thresholds, d], truths that count [areas].

        `pixel` is the area, in this image, of a pixel of the one that was annotated.
        """
        ignored = truth["ignore"] | truth["crowd"]
        if part == "boxes":
            overlap = box_overlap(found["boxes"], truth["boxes"], truth["crowd"])
            area = box_area(found["boxes"])
        elif part == "masks":
            overlap = mask_overlap(found["masks"], truth["masks"], truth["crowd"])
            area = found["masks"].sum(axis=(1, 2))
        else:
            points = truth["keypoints"]
            sigmas = self.sigmas
            if sigmas is None:
                sigmas = PERSON_SIGMAS
            if len(sigmas) != points.shape[1]:
                raise InputError(
                    f"there are {points.shape[1]} keypoints but {len(sigmas)} sigmas: give "
                    "CocoEvaluator one for each"
                )
            overlap = keypoint_similarity(
                found["keypoints"], points, truth["boxes"], truth["area"], sigmas
            )
            ignored = ignored | ~(points[..., 2] > 0).any(axis=-1)
            places = found["keypoints"][..., :2].astype(np.float64)
            area = np.prod(places.max(axis=1) - places.min(axis=1), axis=-1)
        low, high = np.array(list(_AREAS.values())).T[..., None]
        area, true_area = area / pixel, truth["area"] / pixel
        is_outside = (true_area < low) | (true_area > high)
        is_match, is_ignored = _match(overlap, ignored | is_outside, truth["crowd"])
        is_ignored |= ~is_match & ((area < low) | (area > high))[:, None]
        return found["scores"], is_match, is_ignored, (~(ignored | is_outside)).sum(axis=1)

    def _curves(self, part: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Precision [classes, areas, thresholds, recalls] and recall [classes, areas, thresholds].

        Of the `most` best detections of each image; -1 where no truth counts.
        """
        shape = (self.num_classes, len(_AREAS), len(_THRESHOLDS))
        precision, recall = np.full((*shape, len(_RECALLS)), -1.0), np.full(shape, -1.0)
        for label, images in enumerate(self._images[part]):
            if not images:
                continue
            scores = np.concatenate([one[0][:most] for one in images])
            order = np.argsort(-scores, kind="stable")
            is_match, is_ignored = (
                np.concatenate([one[i][..., :most] for one in images], axis=-1)[..., order]
                for i in (1, 2)
            )
            counts = sum(one[3] for one in images)
            true = np.cumsum(is_match & ~is_ignored, axis=-1)
            false = np.cumsum(~is_match & ~is_ignored, axis=-1)
            for area in np.flatnonzero(counts):
                for t in range(len(_THRESHOLDS)):
                    reached = true[area, t] / counts[area]
                    share = true[area, t] / np.maximum(true[area, t] + false[area, t], 1)
                    recall[label, area, t] = reached[-1] if len(reached) else 0.0
                    # The best precision at this recall or a higher one; 0 where none is as high.
                    best = np.append(np.maximum.accumulate(share[::-1])[::-1], 0.0)
                    precision[label, area, t] = best[np.searchsorted(reached, _RECALLS)]
        return precision, recall


@dataclass
class VocEvaluator:
    """Mean average precision of PASCAL VOC at one overlap: `{"mAP": ...}`.

    Each detection, best first over all images, goes to the truth of its image and class that it
    overlaps most: it is right if that overlap is above the threshold and nothing took that truth
    before. Truth with `ignore` (difficult) does not count, nor what goes to it. As M. Everingham
    et al. (IJCV 2010), section 4.2, but with continuous boxes, where a width has no "+ 1".

    Attributes:
      num_classes: labels are 0..num_classes - 1. Outputs and batch: as in `CocoEvaluator`.
      threshold: of the IoU.
      eleven_point: the rule of 2007 instead of the area under the curve; see
        `voc_average_precision`.
      class_names: of the classes, for the table; None are their numbers.
    """

    num_classes: int
    threshold: float = 0.5
    eleven_point: bool = False
    class_names: Sequence[str] | None = None
    _found: list = field(init=False, repr=False)
    _count: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_classes(self.num_classes, self.class_names)
        check_between(0, 1, threshold=self.threshold)
        self._found = [[] for _ in range(self.num_classes)]
        self._count = np.zeros(self.num_classes, int)

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Matches the detections of a batch with its truth."""
        for row in np.flatnonzero(batch["valid"]):
            keep, real = _real(outputs["detected"], row), _real(batch["box_valid"], row)
            boxes, scores, labels = (
                np.asarray(outputs[name])[row][keep] for name in ("boxes", "scores", "labels")
            )
            truth, classes = (np.asarray(batch[name])[row][real] for name in ("boxes", "box_label"))
            check_labels(labels, self.num_classes, "labels")
            check_labels(classes, self.num_classes, "box_label")
            ignore = _real(batch["ignore"], row)[real] if "ignore" in batch else classes < 0
            for label in np.union1d(labels, classes):
                there, order = classes == label, np.argsort(-scores, kind="stable")
                order = order[labels[order] == label]
                self._count[label] += (there & ~ignore).sum()
                no_crowd = np.zeros(there.sum(), bool)
                overlap = box_overlap(boxes[order], truth[there], no_crowd)
                taken = no_crowd.copy()
                for place, score in zip(overlap, scores[order], strict=True):
                    best = int(place.argmax()) if len(place) else -1
                    is_hit = best >= 0 and place[best] > self.threshold
                    if is_hit and ignore[there][best]:
                        continue
                    is_true = is_hit and not taken[best]
                    if is_true:
                        taken[best] = True
                    self._found[label].append((float(score), is_true))

    def per_class(self) -> list[float]:
        """The AP of each class; NaN for one without truth."""
        return [
            self._average_precision(found, count)
            for found, count in zip(self._found, self._count, strict=True)
        ]

    def result(self) -> dict[str, float]:
        """`mAP` over the classes that have truth; nothing when none has."""
        return {"mAP": float(np.nanmean(self.per_class()))} if self._count.any() else {}

    def pictures(self) -> dict[str, np.ndarray]:
        """The AP of each class, to be read."""
        names = _names(self.num_classes, self.class_names)
        return {"voc_classes": draw.table({"class": names, "AP": self.per_class()})}

    def _average_precision(self, found: list, count: int) -> float:
        if not count:
            return float("nan")
        table = np.array(found, np.float64).reshape(-1, 2)
        true = table[np.argsort(-table[:, 0], kind="stable"), 1].cumsum()
        precision = true / np.arange(1, len(true) + 1)
        return voc_average_precision(true / count, precision, eleven_point=self.eleven_point)


def voc_average_precision(
    recall: np.ndarray, precision: np.ndarray, *, eleven_point: bool = False
) -> float:
    """AP of a curve, recall [d] rising and precision [d], after each detection.

    Precision is made falling: at each recall the best at this one or a higher. Its area is the AP
    since 2010; before that, with `eleven_point`, it is its mean at recall 0, 0.1, ..., 1.
    """
    best = np.append(np.maximum.accumulate(np.asarray(precision, np.float64)[::-1])[::-1], 0.0)
    if eleven_point:
        # A recall of 0.3 can be 0.30000000000000004 in the one or the other way.
        return float(best[np.searchsorted(recall, np.arange(11) / 10 - 1e-9)].mean())
    return float((np.diff(np.append(0.0, recall)) * best[:-1]).sum())


def ragged(values: np.ndarray, is_real: np.ndarray) -> list[np.ndarray]:
    """For each row of values [b, n, ...] those whose `is_real`, bool [b, n], is True."""
    rows = zip(np.asarray(values), np.asarray(is_real), strict=True)
    return [row[np.asarray(keep, bool)] for row, keep in rows]


def _match(
    overlap: np.ndarray, ignored: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Who takes a truth, and who takes one that is ignored: bool [areas, thresholds, d].

    Args:
      overlap: [d, g], best detection first.
      ignored: bool [areas, g].
      crowd: bool [g]: may be taken again.
    """
    shape = (len(ignored), len(_THRESHOLDS), overlap.shape[0])
    is_match, is_ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    count = overlap.shape[1]
    if not count:
        return is_match, is_ignored
    taken = np.zeros((*shape[:2], count), bool)
    place = np.arange(count)
    for d, row in enumerate(overlap):
        is_free = (row >= _THRESHOLDS[:, None]) & (~taken | crowd)
        # A truth that counts is preferred; of several with equal overlap, the last.
        counts = is_free & ~ignored[:, None]
        value = np.where(counts | (is_free & ~counts.any(axis=-1, keepdims=True)), row, -1.0)
        best = count - 1 - value[..., ::-1].argmax(axis=-1)
        hit = is_free.any(axis=-1)
        taken |= hit[..., None] & (place == best[..., None])
        is_match[..., d] = hit
        is_ignored[..., d] = hit & np.take_along_axis(ignored, best, axis=1)
    return is_match, is_ignored


def _usual(truth: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the truth may leave out: `crowd`, `ignore` and `area`, for each object."""
    count = len(truth["boxes"])
    usual = {k: np.asarray(truth.get(k, np.zeros(count)), bool) for k in ("crowd", "ignore")}
    if "area" not in truth:
        has_masks = "masks" in truth
        masks = truth["masks"].sum(axis=(1, 2)) if has_masks else None
        usual["area"] = masks if has_masks else box_area(truth["boxes"])
    return usual


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _real(flags: np.ndarray, row: int) -> np.ndarray:
    """A row of flags; zeros and ones would choose rows by number."""
    return np.asarray(flags)[row].astype(bool)


def _names(num_classes: int, names: Sequence[str] | None) -> list[str]:
    return [str(name) for name in (names or range(num_classes))][:num_classes]


def _check_classes(num_classes: int, names: Sequence[str] | None) -> None:
    check_count(1, num_classes=num_classes)
    if names and len(names) < num_classes:
        raise InputError(f"{len(names)} class_names are fewer than num_classes={num_classes}")
