"""Do the images show what their captions say?

    python experiments/text_to_image/run.py

trains the recipe in runs/text_to_image and a judge (configs/classification.py on captioned digits,
another seed) in runs/caption_judge if they are not there; draws the captions of held-out digits in
both stages and asks the judge for the digit; fills the right halves of small drawings; and writes
samples.png and inpainting.png beside the run.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import draw
from cvjax.diffusion.editing import repaint
from cvjax.diffusion.samplers import example_keys
from cvjax.run import load_run
from experiments.recipes import told, trained

SOURCE = "data.sources.captioned_digits.CaptionedDigits"
BATCH = 100


JUDGE = (
    "--config.seed=100", "--config.steps=700", "--config.evaluate_every=700",
    f"--config.data.train.type={SOURCE}", f"--config.data.test.type={SOURCE}",
    "--config.data.test.count=1000",
)  # fmt: skip


def run(workdir: Path | None, judge_workdir: Path | None, count: int, seed: int) -> dict[str, Any]:
    """Returns the agreement with the captions' digits, by guidance weight."""
    workdir = trained("text_to_image", workdir, last="upsampler")
    judge_workdir = trained("classification", judge_workdir, *JUDGE, name="caption_judge")
    base, base_state, *_ = load_run(workdir / "base")
    upsampler, state, _, held_out = load_run(workdir / "upsampler")
    judge, judge_state, _, judged = load_run(judge_workdir)
    records = [held_out[i] for i in range(count)]
    tokens = np.stack([record["tokens"] for record in records])
    labels = np.array([record["label"] for record in records])

    @functools.partial(jax.jit, static_argnames=("guidance", "first"))
    def cascade(tokens, rng, guidance, first):
        low = base.sample(base_state.averaged_params, tokens, rng, guidance=guidance, first=first)
        condition = upsampler.condition(tokens, low)
        rng = jax.random.fold_in(rng, 1)
        return upsampler.sample(state.averaged_params, condition, rng, first=first)

    @jax.jit
    def named(image):
        batch = {"image": image, "label": jnp.zeros(len(image), int),
                 "valid": jnp.ones(len(image), bool)}  # fmt: skip
        params = judge_state.averaged_params
        return judge.predict(params, judge_state.model_state, batch, jax.random.key(0))[
            "prediction"
        ]

    def agreement(images: np.ndarray, labels: np.ndarray) -> float:
        parts = [named(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        return float(np.mean(np.concatenate(parts) == labels))

    real = [judged[i] for i in range(len(judged))]
    images = np.stack([record["image"] for record in real]).astype(np.float32) / 255
    result = {"judge on held-out drawings": agreement(images, [record["label"] for record in real])}
    rng = jax.random.key(seed)
    for guidance in (1.0, base.guidance):
        images = np.concatenate([
            cascade(tokens[i : i + BATCH], rng, guidance, i) for i in range(0, count, BATCH)
        ])  # fmt: skip
        result[f"agreement at guidance {guidance:g}"] = agreement(images, labels)

    # Inpainting in the base model: the left half of a drawing is known.
    shown = np.repeat(base.tokens(base.captions), 8, axis=0)
    rows = np.concatenate([cascade(shown, rng, base.guidance, 0)])
    few = tokens[:16]
    large = np.stack([record["image"] for record in records[:16]]).astype(np.float32) / 255
    small = large.reshape(16, 14, 2, 14, 2, 1).mean(axis=(2, 4))
    is_known = np.broadcast_to(np.arange(14)[None, None, :, None] < 7, small.shape)

    @jax.jit
    def fill(known):
        denoise = base.denoiser(base_state.averaged_params, few)
        keys = example_keys(rng, len(known))
        return repaint(denoise, base.process, keys, known, jnp.asarray(is_known), 25, repeats=4)

    known = 2 * small - 1
    filled = np.asarray(fill(jnp.asarray(known)))
    result["largest change of a known pixel"] = float(np.abs(filled - known)[is_known].max())
    filled = np.clip((filled + 1) / 2, 0, 1)
    holes = np.where(is_known, small, 0.5)
    draw.save_png(workdir / "samples.png", draw.grid(rows, 8))
    draw.save_png(workdir / "inpainting.png", draw.grid(np.concatenate([holes, filled, small]), 16))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="of the recipe")
    parser.add_argument("--judge", type=Path, help="a classifier's workdir")
    parser.add_argument("--count", type=int, default=500, help="captions")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    if flags.count < 1:
        parser.error("--count must be at least 1")
    told(
        lambda: print(
            json.dumps(run(flags.workdir, flags.judge, flags.count, flags.seed), indent=2)
        )
    )
