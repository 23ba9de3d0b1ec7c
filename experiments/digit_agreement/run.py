"""Does a judge recognize the digits that the main job was asked for?

    python experiments/digit_agreement/run.py

trains the main job in runs/diffusion and the judge (configs/classification.py, another seed) in
runs/judge if they are not there, and asks about four sets of 500 class-conditional samples.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.run import load_run
from cvjax.train.evaluation import evaluate
from experiments.recipes import told, trained, trained_judge


def run(workdir: Path | None, judge_workdir: Path | None, seed: int) -> dict[str, Any]:
    """Returns the judge's own accuracy, and the agreement by guidance weight."""
    task, state, *_ = load_run(trained("diffusion", workdir))
    judge, judge_state, _, held_out = load_run(trained_judge(judge_workdir))
    found, _ = evaluate(judge, judge_state, held_out, batch_size=100)
    result = {"judge accuracy on the held-out digits": found["accuracy"]}

    label = jnp.arange(500) % 10
    sample = jax.jit(task.sample, static_argnames=("guidance", "first"))

    @jax.jit
    def named(image, label):
        batch = {"image": image, "label": label, "valid": jnp.ones(len(label), bool)}
        outputs = judge.predict(
            judge_state.averaged_params, judge_state.model_state, batch, jax.random.key(0)
        )
        return outputs["prediction"]

    for guidance in (1.0, task.guidance):
        sets = []
        for number in range(4):
            key, agreed = jax.random.key(seed + number), []
            for first in range(0, 500, 100):
                part = label[first : first + 100]
                images = sample(state.averaged_params, part, key, guidance=guidance, first=first)
                agreed.append(np.asarray(named(images, part) == part))
            sets.append(round(float(np.concatenate(agreed).mean()), 3))
        result[f"agreement at guidance {guidance:g}, of each 500"] = sets
        result[f"agreement at guidance {guidance:g}, mean"] = round(float(np.mean(sets)), 4)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="of the main job")
    parser.add_argument("--judge", type=Path, help="a classifier's workdir")
    parser.add_argument("--seed", type=int, default=1, help="of the first set")
    flags = parser.parse_args()
    told(lambda: print(json.dumps(run(flags.workdir, flags.judge, flags.seed), indent=2)))
