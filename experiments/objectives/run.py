"""Which objective learns most from the same steps?

    python experiments/objectives/run.py

trains the network of the main job with each objective for as many steps, in runs/objectives, and
prints FD-digits and agreement (experiments/frechet) of 1,000 samples without guidance.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import main
from cvjax.evaluation.samples import SampleQuality
from cvjax.run import load_run
from cvjax.train.evaluation import evaluate
from experiments.frechet.run import judge
from experiments.recipes import ROOT, RUNS, told

UNIFORM = ("task.sampler.times.type=diffusion.grids.uniform",)
PLAIN = (*UNIFORM, "task.weighting=None")  # all errors count the same
VP = "task.process.type=diffusion.process.VariancePreserving"
# A recipe, what is changed in it, and all else as in the main job.
OBJECTIVES = {
    "flow matching, x0, weighted": ("diffusion", UNIFORM),
    "flow matching, velocity": ("diffusion", (*PLAIN, "task.process.prediction=velocity")),
    "VP cosine, v": (
        "diffusion",
        (*PLAIN, VP, "task.process.schedule=cosine", "task.process.prediction=v"),
    ),
    "VP cosine, x0, min-SNR": (
        "diffusion",
        (
            *UNIFORM, VP, "task.process.schedule=cosine", "task.process.prediction=x0",
            "task.weighting.type=diffusion.losses.min_snr",
        ),
    ),
    "VP linear, eps": (
        "diffusion",
        (*PLAIN, VP, "task.process.schedule=linear", "task.process.prediction=eps"),
    ),
    "EDM, preconditioned": (
        "score_sde",
        (
            "task.sampler.type=diffusion.samplers.dpm_solver_2m",
            "task.sampler.times.type=diffusion.grids.karras",
        ),
    ),
}  # fmt: skip


def run(steps: int, seeds: int, judge_workdir: Path | None) -> None:
    """Prints a row for each objective: the figures of each seed, and their means."""
    print("| objective | FD-digits | mean | agreement | mean |\n|---|---|---|---|---|")
    quality = None
    for name, (recipe, changes) in OBJECTIVES.items():
        rows = []
        for seed in range(seeds):
            workdir = RUNS / "objectives" / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
            common = (
                f"seed={seed}", f"steps={steps}", f"evaluate_every={steps}", "task.guidance=1.0",
                "task.sample_steps=25",
            )  # fmt: skip
            flags = [f"--config.{change}" for change in (*changes, *common)]
            arguments = [f"--config={ROOT}/configs/{recipe}.py", f"--workdir={workdir}", *flags]
            if code := main.main(arguments):
                sys.exit(code)
            task, state, train, test = load_run(workdir)
            if quality is None:
                cache = RUNS / "features"
                quality = SampleQuality(judge(judge_workdir), train, test, cache=cache)
            found, _ = evaluate(
                task, state, test, batch_size=100, evaluators={"of": quality}, seed=seed
            )
            rows.append([found["of/FD-digits"], found["of/agreement"]])
            print(name, seed, found, file=sys.stderr, flush=True)
        columns = np.transpose(rows)
        cells = [
            f"{', '.join(f'{value:.{digits}f}' for value in column)} | {column.mean():.{digits}f}"
            for column, digits in zip(columns, (2, 3), strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--judge", type=Path, help="a classifier's workdir")
    flags = parser.parse_args()
    if min(flags.steps, flags.seeds) < 1:
        parser.error("--steps and --seeds must be at least 1")
    told(lambda: run(flags.steps, flags.seeds, flags.judge))
