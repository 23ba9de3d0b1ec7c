"""Processes that take turns, so that what else the machine does falls on all of them alike."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from cvjax.cpu import ENVIRONMENT  # noqa: E402

# PyTorch's side may have an interpreter of its own: no one need have both, nor both for one Python.
TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable)
TORCH_MODES = ("eager", "channels_last", "compile")
OUR_MODES = ("jax", "onednn")
MODES, ROUNDS, SECONDS = (*OUR_MODES, *TORCH_MODES), 5, 1.0
HEADER = (
    "| network | | ours, ms | by oneDNN | eager | channels-last | compile | ratio (range) "
    "| by oneDNN (range) |\n|---|---|---|---|---|---|---|---|---|"
)


def serve(step: Callable[[], Any]) -> None:
    """Warms up, says "ready", and answers each number of steps with the milliseconds of one.

    The first step of a turn is not timed: a host that took the memory back, while others had their
    turn, is slow to give it again.
    """
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        step()
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(1000 * (time.perf_counter() - began) / int(line), flush=True)


class Worker:
    """A process that times steps when it is asked to; in the environment that `main.py` gives."""

    def __init__(self, script: Path, mode: str, *arguments: str):
        environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": str(ROOT)}
        python = TORCH_PYTHON if mode in TORCH_MODES else sys.executable
        self.process = subprocess.Popen(
            [python, str(script), mode, *arguments], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self.process.stdout.readline() != "ready\n":
            sys.exit(self.process.stderr.read()[-3000:])

    def time(self, steps: int) -> float:
        """Milliseconds a step."""
        print(steps, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(script: Path, name: str, kind: str) -> str:
    """A row of the table, of `script MODE NAME KIND` in all modes in turn.

    The ratios are ours to that of PyTorch's three ways which has the least median, by rounds.
    """
    from cvjax.nn.onednn import why_not  # PyTorch's interpreter, which has JAX or not, comes by

    modes = [mode for mode in MODES if mode != "onednn" or why_not() is None]
    workers = {mode: Worker(script, mode, name, kind) for mode in modes}
    steps = {mode: max(1, round(1000 * SECONDS / one.time(2))) for mode, one in workers.items()}
    times = {mode: [] for mode in modes}
    for _ in range(ROUNDS):
        for mode, worker in workers.items():
            times[mode].append(worker.time(steps[mode]))
    for worker in workers.values():
        worker.close()
    best = min(TORCH_MODES, key=lambda mode: statistics.median(times[mode]))
    cells = [f"{statistics.median(times[mode]):.1f}" if mode in modes else "-" for mode in MODES]
    for mode in OUR_MODES:
        if mode not in modes:
            cells.append("-")
            continue
        ratios = sorted(a / b for a, b in zip(times[mode], times[best], strict=True))
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})")
    return f"| {name} | {kind} | {' | '.join(cells)} |"
