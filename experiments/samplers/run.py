"""How many evaluations of one network does each sampler need for good digits?

    python experiments/samplers/run.py

trains the main job and its judge (configs/diffusion.py and classification.py, another seed) in
runs/ if they are not there, draws the same 500 digits by every sampler, without guidance, and
prints their Fréchet distance to the 4,000 training digits in the judge's 64 features ("FD-digits")
for each number of evaluations. Writes results.json and samplers.png beside this file.
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

import main
from cvjax import config as configs
from cvjax import draw
from cvjax.build import build
from cvjax.diffusion import grids, samplers
from cvjax.diffusion.samplers.adaptive import solve
from cvjax.errors import InputError
from cvjax.evaluation import frechet_distance
from cvjax.train.loop import load_state

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
COUNT, PART = 500, 100
BUDGETS = (10, 25, 50)
TOLERANCES = (1e-1, 1e-2, 1e-3)
SAMPLERS = {
    "DDIM = Euler": samplers.ddim,
    "Heun": samplers.heun,
    "Heun, churn": partial(samplers.heun, s_churn=10.0, s_min=0.05, s_max=50.0),
    "DPM-Solver++(2M)": samplers.dpm_solver_2m,
    "UniPC": samplers.unipc,
    "DDPM": samplers.ddpm,
    "Euler-Maruyama": partial(samplers.euler_maruyama, times=grids.log_snr),
    "predictor-corrector": partial(samplers.predictor_corrector, times=grids.log_snr),
    "Heun, Karras": partial(samplers.heun, times=grids.karras),
    "UniPC, log SNR": partial(samplers.unipc, times=grids.log_snr),
}


def load(workdir: Path, config: str, flags: tuple[str, ...] = ()):
    """The task, its state and the data of a run, which is made if it is not there."""
    if not (workdir / "config.json").exists():
        arguments = [f"--config={ROOT}/configs/{config}.py", f"--workdir={workdir}", *flags]
        if code := main.main(arguments):
            sys.exit(code)
    built = build(configs.buildable(configs.load_json(workdir / "config.json")))
    data = built.pop("data")
    state = load_state(
        built["task"], data["train"], workdir, steps=built["steps"], seed=built["seed"],
        batch_size=built["batch_size"], optimizer=built["optimizer"], ema=built["ema"],
    )  # fmt: skip
    return built["task"], state, data


def steps_for(sampler: Any, process: Any, budget: int) -> int | None:
    """Steps for about `budget` evaluations, one or two each; None where the sampler refuses."""
    for steps in (budget, (budget + 1) // 2):
        try:
            if samplers.evaluations(sampler, process, steps) <= budget:
                return steps
        except InputError:
            continue
    return None


def run(workdir: Path, judge_workdir: Path, seed: int) -> dict[str, Any]:
    """{sampler: [[evaluations, FD-digits, agreement], ...]}, and the floor."""
    task, state, data = load(workdir, "diffusion")
    judge, judge_state, _ = load(judge_workdir, "classification", ("--config.seed=100",))
    process, params = task.process, state.averaged_params["network"]
    judge_variables = {"params": judge_state.averaged_params["model"], **judge_state.model_state}

    @jax.jit
    def features(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = (images - judge.mean) / judge.std
        stages = judge.model.apply(judge_variables, inputs, method="features")
        logits = judge.model.apply(judge_variables, inputs)
        return jnp.mean(list(stages.values())[-1], axis=(1, 2)), jnp.argmax(logits, axis=-1)

    def judged(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [features(images[i : i + PART]) for i in range(0, len(images), PART)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def images_of(source: Any, count: int) -> np.ndarray:
        return np.stack([source[i]["image"] for i in range(count)]).astype(np.float32) / 255

    real, _ = judged(images_of(data["train"], 4000))
    held_out = data["test"]
    floor, _ = judged(images_of(held_out, COUNT))
    results = {"real": [[0, frechet_distance(real, floor), 1.0]]}
    print(f"{COUNT} held-out digits: FD {results['real'][0][1]:.2f}", flush=True)

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
        found, named = judged(images)
        distance, agreement = frechet_distance(real, found), float(np.mean(named == labels))
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
        print(f"| {name} | " + ", ".join(f"{n:.0f}: {d:.1f} ({a:.2f})" for n, d, a in rows) + " |")
    series = {
        f"{name}/FD-digits": tuple(zip(*[row[:2] for row in rows], strict=True))
        for name, rows in results.items()
        if name != "real"
    }
    draw.curves(HERE / "samplers.png", series, "FD-digits against evaluations of the network")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs/diffusion")
    parser.add_argument("--judge", type=Path, default=ROOT / "runs/judge")
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    flags = parser.parse_args()
    found = run(flags.workdir, flags.judge, flags.seed)
    report(found)
