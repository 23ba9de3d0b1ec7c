"""How far are samples from real digits in the eyes of small judges, beside other real digits?

    python experiments/frechet/small_judges.py --workdir=runs/diffusion --config.task.guidance=1.0

The features are the 64 of a network of two convolutions, which names about 97 % of the held-out
digits (15 epochs; three seeds). The Frechet distance of 500 samples to the training digits stands
beside that of 500 held-out digits, the first 50 of each class, and is divided by it.
"""

import argparse
import sys
from pathlib import Path

import flax.linen as nn
import jax
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.classification.task import Classification
from cvjax.data.sources.digits import Digits
from cvjax.evaluation.extractor import Extractor
from cvjax.evaluation.samples import SampleQuality
from cvjax.run import load_run
from cvjax.train.evaluation import evaluate
from cvjax.train.loop import fit
from experiments.recipes import changes_in, told


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


def main(workdirs: list[Path], changes: list[tuple[str, str]]) -> None:
    """Prints a row for each generator and judge."""
    runs = [load_run(workdir, changes) for workdir in workdirs]
    train, test, some = Digits("train"), Digits("test"), Digits("test", per_class=50)
    judge, accuracies, qualities = Classification(Judge()), [], {}
    for seed in range(3):
        state = fit(
            judge, train, steps=15 * len(train) // 64, batch_size=64, optimizer=optax.adam(1e-3),
            seed=seed, log_every=10_000,
        ).state  # fmt: skip
        accuracies.append(evaluate(judge, state, test, batch_size=100)[0]["accuracy"])
        extractor = Extractor("small", judge.model, lambda *_, s=state: (s.params, {}, None))
        qualities[str(seed)] = SampleQuality(extractor, train, some)
    print("| generator | judge's accuracy | samples | real digits | ratio | agreement |")
    print("|---|---|---|---|---|---|")
    for workdir, (task, state, *_) in zip(workdirs, runs, strict=True):
        found, _ = evaluate(task, state, some, batch_size=100, evaluators=qualities, seed=1)
        for seed, accuracy in zip(qualities, accuracies, strict=True):
            distance, floor = (found[f"{seed}/FD-small{of}"] for of in ("", "_real"))
            agreement = found.get(f"{seed}/agreement", float("nan"))
            print(
                f"| {workdir.name} | {accuracy:.3f} | {distance:.3f} | {floor:.3f} | "
                f"{distance / floor:.2f} | {agreement:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, nargs="+", help="of generators")
    flags, others = parser.parse_known_args()
    told(lambda: main(flags.workdir, changes_in(others)))
