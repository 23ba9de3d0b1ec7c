"""How long does a convolution take: XLA's, the gathered one of `fast_conv`, oneDNN's, PyTorch's?

    pip install torch && python experiments/step_time/layers.py

In the environment of `main.py`, oneDNN's as by its flag `--onednn`. 3 x 3, stride 1, float32. The
sides take turns in one process; milliseconds, the median of ten blocks of 50 ms or more: forward /
forward and both gradients. Prints the table as Markdown.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import cpu

if __name__ == "__main__":
    cpu.begin_again()  # before anything heavy is imported

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cvjax.nn import fast_conv
from cvjax.nn.onednn import use_onednn

PADDING = ((1, 1), (1, 1))
SHAPES = (  # batch, side, channels
    (64, 28, 32), (8, 32, 64), (64, 14, 64), (32, 16, 64), (8, 28, 128), (64, 7, 64), (32, 8, 128),
    (32, 4, 256), (8, 4, 512), (32, 2, 512),
)  # fmt: skip


def jax_steps(convolve: Callable, x: np.ndarray, kernel: np.ndarray) -> tuple[Callable, Callable]:
    """The forward pass, and it with both gradients."""

    def both(x: jax.Array, kernel: jax.Array) -> tuple:
        y, pull = jax.vjp(convolve, x, kernel)
        return y, pull(y)

    given = jax.device_put((x, kernel))

    def step(program: Callable) -> None:
        jax.block_until_ready(program(*given))

    programs = (jax.jit(run).lower(*given).compile() for run in (convolve, both))
    return tuple(partial(step, program) for program in programs)


def torch_steps(x: np.ndarray, kernel: np.ndarray) -> tuple[Callable, Callable]:
    """The same in PyTorch, channels last."""
    image = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1))
    weight = weight.contiguous(memory_format=torch.channels_last)
    given = [value.requires_grad_() for value in (image, weight)]
    convolve = partial(torch.nn.functional.conv2d, image, weight, padding=1)

    def forward() -> None:
        with torch.inference_mode():
            convolve()

    def both() -> None:
        y = convolve()
        torch.autograd.grad(y, given, y.detach())

    return forward, both


def milliseconds(steps: list[Callable]) -> list[float]:
    """The median of each, in turn."""
    times, counts = [[] for _ in steps], []
    for step in steps:
        step()
        began = time.perf_counter()
        step()
        counts.append(1 + int(0.05 / (time.perf_counter() - began)))
    for _ in range(10):
        for step, count, found in zip(steps, counts, times, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                step()
            found.append(1000 * (time.perf_counter() - began) / count)
    return [statistics.median(found) for found in times]


def own(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As `nn.Conv` has it."""
    dimensions = fast_conv.DIMENSIONS
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), PADDING, dimension_numbers=dimensions)


def main() -> None:
    """Prints a row for each shape; what `fast_conv` chooses without oneDNN is bold."""
    arrays = {}
    for batch, side, channels in SHAPES:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((batch, side, side, channels), np.float32)
        kernel = rng.standard_normal((3, 3, channels, channels), np.float32) / 100
        arrays[batch, side, channels] = x, kernel
    gathered = partial(fast_conv._gathered, strides=(1, 1), padding=PADDING)
    without = {
        shape: [jax_steps(convolve, *given) for convolve in (own, gathered)]
        for shape, given in arrays.items()
    }
    chosen = {
        shape: int(fast_conv._is_gathered(*map(jnp.asarray, given), (1, 1), PADDING))
        for shape, given in arrays.items()
    }
    use_onednn()  # for what is compiled from here on
    print("| batch, map, channels | XLA | gathered | oneDNN | PyTorch |\n|---|---|---|---|---|")
    for (batch, side, channels), (x, kernel) in arrays.items():
        by_onednn = jax_steps(lambda x, kernel: own(x, kernel), x, kernel)
        pairs = [*without[batch, side, channels], by_onednn, torch_steps(x, kernel)]
        times = milliseconds([step for pair in pairs for step in pair])
        cells = [f"{a:.1f} / {b:.1f}" for a, b in zip(times[::2], times[1::2], strict=True)]
        best = chosen[batch, side, channels]
        cells[best] = f"**{cells[best]}**"
        print(f"| {batch}, {side} x {side}, {channels} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
