"""The progress line: a bar on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows step, metrics, speed, share of time waited for data and time left.

    Attributes:
      waited: seconds waited for data; the loop adds to it.
    """

    def __init__(self, total: int, done: int):
        self.total, self.done, self.waited = total, done, 0.0
        self._began = self._last = time.perf_counter()
        self._paused = self._waited_before = self._waited_all = 0.0
        self._steps_before, self._steps, self._examples = done, 0, 0
        self._seconds = 0.0
        self._bar = None
        if sys.stderr.isatty():
            columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            columns.append(TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count (evaluation)."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def measure(self, step: int, examples_per_step: int) -> dict[str, float]:
        """Speed since the last call: steps and examples per second, share of time waited."""
        now = time.perf_counter()
        seconds = max(now - self._last - self._paused, 1e-9)
        steps = step - self._steps_before
        share = min(self.waited / seconds, 1.0)
        self._seconds += seconds
        self._steps += steps
        self._examples += steps * examples_per_step
        self._waited_all += self.waited
        self._last, self._paused, self.waited, self._steps_before = now, 0.0, 0.0, step
        return {
            "steps_per_second": steps / seconds,
            "examples_per_second": steps * examples_per_step / seconds,
            "waited_for_data": share,
        }

    def advance(self, step: int) -> None:
        """Moves the bar; a log is not told of every step."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, row: Mapping[str, float], force: bool = False) -> None:
        """Shows a row of metrics."""
        metrics = {k: v for k, v in row.items() if "/" in k and not k.startswith("learning_rate")}
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if "steps_per_second" in row:
            text += (
                f"  {row['steps_per_second']:.3g} steps/s  "
                f"{row['examples_per_second']:.4g} examples/s  "
                f"data {100 * row['waited_for_data']:.0f}%"
            )
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
            if force:
                self._bar.console.print(f"step {step}  {text}", highlight=False)
            return
        left = ""
        if self._steps and "steps_per_second" in row:
            seconds = (self.total - step) * self._seconds / self._steps
            left = f"  ETA {int(seconds // 60)}:{int(seconds % 60):02d}"
        print(f"step {step}/{self.total}  {text}{left}", file=sys.stderr, flush=True)

    def summary(self) -> None:
        """One last line: what the run did per second, and what of its time went to data."""
        if self._steps:
            print(
                f"{self._steps} steps in {self._seconds:.1f} s: "
                f"{self._steps / self._seconds:.4g} steps/s, "
                f"{self._examples / self._seconds:.5g} examples/s, "
                f"waited for data {100 * self._waited_all / self._seconds:.1f}% of the time",
                file=sys.stderr,
                flush=True,
            )
