"""How long are our training steps and predictions beside PyTorch's, on this machine?

    pip install torch==2.13.0 timm && python experiments/step_time/run.py

Each network runs in one process of ours and three of PyTorch's (eager, channels-last, compiled and
channels-last), which take turns; the ratio is ours to the fastest of theirs, round by round.
Prints the table as Markdown. Add names to measure only those.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from networks import NETWORKS

FOLDER = Path(__file__).parent

MODES, ROUNDS, SECONDS = ("jax", "eager", "channels_last", "compile"), 5, 1.0


class Worker:
    """A process that times steps when it is asked to."""

    def __init__(self, mode: str, name: str, kind: str):
        environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, str(FOLDER / "worker.py"), mode, name, kind], env=environment,
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


def main(names: list[str]) -> None:
    """Prints a row for each network and kind."""
    print("| network | | ours, ms | eager | channels-last | compile | ratio (range) |")
    print("|---|---|---|---|---|---|---|")
    for name in names or NETWORKS:
        for kind in ("train", "inference"):
            workers = {mode: Worker(mode, name, kind) for mode in MODES}
            steps = {
                mode: max(1, round(1000 * SECONDS / worker.time(2)))
                for mode, worker in workers.items()
            }
            times = {mode: [] for mode in MODES}
            for _ in range(ROUNDS):
                for mode, worker in workers.items():
                    times[mode].append(worker.time(steps[mode]))
            for worker in workers.values():
                worker.close()
            best = min(MODES[1:], key=lambda mode: statistics.median(times[mode]))
            ratios = sorted(a / b for a, b in zip(times["jax"], times[best], strict=True))
            cells = [f"{statistics.median(times[mode]):.1f}" for mode in MODES]
            print(
                f"| {name} | {kind} | {' | '.join(cells)} | {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} .. {ratios[-1]:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
