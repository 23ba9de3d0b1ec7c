"""Two processes train together and one goes on alone: the run is what it always was."""

import socket
import subprocess
import sys

import numpy as np
import pytest

from cvjax.train.checkpoint_files import newest, read_arrays
from cvjax.train.writers import read_json_lines
from tests.children import environment

PROGRAM = """
import sys, jax, optax
process, processes, port, workdir, steps = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
from cvjax.train.loop import fit
from tests.train.toys import Linear, Network, Regression
fit(
    Regression(Network(batch_norm=True), noise=0.1), Linear(), steps=int(steps), batch_size=16,
    optimizer=optax.sgd(1e-3, momentum=0.9), ema=0.9, eval_data=Linear(21),
    evaluate_every=4, workdir=workdir,
)
"""


def run(workdir, steps, processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), str(processes), port, workdir, str(steps)],
            env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    for process in started:
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
