"""What is an encoder worth that has seen the images without their labels?

    python experiments/few_labels/run.py

Trains a masking autoencoder on 4,000 digits without labels, then classifies from 40 labelled ones
(1 %, four of each class): from scratch, and from the autoencoder's encoder. Same network, same
labels, same augmentation, same steps, for each of two learning rates; a seed is all of it anew.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.autoencoder.corrupt import mask_patches
from cvjax.autoencoder.model import Decoder, Encoder
from cvjax.autoencoder.task import Autoencoder
from cvjax.classification.task import Classification
from cvjax.data.sources.digits import Digits
from cvjax.data.transforms.geometry import random_affine
from cvjax.train.optimizer import Optimizer
from cvjax.train.restore import load_params
from experiments.recipes import fitted

AFFINE = partial(random_affine, degrees=10.0, scale=(0.9, 1.1), pixels=1.0)


def optimizer(rate: float) -> Optimizer:
    """AdamW with a cosine schedule."""
    return Optimizer(
        partial(optax.adamw, b2=0.99),
        partial(optax.cosine_decay_schedule, rate),
        warmup_steps=20,
        weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
    )


def pretrain(workdir: Path, seed: int, steps: int) -> None:
    """Leaves an autoencoder's checkpoint in `workdir`."""
    task = Autoencoder(
        Encoder(32), Decoder((28, 28, 1)), corrupt=partial(mask_patches, rate=0.5, patch=4)
    )
    fitted(
        task, Digits("train"), steps=steps, batch_size=64, seed=seed, optimizer=optimizer(2e-3),
        workdir=workdir, log_every=100, tensorboard=False,
    )  # fmt: skip


def accuracy(seed: int, rate: float, steps: int, workdir: Path | None) -> float:
    """Held-out accuracy after learning from 40 labels."""
    initialize = None
    if workdir is not None:
        initialize = partial(load_params, path=workdir, take={"model/encoder": "model"})
    result = fitted(
        # The autoencoder's encoder sees images in [0, 1].
        Classification(Encoder(10), label_smoothing=0.1, mean=0.0, std=1.0),
        Digits("train", per_class=4), steps=steps, batch_size=40, seed=seed,
        optimizer=optimizer(rate), eval_data=Digits("test"), initialize=initialize,
        loader={"transforms": (AFFINE,)}, log_every=50,
    )  # fmt: skip
    return result.history[-1]["eval/accuracy"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--pretraining-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=150)
    flags = parser.parse_args()
    if min(flags.steps, flags.pretraining_steps) < 1 or min(flags.rates) <= 0:
        parser.error("--steps, --pretraining-steps and --rates must be above 0")
    found = {}
    for seed in flags.seeds:
        with tempfile.TemporaryDirectory() as folder:
            workdir, began = Path(folder) / "run", time.process_time()
            pretrain(workdir, seed, flags.pretraining_steps)
            print(f"seed {seed}: pretrained in {time.process_time() - began:.0f} CPU-seconds")
            for rate in flags.rates:
                for name, start in (("from scratch", None), ("from the autoencoder", workdir)):
                    value = accuracy(seed, rate, flags.steps, start)
                    found.setdefault((name, rate), []).append(value)
                    print(f"seed {seed}, rate {rate}, {name}: {value:.3f}", flush=True)
    for (name, rate), values in sorted(found.items()):
        row = " | ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {rate} | {row} | {np.mean(values):.3f} |")


if __name__ == "__main__":
    main()
