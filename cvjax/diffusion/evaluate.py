"""How near upsampled images are to the true ones."""

from collections.abc import Mapping

import numpy as np

from cvjax.checks import valid_rows
from cvjax.evaluation.similarity import psnr


class UpsamplingPSNR:
    """The peak signal-to-noise ratio of "sample" and of "bilinear", in dB, mean over images.

    As of `cvjax.evaluation.similarity.psnr`. The third figure, "gain", is the one less the other.
    Without a valid image there are no figures.
    """

    def __init__(self):
        self.rows: list[np.ndarray] = []

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Takes what a `SuperResolution` predicts, and the true images."""
        true = valid_rows(batch, "image")
        found = (np.asarray(outputs[name])[batch["valid"]] for name in ("sample", "bilinear"))
        self.rows.append(np.stack([psnr(one, true) for one in found]))

    def result(self) -> dict[str, float]:
        """The means."""
        rows = np.concatenate(self.rows, axis=1) if self.rows else np.zeros((2, 0))
        if not rows.shape[1]:
            return {}
        sample, bilinear = rows.mean(axis=1)
        return {
            "sample": float(sample), "bilinear": float(bilinear), "gain": float(sample - bilinear),
        }  # fmt: skip
