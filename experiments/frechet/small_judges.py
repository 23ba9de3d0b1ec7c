"""How far are samples from real digits in the eyes of small judges, beside other real digits?

    python experiments/frechet/small_judges.py --workdir=runs/diffusion --config.task.guidance=1.0

The features are the 64 of a network of two convolutions, which is trained until it names 97.2 % of
the held-out digits (at most 20 epochs; three seeds). The Frechet distance of 500 samples to the
training digits is given beside that of 500 held-out digits, and divided by it: what features of
another size would give is the same.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax.data.sources.digits import Digits
from cvjax.evaluation.distances import frechet_distance
from cvjax.run import load_run

COUNT, BATCH, EPOCHS, ENOUGH = 500, 64, 20, 0.972


class Judge(nn.Module):
    """Images [b, 28, 28, 1] to features [b, 64] and logits [b, 10]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both."""
        for width in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return features, nn.Dense(10)(features)


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1] and labels."""
    source = Digits(split)
    records = [source[i] for i in range(len(source))]
    images = np.stack([record["image"] for record in records]).astype(np.float32) / 255
    return images, np.array([record["label"] for record in records])


def trained(seed: int, train, test) -> tuple[Callable, float]:
    """A judge, images -> (features, logits), and its accuracy on held-out digits."""
    (images, labels), (held_out, truth) = train, test
    judge, optimizer = Judge(), optax.adam(1e-3)
    params = jax.jit(judge.init)(jax.random.key(seed), images[:1])
    state, rng = optimizer.init(params), np.random.default_rng(seed)

    def loss(params, x, y):
        logits = judge.apply(params, x)[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    apply = jax.jit(judge.apply)
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            params, state = step(params, state, images[rows], labels[rows])
        accuracy = float(np.mean(np.argmax(apply(params, held_out)[1], axis=-1) == truth))
        if accuracy >= ENOUGH:
            break
    return lambda x: apply(params, x), accuracy


def samples(workdir: Path, changes: list[tuple[str, str]], label: np.ndarray) -> np.ndarray:
    """Images of a trained generator for these labels."""
    task, state, _, held_out = load_run(workdir, changes)
    predict, blank = jax.jit(task.predict), np.zeros((BATCH, *held_out[0]["image"].shape))
    found = []
    for first in range(0, len(label), BATCH):
        rows = np.arange(first, first + BATCH)
        batch = {
            "image": blank.astype(np.float32), "label": label[rows % len(label)],
            "valid": np.ones(BATCH, bool), "index": rows.astype(np.int32),
        }  # fmt: skip
        outputs = predict(state.averaged_params, state.model_state, batch, jax.random.key(1))
        found.append(np.asarray(outputs["sample"]))
    return np.concatenate(found)[: len(label)]


def main(workdir: Path, changes: list[tuple[str, str]]) -> None:
    """Prints a row for each judge."""
    label = np.arange(COUNT, dtype=np.int32) % 10
    images = samples(workdir, changes, label)
    train, test = digits("train"), digits("test")
    some = test[0][np.random.default_rng(0).permutation(len(test[0]))[:COUNT]]
    print("| judge's accuracy | samples | real digits | ratio | agreement |\n|---|---|---|---|---|")
    for seed in range(3):
        judge, accuracy = trained(seed, train, test)
        real, (features, logits) = judge(train[0])[0], judge(images)
        distance, floor = (frechet_distance(real, x) for x in (features, judge(some)[0]))
        agreed = float(np.mean(logits.argmax(-1) == label))
        print(
            f"| {accuracy:.3f} | {distance:.2f} | {floor:.2f} | {distance / floor:.2f} | "
            f"{agreed:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of a generator")
    flags, others = parser.parse_known_args()
    for other in others:
        if not other.startswith("--config.") or "=" not in other:
            parser.error(f"there is no flag {other}; a field is --config.x.y=z")
    main(flags.workdir, [tuple(other.removeprefix("--config.").split("=", 1)) for other in others])
