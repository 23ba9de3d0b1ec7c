"""How many bits for each pixel does a network's density give to digits that it has not seen?

    python experiments/bits_per_dimension/run.py

trains the main job (configs/diffusion.py) with a network that predicts the velocity, in
runs/diffusion-velocity, if it is not there, and prints the bits per dimension of held-out digits,
each given its class, by the variational bound and by the probability flow ODE with Hutchinson's
estimate: first of the network as it is, then after some more steps on dequantized digits.

A digit is uint8; what is measured is x = 2 (pixel + u) / 256 - 1 with u uniform in [0, 1), whose
density in nats becomes bits for a pixel with the offset log2(256 / 2) = 7
(`cvjax.diffusion.likelihood` explains it).
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.diffusion.likelihood import bits_per_dimension, dequantize, ode_log_likelihood, vlb
from cvjax.diffusion.process import logit_normal
from cvjax.diffusion.samplers import example_keys
from cvjax.diffusion.task import Diffusion
from cvjax.run import load_run
from cvjax.train.optimizer import Optimizer
from cvjax.train.restore import load_params
from cvjax.train.step import warmed_up_decay
from experiments.recipes import fitted, told, trained

VELOCITY = (
    "--config.task.process.prediction=velocity", "--config.task.weighting=None",
    "--config.steps=1800",
)  # fmt: skip
PART = 50  # digits at once
VLB_STEPS, ODE_STEPS = 64, 20  # 64 and 80 evaluations of the network


def measure(task: Diffusion, params: Any, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Bits per dimension by the bound and by the ODE, [2, n], of uint8 images [n, h, w, c]."""

    @jax.jit
    def part_of(pixels: jax.Array, labels: jax.Array, first: jax.Array) -> jax.Array:
        x = dequantize(pixels, example_keys(jax.random.key(0), PART, first))
        keys = example_keys(jax.random.key(1), PART, first)
        denoise = task.denoiser(params, labels, guidance=1.0)
        found = (
            vlb(denoise, task.process, x, keys, VLB_STEPS),
            ode_log_likelihood(denoise, task.process, x, keys, ODE_STEPS),
        )
        return bits_per_dimension(jnp.stack(found), x[0].size)

    parts = [
        part_of(pixels[i : i + PART], labels[i : i + PART], i) for i in range(0, len(pixels), PART)
    ]
    return np.concatenate(parts, axis=1)


def dequantized(example: dict, rng: np.random.Generator) -> dict:
    """A transform: uint8 to float32 in [0, 1), uniform in a grey level, other noise each epoch."""
    image = example["image"]
    return example | {"image": (image + rng.random(image.shape, np.float32)) / 256}


def trained_on(task: Diffusion, data: Any, workdir: Path, steps: int) -> tuple[Diffusion, Any]:
    """The task and its averaged parameters after more steps on dequantized digits.

    Small noise decides about a density, so that early times come more often than for pictures.
    """
    times = partial(logit_normal, mean=-2.0, std=2.5)
    task = replace(task, process=replace(task.process, times=times), class_dropout=0.0, guidance=1)
    state = fitted(
        task,
        data,
        steps=steps,
        batch_size=32,
        optimizer=Optimizer(
            optax.adam, partial(optax.cosine_decay_schedule, 1e-3), warmup_steps=20, clip_norm=1.0
        ),
        ema=partial(warmed_up_decay, decay=0.99),
        loader=dict(transforms=(dequantized,)),
        initialize=partial(load_params, path=workdir, use_ema=True),
        log_every=100,
        tensorboard=False,
    ).state
    return task, state.averaged_params


def report(name: str, bits: np.ndarray) -> None:
    """A row of the table: means and their standard errors."""
    columns = [*bits, bits[0] - bits[1]]
    told = [f"{x.mean():.3f} +- {x.std() / np.sqrt(len(x)):.3f}" for x in columns]
    print(f"| {name} | {' | '.join(told)} |", flush=True)


def run(workdir: Path, count: int, steps: int) -> None:
    """Prints the table."""
    task, state, train, test = load_run(workdir)
    chosen = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:count]]
    pixels, labels = (np.stack([record[name] for record in chosen]) for name in ("image", "label"))
    print("| network | VLB | ODE | VLB - ODE |\n|---|---|---|---|")
    report(
        "as it was trained, on grey levels", measure(task, state.averaged_params, pixels, labels)
    )
    if steps:
        later = trained_on(task, train, workdir, steps)
        report(f"after {steps} steps on dequantized digits", measure(*later, pixels, labels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="of another run")
    parser.add_argument("--count", type=int, default=200, help="held-out digits, times of 50")
    parser.add_argument("--steps", type=int, default=400, help="on dequantized digits; 0 for none")
    flags = parser.parse_args()
    if flags.count < 50 or flags.count % 50 or flags.steps < 0:
        parser.error("--count must be a multiple of 50, at least 50; --steps at least 0")
    told(
        lambda: run(
            trained("diffusion", flags.workdir, *VELOCITY, name="diffusion-velocity"),
            flags.count,
            flags.steps,
        )
    )
