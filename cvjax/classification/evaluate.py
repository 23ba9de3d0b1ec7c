"""Evaluators of a classifier that need the whole set: confusion, calibration, average precision.

Each takes what `Classification.predict` gives, batch by batch, and leaves out what is not valid. Of
soft labels, [b, classes], the first two take the most probable class, as the accuracy does.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from sklearn.metrics import average_precision_score

from cvjax import draw
from cvjax.checks import check_count, check_labels
from cvjax.errors import InputError

Arrays = Mapping[str, np.ndarray]


class Confusion:
    """The confusion matrix, the accuracy of every class, and the worst mistakes as pictures.

    Metrics: `balanced_accuracy` (the mean over the classes that occur) and `accuracy/<class>`.
    Pictures: `confusion` (rows: the true class, each scaled to its number of examples; columns: the
    prediction) and `mistakes` (the images named wrongly with the most confidence, worst first).
    """

    def __init__(self, class_names: Sequence[str] | None = None, mistakes: int = 30):
        """Names are numbers when there are none; `mistakes` is how many are shown.

        Raises InputError (of `add`, too: for another number of names than of classes, and for a
        label that is no class).
        """
        if mistakes < 0:
            raise InputError(f"mistakes is {mistakes}; it cannot be negative")
        self.class_names = None if class_names is None else list(map(str, class_names))
        self.mistakes = mistakes
        self.matrix: np.ndarray | None = None
        self._worst: list[tuple[float, int, np.ndarray]] = []
        self._seen = 0

    def add(self, outputs: Arrays, batch: Arrays) -> None:
        """Takes `probabilities` [b, classes]; of the batch `label` int [b], `image`, `valid`."""
        valid = np.asarray(batch["valid"])
        probabilities = np.asarray(outputs["probabilities"])[valid]
        image, classes = np.asarray(batch["image"])[valid], probabilities.shape[-1]
        label = _number(np.asarray(batch["label"])[valid], classes, "Confusion")
        if self.matrix is None:
            if self.class_names and len(self.class_names) != classes:
                raise InputError(
                    f"class_names has {len(self.class_names)} names, but there are {classes} "
                    "classes"
                )
            self.matrix = np.zeros((classes, classes), np.int64)
        prediction = probabilities.argmax(-1)
        np.add.at(self.matrix, (label, prediction), 1)
        for row in np.flatnonzero(prediction != label):
            # The number breaks ties, and keeps the sort from comparing images.
            entry = float(probabilities[row, prediction[row]]), -(self._seen + row), image[row]
            self._worst.append(entry)
        self._worst.sort(key=lambda entry: entry[:2], reverse=True)
        del self._worst[self.mistakes :]
        self._seen += len(label)

    def result(self) -> dict[str, float]:
        """The metrics; {} when nothing was added."""
        if self.matrix is None or not self.matrix.any():
            return {}
        counts = self.matrix.sum(1)
        names = self.class_names or [str(i) for i in range(len(counts))]
        accuracy = {
            f"accuracy/{name if names.count(name) == 1 else f'{name} ({i})'}": self.matrix[i, i]
            / counts[i]
            for i, name in enumerate(names)
            if counts[i]
        }
        return {"balanced_accuracy": float(np.mean(list(accuracy.values()))), **accuracy}

    def pictures(self) -> dict[str, np.ndarray]:
        """The matrix and the mistakes; the latter only when there are any."""
        if self.matrix is None or not self.matrix.any():
            return {}
        rows = self.matrix / np.maximum(self.matrix.sum(1, keepdims=True), 1)
        # Some thousand pixels wide at most, or one for each class; lines where there is room.
        side = max(1, min(16, 1024 // len(rows)))
        cells = np.broadcast_to(rows[..., None, None, None], (*rows.shape, side, side, 1))
        cells = cells.reshape(-1, side, side, 1)
        picture = draw.grid(cells, columns=len(rows), padding=int(side > 4))
        found = {"confusion": picture}
        if self._worst:
            images = np.stack([image for _, _, image in self._worst])
            found["mistakes"] = draw.grid(np.clip(draw.in_colour(images), 0, 1))
        return found


class Calibration:
    """Whether a classifier is right as often as it says: ECE, and the temperature that mends it.

    Metrics: `ece`, the expected calibration error with `bins` equal bins of confidence;
    `temperature`, the number that the logits should be divided by, fitted on this very set;
    `ece_scaled`, the error after that. C. Guo et al., On Calibration of Modern Neural Networks
    (https://arxiv.org/abs/1706.04599), equation 3 and section 4.2.
    """

    def __init__(self, bins: int = 15):
        check_count(1, bins=bins)
        self.bins = bins
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, outputs: Arrays, batch: Arrays) -> None:
        """Takes `logits` [b, classes]; of the batch `label` int [b] and `valid`.

        Raises InputError for a label that is no class.
        """
        valid = np.asarray(batch["valid"])
        logits = np.asarray(outputs["logits"], np.float64)[valid]
        label = np.asarray(batch["label"])[valid]
        self._logits.append(logits)
        self._labels.append(_number(label, logits.shape[-1], "Calibration"))

    def result(self) -> dict[str, float]:
        """The metrics; {} when nothing was added."""
        if not sum(map(len, self._labels)):
            return {}
        logits, labels = np.concatenate(self._logits), np.concatenate(self._labels)
        scale = temperature(logits, labels)
        return {
            "ece": expected_calibration_error(softmax(logits, -1), labels, self.bins),
            "temperature": scale,
            "ece_scaled": expected_calibration_error(
                softmax(logits / scale, -1), labels, self.bins
            ),
        }


class MeanAveragePrecision:
    """For labels that do not exclude each other: average precision, mean over classes.

    Metrics: `map`, over the classes that have a positive example (the others have no precision);
    the average precision is the sum over thresholds of precision times the gain in recall, as
    scikit-learn computes it.
    """

    def __init__(self):
        self._scores: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []

    def add(self, outputs: Arrays, batch: Arrays) -> None:
        """Takes `logits` [b, classes]; of the batch `label` [b, classes] and `valid`.

        Raises InputError for labels of another shape.
        """
        valid = np.asarray(batch["valid"])
        scores = np.asarray(outputs["logits"], np.float32)[valid]
        label = np.asarray(batch["label"])[valid]
        if label.shape != scores.shape:
            raise InputError(
                f"MeanAveragePrecision: label is {list(label.shape)}; for logits "
                f"{list(scores.shape)} it must be the same: a yes or no for each class"
            )
        self._scores.append(scores)
        self._targets.append(label > 0.5)

    def result(self) -> dict[str, float]:
        """The metric; {} when no class has a positive example."""
        if not sum(map(len, self._targets)):
            return {}
        scores, targets = np.concatenate(self._scores), np.concatenate(self._targets)
        present = np.flatnonzero(targets.any(0))
        if np.isnan(scores).any():
            return {"map": np.nan}
        scores = np.nan_to_num(scores)  # scikit-learn wants finite ones
        each = [average_precision_score(targets[:, i], scores[:, i]) for i in present]
        return {"map": float(np.mean(each))} if each else {}


def _number(label: np.ndarray, classes: int, evaluator: str) -> np.ndarray:
    """The class of each example, int [n], of labels int [n] or soft, [n, classes]."""
    if label.ndim == 2 and label.shape[-1] == classes:
        if not np.allclose(label.sum(-1), 1, atol=1e-3):
            raise InputError(
                f"{evaluator}: the labels of an image must sum to 1: exclusive classes"
            )
        return label.argmax(-1)
    if label.ndim != 1 or label.dtype.kind not in "iu":
        raise InputError(
            f"{evaluator}: label is {label.dtype} {list(label.shape)}; it must be a whole number "
            f"for each image, or a probability for each of {classes} classes"
        )
    check_labels(label, classes, f"{evaluator}: label")
    return label


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15
) -> float:
    """sum over bins of (share of the examples in it) * |accuracy - mean confidence|.

    Args:
      probabilities: [n, classes]; the confidence is the largest of a row.
      labels: int [n].
      bins: intervals ((i - 1) / bins, i / bins] of confidence.
    """
    confidence = probabilities.max(-1)
    right = probabilities.argmax(-1) == labels
    # Not ceil(confidence * bins): 7 / 25 * 25 is more than 7.
    index = np.searchsorted(np.arange(1, bins) / bins, confidence)
    gaps = np.bincount(index, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in [0.01, 100] for which softmax(logits / T) has the least cross-entropy.

    The cross-entropy is convex in 1 / T, so that the least one is found from anywhere.
    """
    chosen = logits[np.arange(len(labels)), labels]

    def cross_entropy(inverse: float) -> float:
        return float(np.mean(logsumexp(inverse * logits, -1) - inverse * chosen))

    # Over the logarithm one tolerance serves all scales; a convex function stays unimodal.
    best = minimize_scalar(
        lambda log_inverse: cross_entropy(np.exp(log_inverse)),
        bounds=(np.log(0.01), np.log(100.0)), method="bounded", options={"xatol": 1e-6},
    )  # fmt: skip
    return float(np.exp(-best.x))
