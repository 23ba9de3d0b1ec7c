"""How much sooner does a run start when its programs were compiled before?

    python experiments/second_start/run.py

Starts the main job for two steps and a sample grid, with an empty compilation cache and again with
the one that this left, three times; prints wall time and CPU-seconds of each.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT, ROUNDS = Path(__file__).parents[2], 3


def start(cache: Path, workdir: Path) -> tuple[float, float]:
    """Wall time and CPU-seconds of one run."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began, used = time.perf_counter(), cpu()
    subprocess.run(
        [sys.executable, "main.py", "--config=configs/diffusion.py", "--config.steps=2",
         f"--workdir={workdir}"],
        cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - began, cpu() - used


def main() -> None:
    """Prints a line for each round and the medians."""
    rows = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            first = start(folder / "cache", folder / "first")
            second = start(folder / "cache", folder / "second")
        rows.append((*first, *second))
        print("first {:.1f} s ({:.1f} CPU-s)  second {:.1f} s ({:.1f} CPU-s)".format(*rows[-1]))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print("median: first {:.1f} s ({:.1f} CPU-s)  second {:.1f} s ({:.1f} CPU-s)".format(*medians))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
