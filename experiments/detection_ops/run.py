"""Suppression and ROIAlign on one thread of a CPU, beside torchvision's operators.

    pip install torch torchvision
    taskset -c 0 python experiments/detection_ops/run.py

Both in one process, in turn, with the same boxes and features; first it is shown that both give
the same. Prints the table as Markdown.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchvision.ops

from cvjax.detection.nms import nms
from cvjax.detection.roi_align import roi_align

ROUNDS = 7
STRIDE = 4  # of the map of 160 x 200


def milliseconds(sides: list[Callable]) -> list[list[float]]:
    """Of each side, the time of a call in each round."""
    for call in sides:
        call()
    times = [[] for _ in sides]
    for _ in range(ROUNDS):
        for call, found in zip(sides, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - start))
    return times


def row(name: str, ours: Callable, theirs: Callable) -> None:
    """Prints one row of the table."""
    first, second = milliseconds([ours, theirs])
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    print(
        f"| {name} | {statistics.median(first):.3g} | {statistics.median(second):.3g} | "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}) |",
        flush=True,
    )


def main() -> None:
    """Prints one row for each operation."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    print("| operation | ours, ms | torchvision, ms | ratio (range) |\n|---|---|---|---|")
    for count in (1000, 4000):
        low = rng.uniform(0, 600, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 200, (count, 2))], 1).astype(np.float32)
        scores = rng.random(count, np.float32)
        keep = jax.jit(lambda b, s: nms(b, s, iou_threshold=0.5, max_outputs=100))
        ours, theirs = jax.device_put((boxes, scores)), (torch.tensor(boxes), torch.tensor(scores))
        best = torchvision.ops.nms(*theirs, 0.5)[:100].numpy()
        np.testing.assert_array_equal(np.asarray(keep(*ours).index), best)
        row(
            f"NMS, {count} boxes -> 100",
            lambda keep=keep, given=ours: jax.block_until_ready(keep(*given)),
            lambda given=theirs: torchvision.ops.nms(*given, 0.5)[:100],
        )

    features = rng.normal(size=(1, 160, 200, 256)).astype(np.float32)
    rois = boxes[:1000]

    x = jnp.asarray(features)
    y = torch.tensor(features).permute(0, 3, 1, 2).contiguous().requires_grad_()
    weight = rng.normal(size=(1, 1000, 7, 7, 256)).astype(np.float32)
    weights = torch.tensor(weight[0]).permute(0, 3, 1, 2).contiguous()
    for samples, name in ((2, "ROIAlign"), (None, "ROIAlign, adaptive")):

        def align(x: jax.Array, samples: int | None = samples) -> jax.Array:
            return roi_align(
                [x], rois[None], strides=(STRIDE,), output_size=(7, 7), samples=samples
            )

        def torch_align(samples: int | None = samples) -> torch.Tensor:
            return torchvision.ops.roi_align(
                y, [torch.tensor(rois)], 7, 1 / STRIDE, samples or -1, aligned=True
            )

        def torch_forward(align: Callable = torch_align) -> torch.Tensor:
            with torch.inference_mode():
                return align()

        def torch_both(align: Callable = torch_align) -> torch.Tensor:
            y.grad = None
            (align() * weights).sum().backward()
            return y.grad

        forward = jax.jit(align)
        both = jax.jit(jax.value_and_grad(lambda x, align=align: jnp.sum(align(x) * weight)))
        # Sums of some thousand products in another order.
        np.testing.assert_allclose(forward(x)[0], torch_forward().permute(0, 2, 3, 1), atol=1e-4)
        np.testing.assert_allclose(both(x)[1], torch_both().permute(0, 2, 3, 1), atol=2e-3)
        row(name, lambda call=forward: jax.block_until_ready(call(x)), torch_forward)
        row(
            f"{name} and its gradient", lambda call=both: jax.block_until_ready(call(x)), torch_both
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
