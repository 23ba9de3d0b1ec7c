"""Two processes train together and one goes on alone: the run is what it always was."""

import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from cvjax.train.checkpoint_files import newest, read_arrays
from cvjax.train.writers import read_json_lines
from tests.children import environment

PROGRAM = """
import sys, jax, optax
process, processes, port, workdir, steps, seconds = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
from cvjax.train.loop import fit
from tests.train.toys import Linear, Network, Regression
result = fit(
    Regression(Network(batch_norm=True), noise=0.1), Linear(seconds=float(seconds)),
    steps=int(steps), batch_size=16, optimizer=optax.sgd(1e-3, momentum=0.9), ema=0.9,
    eval_data=Linear(21), evaluate_every=4, workdir=workdir,
)
sys.exit(128 + result.received if result.received else 0)
"""


def start(workdir, steps, processes, seconds=0.0):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    given = port, workdir, str(steps), str(seconds)
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), str(processes), *given],
            env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip


def run(workdir, steps, processes):
    for process in start(workdir, steps, processes):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run(folder / "alone", 8, processes=1)
    run(folder / "together", 4, processes=2)
    run(folder / "together", 8, processes=1)
    return folder


def test_the_parameters_are_those_of_one_process(runs):
    """Sums over two devices are added in another order: float32 rounding over 8 steps."""
    alone, together = (newest(runs / name / "checkpoints") for name in ("alone", "together"))
    assert alone.step == together.step == 8
    alone, together = (read_arrays(saved.path, saved.arrays) for saved in (alone, together))
    for name, array in alone.items():
        np.testing.assert_allclose(together[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_evaluation_is_that_of_one_process(runs):
    """21 examples, of which every process reads all: neither lost nor counted twice."""
    alone, together = (
        [row["eval/loss"] for row in read_json_lines(runs / name / "metrics.jsonl")
         if "eval/loss" in row]
        for name in ("alone", "together")
    )  # fmt: skip
    assert len(alone) == 2
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_both_stop_at_the_same_step_when_one_is_told_to(tmp_path):
    """Else the one would wait for the other at the checkpoint, and that for it in a step.

    Ctrl-C becomes a SIGTERM, of which JAX tells the other process.
    """
    processes = start(tmp_path / "run", 100_000, processes=2, seconds=0.001)
    folder = tmp_path / "run/checkpoints"
    began = time.monotonic()
    while not list(folder.glob("[0-9]*/manifest.json")):
        assert time.monotonic() - began < 100 and all(one.poll() is None for one in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGINT)  # not the one that writes
    for process in processes:
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, text
    saved = newest(folder)
    assert 0 < saved.step < 100_000 and not saved.skipped
