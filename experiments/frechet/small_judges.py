"""How far are samples from real digits in the eyes of small judges, beside other real digits?

    python experiments/frechet/small_judges.py --workdir=runs/diffusion --config.task.guidance=1.0

The features are the 64 of a network of two convolutions, which names about 97 % of the held-out
digits (15 epochs; three seeds). The Frechet distance of 500 samples to the training digits, 50 of
each class, stands beside that of as many held-out digits, and is divided by it: the median of
eight random draws, whose least and largest stand behind it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.classification.task import Classification
from cvjax.config import read_changes
from cvjax.data.sources.digits import Digits
from cvjax.evaluation.extractor import Extractor
from cvjax.evaluation.samples import SampleQuality
from cvjax.run import load_run
from cvjax.train.evaluation import evaluate
from experiments.recipes import fitted, told


class Judge(nn.Module):
    """Images [b, 28, 28, 1] to logits [b, 10]."""

    def setup(self):
        """The layers."""
        self.convolutions = [nn.Conv(16, (3, 3)), nn.Conv(32, (3, 3))]
        self.hidden, self.head = nn.Dense(64), nn.Dense(10)

    def features(self, x: jax.Array) -> dict[str, jax.Array]:
        """A map of one pixel, [b, 1, 1, 64]: it tells where something is, which a mean cannot."""
        for convolution in self.convolutions:
            x = nn.max_pool(nn.relu(convolution(x)), (2, 2), (2, 2))
        return {"hidden": nn.relu(self.hidden(x.reshape(len(x), 1, 1, -1)))}

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """The logits."""
        return self.head(self.features(x)["hidden"])[:, 0, 0]


def draws(source: Digits, count: int = 8, of_each: int = 50) -> Iterator[np.ndarray]:
    """Random sets of real digits, as many of each class, uint8 [n, 28, 28, 1]."""
    labels = np.array([source[i]["label"] for i in range(len(source))])
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(source))
        chosen = [i for c in range(10) for i in order[labels[order] == c][:of_each]]
        yield np.stack([source[i]["image"] for i in chosen])


def main(workdirs: list[Path], changes: list[tuple[str, str]]) -> None:
    """Prints a row for each generator and judge."""
    runs = [load_run(workdir, changes) for workdir in workdirs]
    train, test, some = Digits("train"), Digits("test"), Digits("test", per_class=50)
    judge, accuracies, qualities, floors = Classification(Judge()), [], {}, []
    for seed in range(3):
        state = fitted(
            judge, train, steps=15 * len(train) // 64, batch_size=64, optimizer=optax.adam(1e-3),
            seed=seed, log_every=10_000,
        ).state  # fmt: skip
        accuracies.append(evaluate(judge, state, test, batch_size=100)[0]["accuracy"])
        extractor = Extractor("small", judge.model, lambda *_, s=state: (s.params, {}, None))
        quality = qualities[str(seed)] = SampleQuality(extractor, train, test)
        floors.append([quality.score(images)["FD-small"] for images in draws(test)])
    print("| generator | judge's accuracy | samples | real digits (8 draws) | ratio | agreement |")
    print("|---|---|---|---|---|---|")
    for workdir, (task, state, *_) in zip(workdirs, runs, strict=True):
        found, _ = evaluate(task, state, some, batch_size=100, evaluators=qualities, seed=1)
        for seed, (accuracy, real) in enumerate(zip(accuracies, floors, strict=True)):
            distance, floor = found[f"{seed}/FD-small"], np.median(real)
            agreement = found.get(f"{seed}/agreement", float("nan"))
            print(
                f"| {workdir.name} | {accuracy:.3f} | {distance:.3f} | "
                f"{floor:.3f} ({min(real):.3f} .. {max(real):.3f}) | {distance / floor:.2f} | "
                f"{agreement:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, nargs="+", help="of generators")
    flags, others = parser.parse_known_args()
    told(lambda: main(flags.workdir, read_changes(others, vars(flags))))
