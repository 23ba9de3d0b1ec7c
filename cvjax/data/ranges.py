"""What values images and labels may have, and how many channels there are."""

from collections.abc import Mapping

import numpy as np

from cvjax.checks import check_unit
from cvjax.errors import InputError


def check_unit_images(batch: Mapping[str, np.ndarray]) -> None:
    """Raises InputError unless the valid images [b, h, w, c] of a batch on the host are in [0, 1].

    What `fit` asks, before it begins, a task that has a `check`.
    """
    check_unit(
        np.asarray(batch["image"])[np.asarray(batch["valid"])],
        "this task takes them in [0, 1]: give uint8, which the loader divides by 255, or rescale",
    )


def check_channels(batch: Mapping[str, np.ndarray], **settings: float | tuple[float, ...]) -> None:
    """Raises InputError unless each setting is a number, or one for each channel of the images."""
    channels = np.shape(batch["image"])[-1]
    for name, value in settings.items():
        if np.ndim(value) > 1 or np.size(value) not in (1, channels):
            raise InputError(
                f"{name} is {value}; the images have {channels} channels: it must be a number, or "
                "one for each of them"
            )


def check_labels(labels: np.ndarray, num_classes: int, name: str = "label") -> None:
    """Raises InputError for a label that is no class; 0 classes mean that nobody looks at them."""
    wrong = labels[~((labels >= 0) & (labels < num_classes))]
    if num_classes and wrong.size:
        raise InputError(
            f"{name} is {wrong[0]}, but num_classes is {num_classes}: classes are "
            f"0..{num_classes - 1}"
        )
