"""How much shorter is a training step on a CPU when its arrays lie in large pages of memory?

    python experiments/large_pages/run.py [recipe ...]

Processes with and without `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, as `main.py` sets it, take
turns. Prints a table: milliseconds of a step, by the clock and of the kernel, and how many pages it
has to give out, each the median over the turns.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

ROOT = Path(__file__).parents[2]
RECIPES = ("mask_rcnn", "segmentation", "retinanet", "diffusion", "classification")
TURNS, STEPS = 3, 20


def measure(recipe: str) -> list[float]:
    """Of one step of a recipe, in this process: milliseconds, the kernel's, and page faults."""
    import jax

    from cvjax import config as configs
    from cvjax.build import build
    from cvjax.data.loader import Loader
    from cvjax.train.step import initial_state, make_train_step

    settings = configs.read(str(ROOT / f"configs/{recipe}.py")).to_dict()
    task, optimizer = build(settings["task"]), build(settings["optimizer"])
    loader = Loader(build(settings["data"]["train"]), settings["batch_size"], seed=0)
    batch = jax.device_put(next(loader.iterate()))
    params, _ = jax.eval_shape(lambda key: task.init(key, batch), jax.random.key(0))
    optimizers = {name: optimizer.build(group, 1000) for name, group in params.items()}
    state = jax.jit(lambda key: initial_state(task, batch, key, optimizers, {}))(jax.random.key(0))
    step = jax.jit(make_train_step(task, optimizers), donate_argnums=0)
    for number in range(STEPS + 3):
        if number == 3:
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        state, _ = step(state, batch)
        jax.block_until_ready(state.step)
    after, ended = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    kernel, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
    return [1e3 * (ended - began) / STEPS, 1e3 * kernel / STEPS, faults / STEPS]


def compare(recipe: str) -> str:
    """A row of the table."""
    import numpy as np

    rows = []
    for turn in range(2 * TURNS):
        environment = {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={turn % 2}"}
        process = subprocess.run(
            [sys.executable, __file__, "--measure", recipe],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        rows.append(json.loads(process.stdout))
    small, large = np.median(rows[::2], axis=0), np.median(rows[1::2], axis=0)
    columns = (f"{a:.0f} -> {b:.0f}" for a, b in zip(small, large, strict=True))
    return f"| {recipe} | {' | '.join(columns)} | {large[0] / small[0]:.2f} |"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("names", nargs="*", help=f"recipes; without any {', '.join(RECIPES)}")
        names = parser.parse_args().names or RECIPES
        if unknown := [n for n in names if not (ROOT / "configs" / f"{n}.py").is_file()]:
            parser.error(f"there is no configs/{unknown[0]}.py")
        print("| recipe | a step, ms | the kernel's, ms | page faults | ratio |")
        print("|---|---|---|---|---|")
        for name in names:
            print(compare(name), flush=True)
