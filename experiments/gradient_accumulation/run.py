"""How should gradients be accumulated? Five ways, on 1, 2 and 8 (virtual) devices.

    python experiments/gradient_accumulation/run.py

For each: is the gradient that of one large batch, what memory does the compiled step need, how
long does it take, and how many all-reduces of how many bytes does it make, within the loop and
after it. Prints the table as Markdown and draws `accumulation.png`.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[2]))

import re
import statistics
import time

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec
from tasks import CONTRASTIVE, NORM, PLAIN, batch_of, cached_gradient

from cvjax.train import sharding
from cvjax.train.step import initial_state, make_train_step

EXAMPLES, PARTS, ROUNDS = 512, 8, 15
LOSSES = {
    "plain": (PLAIN, False),
    "BatchNorm": (NORM, False),
    "ragged": (PLAIN, True),
    "contrastive": (CONTRASTIVE, False),
}
WAYS = ("one batch", "MultiSteps", "scan, jit", "scan, shard_map", "gradient cache")


def build(way: str, task, mesh):
    """(state, compiled step, batches that make one update) for a way; the rate is 1, so that what
    the parameters lose is the gradient."""
    optimizer = optax.sgd(1.0)
    if way == "MultiSteps":
        optimizer = optax.MultiSteps(optimizer, PARTS).gradient_transformation()
    optimizers = {"model": optimizer}
    example = {name: x[: mesh.size] for name, x in batch_of(EXAMPLES, False).items()}
    state = jax.jit(
        lambda key: initial_state(task, example, key, optimizers, {}),
        out_shardings=sharding.replicated(mesh),
    )(jax.random.key(0))
    parts = PARTS if way.startswith("scan") else 1
    axis = sharding.AXIS if way == "scan, shard_map" else None
    step = make_train_step(task, optimizers, {}, axis, parts)
    if way == "gradient cache":

        def step(state, batch):
            gradient = cached_gradient(task, state.params["model"], batch["image"], PARTS)
            params = jax.tree.map(lambda p, g: p - g, state.params["model"], gradient)
            return state.replace(params={"model": params}), {}

    if axis:
        # check_vma=False: with the check, jax sums the gradient over the devices by itself, and
        # the mean in our step comes on top.
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(axis)),
            out_specs=PartitionSpec(), check_vma=False,
        )  # fmt: skip
    return state, jax.jit(step)


def batches(way: str, ragged: bool, mesh):
    """What the step is called with for one update: the whole batch, or its parts."""
    whole = batch_of(EXAMPLES, ragged)
    if way != "MultiSteps":
        return [sharding.put_batch(whole, mesh)]
    pieces = [{name: x[i::PARTS] for name, x in whole.items()} for i in range(PARTS)]
    return [sharding.put_batch(piece, mesh) for piece in pieces]


def update(state, step, pieces):
    """The state after one update."""
    for piece in pieces:
        state, _ = step(state, piece)
    return jax.block_until_ready(state)


def gradient(before, after) -> np.ndarray:
    """All that the parameters lost, in one vector."""
    leaves = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
    return np.concatenate([(np.asarray(a) - np.asarray(b)).ravel() for a, b in leaves])


def all_reduces(text: str) -> tuple[int, int, int, int]:
    """(number, bytes) of the all-reduces outside loops, then of one turn of the loops."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    calls, found = {}, {}
    name = None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line.strip()):
            name = start.group(1)
            calls[name], found[name] = set(), []
        if name is None:
            continue
        calls[name] |= set(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line))
        if re.search(r" all-reduce(-start)?\(", line):
            shapes = line.split("all-reduce")[0] if "= " not in line else line.split("= ", 1)[1]
            shapes = shapes.split(" all-reduce")[0]
            sizes = [
                int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
                * {"f32": 4, "s32": 4, "pred": 1, "f64": 8, "u32": 4}[kind]
                for kind, dims in re.findall(r"(f32|s32|pred|f64|u32)\[([\d,]*)\]", shapes)
            ]
            found[name].append(sum(sizes))
    inside, queue = set(), list(bodies)
    while queue:
        one = queue.pop()
        if one not in inside:
            inside.add(one)
            queue += calls.get(one, ())
    out = [size for name, sizes in found.items() if name not in inside for size in sizes]
    within = [size for name, sizes in found.items() if name in inside for size in sizes]
    return len(out), sum(out), len(within), sum(within)


def main() -> None:
    """Prints the table and draws the plot."""
    print(f"batch {EXAMPLES}, {PARTS} parts\n")
    print("| devices | way | " + " | ".join(LOSSES) + " | memory MB | ms | all-reduces | in loop |")
    print("|---|---|" + "---|" * (len(LOSSES) + 4))
    drawn = {}
    for devices in (1, 2, 8):
        mesh = sharding.data_mesh(jax.devices()[:devices])
        reference, runs, rows = {}, {}, {}
        for way in WAYS:
            cells = []
            for name, (task, ragged) in LOSSES.items():
                if way == "gradient cache" and name != "contrastive":
                    cells.append("-")
                    continue
                state, step = build(way, task, mesh)
                pieces = batches(way, ragged, mesh)
                found = gradient(state, update(state, step, pieces))
                expected = reference.setdefault(name, found)
                error = np.abs(found - expected).max() / np.abs(expected).max()
                cells.append("equal" if error < 1e-5 else f"off by {error:.0e}")
                timed = "contrastive" if way == "gradient cache" else "plain"
                if name == timed:
                    compiled = step.lower(state, pieces[0]).compile()
                    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
                    runs[way] = state, step, pieces
                    rows[way] = memory, all_reduces(compiled.as_text())
            rows[way] = cells, *rows[way]
        times = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way, (state, step, pieces) in runs.items():
                began = time.perf_counter()
                update(state, step, pieces)
                times[way].append(1000 * (time.perf_counter() - began))
        for way, (cells, memory, (count, size, inner, inner_size)) in rows.items():
            ms = statistics.median(times[way])
            turns = PARTS if way == "MultiSteps" else 1
            outside = f"{count * turns} ({size * turns / 1e3:.0f} kB)"
            inside = f"{inner} x {PARTS} ({inner_size * PARTS / 1e3:.0f} kB)" if inner else "0"
            print(
                f"| {devices} | {way} | {' | '.join(cells)} | {memory:.1f} | {ms:.0f} | {outside} "
                f"| {inside} |",
                flush=True,
            )
            drawn[devices, way] = memory, ms
    draw(drawn)


def draw(rows: dict[tuple[int, str], tuple[float, float]]) -> None:
    """Memory and time of every way, as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for column, title in enumerate(("temporary memory of a device, MB", "an update, ms")):
        axes = figure.add_subplot(1, 2, column + 1)
        for number, way in enumerate(WAYS):
            heights = [rows[devices, way][column] for devices in (1, 2, 8)]
            axes.bar(np.arange(3) + 0.16 * (number - 2), heights, 0.16, label=way)
        axes.set(title=title, xlabel="devices")
        axes.set_xticks(range(3), ["1", "2", "8"])
    axes.legend(fontsize="small")
    figure.savefig(Path(__file__).with_name("accumulation.png"), dpi=90)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
