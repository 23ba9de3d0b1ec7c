"""How much does `fit` cost beside the bare jitted step, on the same batches of the main job?

    python experiments/engine_overhead/run.py

Bare steps and `fit` alternate; the medians of their times per step are compared. A second part
runs the no-op task: what is left is the engine and the data path alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import config as configs
from cvjax.build import build
from cvjax.data.loader import Loader
from cvjax.train import sharding
from cvjax.train.noop import NoOp
from cvjax.train.optimizer import optimizers_by_group
from cvjax.train.step import initial_state, make_train_step
from experiments.recipes import fitted

ROOT, STEPS, ROUNDS = Path(__file__).parents[2], 60, 5


def main() -> None:
    """Prints a line for each round and the medians."""
    built = build(configs.buildable(configs.read(f"{ROOT}/configs/diffusion.py")))
    task, source = built["task"], built["data"]["train"]
    batch_size, optimizer, ema = built["batch_size"], built["optimizer"], built["ema"]
    mesh, key = sharding.data_mesh(), jax.random.key(0)
    first = next(Loader(source, batch_size).iterate())
    params, _ = jax.eval_shape(task.init, key, first)
    optimizers = optimizers_by_group(optimizer, params, ["network"], STEPS)
    make = jax.jit(
        lambda key, batch: initial_state(task, batch, key, optimizers, ema),
        out_shardings=sharding.replicated(mesh),
    )
    step = sharding.jit_step(make_train_step(task, optimizers, ema), mesh)
    batches = [b for b, _ in zip(Loader(source, batch_size).iterate(), range(STEPS), strict=False)]

    def bare() -> float:
        state = make(key, first)
        state, _ = step(state, sharding.put_batch(first, mesh))
        jax.block_until_ready(state)
        began = time.perf_counter()
        for batch in batches:
            state, _ = step(state, sharding.put_batch(batch, mesh))
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / STEPS

    def whole() -> float:
        result = fitted(
            task, source, steps=STEPS + 1, batch_size=batch_size, optimizer=optimizer, ema=ema,
            log_every=1, 
        )  # fmt: skip
        rates = [row["steps_per_second"] for row in result.history if row["step"] > 1]
        return sum(1 / rate for rate in rates) / len(rates)

    rows = [(bare(), whole()) for _ in range(ROUNDS)]
    for one, two in rows:
        print(f"bare {1000 * one:.1f} ms  fit {1000 * two:.1f} ms  ratio {two / one:.3f}")
    one, two = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"median: bare {1000 * one:.1f} ms  fit {1000 * two:.1f} ms  ratio {two / one:.3f}")

    result = fitted(NoOp(), source, steps=3000, batch_size=batch_size, log_every=1000)
    rate = statistics.median(row["steps_per_second"] for row in result.history)
    print(f"no-op task: {1e6 / rate:.0f} microseconds a step, data path included")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
