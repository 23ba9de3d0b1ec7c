"""Does a run that is killed 20 times end as one that is not?

    python experiments/kills/run.py

Trains the recipe of the classifier twice: once undisturbed, once killed with `kill -9` at random
moments (while it imports, compiles, trains, evaluates or saves) and started again by the same
command. Then every array of the last checkpoints is compared, bit by bit.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.train.checkpoint_files import newest, read_arrays
from cvjax.train.writers import read_json_lines

ROOT, KILLS, STEPS = Path(__file__).parents[2], 20, 210


def start(workdir: Path) -> subprocess.Popen:
    """Starts the recipe, with an evaluation and a checkpoint every 10 steps."""
    flags = [f"--config.steps={STEPS}", "--config.evaluate_every=10", "--config.log_every=1"]
    command = [sys.executable, "main.py", "--config=configs/classification.py", *flags]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def last_step(workdir: Path) -> int:
    """The last step in the log; 0 when there is none."""
    rows = read_json_lines(workdir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def main() -> None:
    """Prints a line for each kill, and whether the runs are equal."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        assert start(whole).wait() == 0
        chance = random.Random(0)
        for kill in range(1, KILLS + 1):
            process, began = start(killed), time.monotonic()
            # Every fourth dies at any moment of its start; the others after 1 to 15 more steps.
            patience = chance.uniform(0, 15) if kill % 4 == 0 else 600
            target = last_step(killed) + chance.randint(1, 15)
            while time.monotonic() - began < patience and last_step(killed) < target:
                if process.poll() is not None:
                    break
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.2))
            ended = process.poll() is not None
            process.kill()
            process.wait()
            print(f"kill {kill} at step {last_step(killed)}{' (had ended)' * ended}", flush=True)
        assert start(killed).wait() == 0
        one, other = (newest(run / "checkpoints") for run in (whole, killed))
        arrays = read_arrays(one.path, one.arrays), read_arrays(other.path, other.arrays)
        assert one.step == other.step == STEPS and one.arrays == other.arrays
        differing = [
            name
            for name in one.arrays
            if np.asarray(arrays[0][name]).tobytes() != np.asarray(arrays[1][name]).tobytes()
        ]
        print(f"{len(one.arrays)} arrays at step {one.step}; differing: {differing or 'none'}")
        sys.exit(bool(differing))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
