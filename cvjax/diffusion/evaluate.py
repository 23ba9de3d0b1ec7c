"""How near upsampled images are to the true ones."""

from collections.abc import Mapping

import numpy as np


class UpsamplingPSNR:
    """The peak signal-to-noise ratio of "sample" and of "bilinear", in dB, mean over images.

    10 log10(1 / mean squared error) of an image in [0, 1]; an error below 1e-10 counts as that. The
    third figure, "gain", is the one less the other. Without a valid image there are no figures.
    """

    def __init__(self):
        self.rows: list[np.ndarray] = []

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Takes what an `Upsampler` predicts, and the true images."""
        true, valid = np.asarray(batch["image"], np.float64), batch["valid"]
        errors = [
            np.mean((np.asarray(outputs[name], np.float64) - true) ** 2, axis=(1, 2, 3))[valid]
            for name in ("sample", "bilinear")
        ]
        self.rows.append(-10 * np.log10(np.maximum(errors, 1e-10)))

    def result(self) -> dict[str, float]:
        """The means."""
        rows = np.concatenate(self.rows, axis=1) if self.rows else np.zeros((2, 0))
        if not rows.shape[1]:
            return {}
        sample, bilinear = rows.mean(axis=1)
        return {
            "sample": float(sample), "bilinear": float(bilinear), "gain": float(sample - bilinear),
        }  # fmt: skip
