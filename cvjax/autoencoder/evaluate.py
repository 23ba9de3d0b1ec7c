"""How many of the codes are in use over a whole set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cvjax.checks import check_at_least
from cvjax.errors import InputError


@dataclass
class CodeUsage:
    """How many of `size` codes occur in a whole set, and the perplexity of their frequencies.

    Attributes:
      size: the number of codes.
      prediction: the name of the indices, integers [b, ...], among the outputs.
      counts: int64 [size]: how often each occurred so far, in examples that are `valid`.
    """

    size: int
    prediction: str = "indices"
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        check_at_least(self, size=1)
        self.counts = np.zeros(self.size, np.int64)

    def check(self, task: Any) -> None:
        """Raises InputError where the task's `bottleneck` has another number of codes."""
        codes = getattr(getattr(task, "bottleneck", None), "size", self.size)
        if codes != self.size:
            raise InputError(
                f"CodeUsage: size is {self.size}, but the bottleneck has {codes} codes; they must "
                "be equal"
            )

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Counts the codes of a batch. Raises InputError for one out of range, or without any."""
        if self.prediction not in outputs:
            raise InputError(
                f"CodeUsage: the task predicts {', '.join(outputs)}; prediction="
                f"{self.prediction!r} is not among them"
            )
        indices = np.asarray(outputs[self.prediction])[np.asarray(batch["valid"])].reshape(-1)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.size:
            raise InputError(
                f"CodeUsage: size is {self.size}, but there are codes from {indices.min()} to "
                f"{indices.max()}"
            )
        self.counts += np.bincount(indices, minlength=self.size)

    def result(self) -> dict[str, float]:
        """Returns `codes_used` and `code_perplexity`; 0 and 1 of nothing."""
        share = self.counts[self.counts > 0] / max(self.counts.sum(), 1)
        return {
            "codes_used": float(len(share)),
            "code_perplexity": float(np.exp(-np.sum(share * np.log(share)))),
        }

    def pictures(self) -> dict[str, np.ndarray]:
        """Returns a bar for each code, the most frequent first; full height is the largest."""
        height, width = 64, 4
        share = np.sort(self.counts)[::-1] / max(self.counts.max(), 1)
        rows = np.arange(height, 0, -1)[:, None] / height
        bars = np.repeat(share[None] >= rows, width, axis=1)
        bars[:, ::width] = False  # a gap between the bars
        return {"codes": bars[..., None].astype(np.float32)}
