"""Mean IoU and pixel accuracy, exact over a whole set."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cvjax.checks import check_at_least, check_labels
from cvjax.errors import InputError


@dataclass
class MeanIoU:
    """Counts pixels by true and predicted class; never an average of averages.

    The IoU of a class is (pixels of both) / (pixels of either), over all images together, and the
    mean IoU is the mean over the classes. A class that is in neither the truth nor the predictions
    has no IoU, 0 / 0, and is left out of that mean; one that is predicted and never true has 0.
    Pixels whose truth is `ignore` count nowhere, whatever is predicted there; nor do examples that
    are not `valid`.

    Attributes:
      num_classes: classes are 0..num_classes - 1.
      ignore: the label of pixels without truth.
      prediction: the name of the classes, integers [b, h, w], among the outputs.
      mask: the name of the truth, integers [b, h, w], in the batch.
      matrix: int64 [true class, predicted class]: the pixels counted so far.
    """

    num_classes: int
    ignore: int = 255
    prediction: str = "prediction"
    mask: str = "mask"
    matrix: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        check_at_least(self, num_classes=1)
        self.matrix = np.zeros((self.num_classes, self.num_classes), np.int64)

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Counts the pixels of a batch. Raises InputError for a label that is no class."""
        valid = np.asarray(batch["valid"])
        truth = np.asarray(batch[self.mask])[valid]
        found = np.asarray(outputs[self.prediction])[valid]
        if truth.shape != found.shape:
            raise InputError(
                f"MeanIoU: {self.mask} is {list(truth.shape)}, but {self.prediction} is "
                f"{list(found.shape)}"
            )
        counts = truth != self.ignore
        truth, found = truth[counts].astype(np.int64), found[counts].astype(np.int64)
        for name, labels in ((self.mask, truth), (self.prediction, found)):
            check_labels(labels, self.num_classes, f"MeanIoU: a pixel of {name}")
        cells = np.bincount(truth * self.num_classes + found, minlength=self.num_classes**2)
        self.matrix += cells.reshape(self.matrix.shape)

    @property
    def iou(self) -> np.ndarray:
        """The IoU of each class, float64 [num_classes]; NaN for a class that is nowhere."""
        both = np.diagonal(self.matrix)
        either = self.matrix.sum(axis=0) + self.matrix.sum(axis=1) - both
        return np.divide(both, either, out=np.full(self.num_classes, np.nan), where=either > 0)

    def result(self) -> dict[str, float]:
        """`mean_iou` and `pixel_accuracy`, in [0, 1]; nothing when no pixel was counted."""
        total = self.matrix.sum()
        if not total:
            return {}
        return {
            "mean_iou": float(np.nanmean(self.iou)),
            "pixel_accuracy": float(np.trace(self.matrix) / total),
        }
