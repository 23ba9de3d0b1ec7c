"""What are published weights worth, when there are 300 images to learn from?

    python experiments/finetuning/run.py

Trains `configs/finetune.py` as it is, from scratch, and with everything but the head frozen, with
two learning rates, so that none of the three is at a disadvantage; the better one with two seeds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import config as configs
from cvjax.build import build
from experiments.recipes import fitted

RATES, SEEDS = (1e-3, 3e-3), (0, 1)
HEAD_ALONE = (("head/.*", False), (".*", True))


def accuracy(kind: str, rate: float, seed: int) -> float:
    """Held-out accuracy of one run."""
    config = configs.read(str(Path(__file__).parents[2] / "configs/finetune.py"))
    config.optimizer.learning_rate.init_value, config.seed = rate, seed
    built = build(config.to_dict())
    data = built.pop("data")
    if kind == "from scratch":
        del built["initialize"]
    if kind == "head alone":
        object.__setattr__(built["optimizer"], "freeze", HEAD_ALONE)
    with tempfile.TemporaryDirectory() as folder:
        result = fitted(
            data=data["train"], eval_data=data["test"], workdir=Path(folder) / "run",
            tensorboard=False, **built,
        )  # fmt: skip
    return result.history[-1]["eval/accuracy"]


def main() -> None:
    """Prints a line for each kind and rate; the best rate of each is run with all seeds."""
    for kind in ("fine-tuned", "from scratch", "head alone"):
        found = {}
        for rate in RATES:
            began = time.process_time()
            found[rate] = accuracy(kind, rate, SEEDS[0])
            seconds = time.process_time() - began
            print(f"{kind}, rate {rate}: {found[rate]:.3f} ({seconds:.0f} CPU s)", flush=True)
        best = max(found, key=found.get)
        others = [accuracy(kind, best, seed) for seed in SEEDS[1:]]
        text = ", ".join(f"{value:.3f}" for value in [found[best], *others])
        print(f"{kind}, rate {best}, seeds {SEEDS}: {text}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
