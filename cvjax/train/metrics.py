"""The metrics of steps, on the host: exact means from totals and counts."""

import collections
import logging
from collections.abc import Mapping, Sequence

import jax

from cvjax.train.guards import NonFiniteGuard
from cvjax.train.task import Metrics

log = logging.getLogger("cvjax")


def pairs(metrics: Metrics) -> dict[str, tuple[float, float]]:
    """The totals and counts of metrics, on the host."""
    return {name: (float(m.total), float(m.count)) for name, m in jax.device_get(metrics).items()}


def means(rows: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Exact means over several steps; of the `nonfinite/` flags only those that were raised."""
    totals: dict[str, list[float]] = {}
    for row in rows:
        for name, (total, count) in row.items():
            sums = totals.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += count
    return {
        name: total if name.startswith("nonfinite/") else total / count
        for name, (total, count) in totals.items()
        if count and (total or not name.startswith("nonfinite/"))
    }


class Window:
    """The metrics of the steps since the last line of the log.

    A step is read two steps later: waiting for it keeps the device's queue short, and not empty.
    """

    def __init__(self, guard: NonFiniteGuard):
        self._guard = guard
        self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._rows: list[Mapping[str, tuple[float, float]]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step. Raises NonFiniteError as the guard does."""
        self._pending.append((step, metrics))
        if len(self._pending) > 2:
            self._read()

    def finish(self) -> dict[str, float]:
        """Waits for all steps; the means since the last call. Raises NonFiniteError, too."""
        while self._pending:
            self._read()
        rows, self._rows = self._rows, []
        return means(rows)

    def _read(self) -> None:
        step, metrics = self._pending.popleft()
        metrics = pairs(metrics)
        if not self._guard.check(step, {name: total for name, (total, _) in metrics.items()}):
            metrics = {n: m for n, m in metrics.items() if n.startswith("nonfinite/") and m[0]}
            log.warning("step %d skipped: %s", step, ", ".join(metrics))
        self._rows.append(metrics)
