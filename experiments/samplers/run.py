"""How many evaluations of one network does each sampler need for good digits?

    python experiments/samplers/run.py

trains the main job and its judge (configs/diffusion.py and classification.py, another seed) in
runs/ if they are not there, draws the same 500 digits by every sampler, without guidance, and
prints their FD-digits (as of experiments/frechet) for each number of evaluations. Writes
results.json and samplers.png beside this file.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import draw
from cvjax.diffusion import grids, samplers
from cvjax.diffusion.samplers.adaptive import solve
from cvjax.errors import InputError
from cvjax.evaluation.samples import SampleQuality
from cvjax.run import load_run
from experiments.frechet.run import judge
from experiments.recipes import RUNS, told, trained

HERE = Path(__file__).parent
COUNT, PART = 500, 100
BUDGETS = (10, 25, 50)
TOLERANCES = (1e-1, 1e-2)
SAMPLERS = {
    "DDIM = Euler": samplers.ddim,
    "Heun": samplers.heun,
    "Heun, churn": partial(samplers.heun, s_churn=10.0, s_min=0.05, s_max=50.0),
    "DPM-Solver++(2M)": samplers.dpm_solver_2m,
    "UniPC": samplers.unipc,
    "DDPM": samplers.ddpm,
    "Euler-Maruyama": partial(samplers.euler_maruyama, times=grids.karras),
    "predictor-corrector": samplers.predictor_corrector,
    "DPM-Solver++(2M), quadratic": partial(samplers.dpm_solver_2m, times=grids.quadratic),
    "Heun, quadratic": partial(samplers.heun, times=grids.quadratic),
    "DDPM, quadratic": partial(samplers.ddpm, times=grids.quadratic),
    "DDIM, Karras": partial(samplers.ddim, times=grids.karras),
    "Heun, Karras": partial(samplers.heun, times=grids.karras),
    "UniPC, log SNR": partial(samplers.unipc, times=grids.log_snr),
}
STOCHASTIC = ("Heun, churn", "DDPM", "DDPM, quadratic", "Euler-Maruyama", "predictor-corrector")


def steps_for(sampler: Any, process: Any, budget: int) -> int | None:
    """Steps for about `budget` evaluations, one or two each; None where the sampler refuses."""
    for steps in (budget, (budget + 1) // 2):
        try:
            if samplers.evaluations(sampler, process, steps) <= budget:
                return steps
        except InputError:
            continue
    return None


def run(workdir: Path | None, judge_workdir: Path | None, seed: int) -> dict[str, Any]:
    """{sampler: [[evaluations, FD-digits, agreement], ...]}, and the same of held-out digits."""
    task, state, train, held_out = load_run(trained("diffusion", workdir))
    process, params = task.process, state.averaged_params["network"]
    quality = SampleQuality(judge(judge_workdir), train, held_out, cache=RUNS / "features")
    results: dict[str, Any] = {}
    labels = np.arange(COUNT) % 10

    def score(name: str, sample: Any) -> None:
        @jax.jit
        def part_of(labels: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = samplers.example_keys(jax.random.key(seed), PART, first)
            denoise = lambda x, t: task.network.apply({"params": params}, x, t, labels)  # noqa: E731
            x, count = sample(denoise, process, keys, tuple(task.image_shape))
            return jnp.clip((x + 1) / 2, 0, 1), count

        parts = [part_of(labels[i : i + PART], i) for i in range(0, COUNT, PART)]
        images = np.concatenate([images for images, _ in parts])
        count = float(np.mean([np.mean(count) for _, count in parts]))
        found = quality.score(images, labels)
        distance, agreement = found["FD-digits"], found["agreement"]
        results["real"] = [[0, found["FD-digits_real"], found["agreement_real"]]]
        results.setdefault(name, []).append([count, distance, agreement])
        print(f"{name}, {count:.0f} evaluations: FD {distance:.2f}, {agreement:.3f}", flush=True)
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    for budget in BUDGETS:
        for name, sampler in SAMPLERS.items():
            if steps := steps_for(sampler, process, budget):
                count = samplers.evaluations(sampler, process, steps)
                score(name, lambda *a, s=sampler, n=steps, c=count: (s(*a, n), c))
    for tolerance in TOLERANCES:
        score("adaptive", partial(solve, steps=200, rtol=tolerance, atol=tolerance))
    return results


def report(results: dict[str, list]) -> None:
    """Prints the table and draws the curves."""
    print("\n| sampler | evaluations: FD-digits (agreement) |\n|---|---|")
    for name, rows in results.items():
        print(f"| {name} | " + ", ".join(f"{n:.0f}: {d:.2f} ({a:.2f})" for n, d, a in rows) + " |")
    panel = lambda name: "FD-digits, noise" if name in STOCHASTIC else "FD-digits, ODE"  # noqa: E731
    series = {
        # A point that is far off would hide all others.
        f"{name}/{panel(name)}": tuple(zip(*[row[:2] for row in rows if row[1] < 5], strict=True))
        for name, rows in results.items()
        if name != "real"
    }
    draw.curves(HERE / "samplers.png", series, x="evaluations of the network")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="of the main job")
    parser.add_argument("--judge", type=Path, help="a classifier's workdir")
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    flags = parser.parse_args()
    told(lambda: report(run(flags.workdir, flags.judge, flags.seed)))
