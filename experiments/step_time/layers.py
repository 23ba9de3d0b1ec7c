"""How long does a convolution take: XLA's, the other forms of `fast_conv`, oneDNN's, PyTorch's?

    pip install torch && python experiments/step_time/layers.py

In the environment of `main.py`, oneDNN's as by its flag `--onednn`; float32. First 3 x 3 ones of
stride 1, then those of few channels, then depthwise ones, at last bilinear enlargement. The sides
take turns in one process; milliseconds, the median of ten blocks of 50 ms or more: forward /
forward and all gradients. Prints four tables as Markdown.
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

from cvjax.nn.bilinear import resize_bilinear
from cvjax.nn.depthwise import depthwise_conv
from cvjax.nn.fast_conv import DIMENSIONS, _form, _gathered, fast_conv
from cvjax.nn.onednn import use_onednn

BREAK = 0.05  # seconds before a block, while PyTorch's threads still wait for more by spinning
SHAPES = (  # batch, side, channels
    (64, 28, 32), (8, 32, 64), (64, 14, 64), (32, 16, 64), (8, 28, 128), (64, 7, 64), (32, 8, 128),
    (32, 4, 256), (8, 4, 512), (32, 2, 512),
)  # fmt: skip
NARROW = (  # batch, side, channels, features, stride
    (64, 28, 1, 8, 1), (64, 28, 8, 8, 1), (64, 14, 16, 16, 1), (8, 96, 16, 16, 1),
    (8, 96, 3, 16, 1), (8, 224, 3, 32, 2),
)  # fmt: skip
DEPTHWISE = (  # batch, side, channels, side of the kernel, stride: of ConvNeXt-T and EfficientNet
    (8, 32, 96, 7, 1), (8, 16, 192, 7, 1), (8, 8, 384, 7, 1), (8, 4, 768, 7, 1), (8, 56, 144, 3, 1),
    (8, 56, 144, 5, 2), (8, 28, 240, 5, 1), (8, 14, 480, 3, 1), (8, 14, 672, 5, 2),
    (8, 7, 1152, 5, 1),
)  # fmt: skip
ENLARGED = (  # batch, side, channels, how many times
    (8, 24, 32, 2), (8, 48, 44, 2), (2, 128, 64, 2), (1, 128, 21, 4), (2, 4, 21, 16),
)  # fmt: skip


def jax_steps(layer: Callable, *given: np.ndarray) -> tuple[Callable, Callable]:
    """The forward pass, and it with all gradients."""

    def both(dy: jax.Array, *given: jax.Array) -> tuple:
        y, pull = jax.vjp(layer, *given)
        return y, pull(dy)

    given = jax.device_put(given)
    dy = jax.jit(layer)(*given)

    def step(program: Callable, *given: jax.Array) -> None:
        jax.block_until_ready(program(*given))

    programs = {layer: given, both: (dy, *given)}
    return tuple(
        partial(step, jax.jit(run).lower(*given).compile(), *given)
        for run, given in programs.items()
    )


def torch_steps(layer: Callable, *given: np.ndarray) -> tuple[Callable, Callable]:
    """The same in PyTorch; what is given becomes channels last."""
    tensors = [
        torch.tensor(array).contiguous(memory_format=torch.channels_last).requires_grad_()
        for array in given
    ]

    def forward() -> None:
        with torch.inference_mode():
            layer(*tensors)

    def both() -> None:
        y = layer(*tensors)
        torch.autograd.grad(y, tensors, y.detach())

    return forward, both


def torch_convolution(
    x: np.ndarray, kernel: np.ndarray, stride: int = 1
) -> tuple[Callable, Callable]:
    """`torch_steps` of a convolution."""
    options = {"padding": len(kernel) // 2, "stride": stride}
    options["groups"] = x.shape[3] // kernel.shape[2]
    layer = partial(torch.nn.functional.conv2d, **options)
    return torch_steps(layer, x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1))


def bilinear(shape: tuple[int, int, int, int]) -> list[str]:
    """A row: `jax.image.resize`, ours, PyTorch's."""
    batch, side, channels, factor = shape
    size = factor * side
    x = np.random.default_rng(0).standard_normal((batch, side, side, channels), np.float32)
    matrices = partial(
        jax.image.resize, shape=(batch, size, size, channels), method="bilinear", antialias=False
    )
    shifts = partial(resize_bilinear, height=size, width=size)
    theirs = partial(torch.nn.functional.interpolate, size=(size, size), mode="bilinear")
    by_torch = torch_steps(theirs, x.transpose(0, 3, 1, 2))
    name = f"{batch}, {side} x {side}, {channels}, {factor} times"
    return [name, *cells([jax_steps(matrices, x), jax_steps(shifts, x), by_torch])]


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
            time.sleep(BREAK)
            began = time.perf_counter()
            for _ in range(count):
                step()
            found.append(1000 * (time.perf_counter() - began) / count)
    return [statistics.median(found) for found in times]


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int = 1, by: Callable = jax.lax.conv_general_dilated
) -> jax.Array:
    """As `cvjax.nn.convolution` has it, "symmetric", XLA's own or another."""
    pad = len(kernel) // 2
    options = {"dimension_numbers": DIMENSIONS} if by is jax.lax.conv_general_dilated else {}
    return by(x, kernel, (stride, stride), ((pad, pad), (pad, pad)), **options)


def arrays(batch: int, side: int, channels: int, *of_kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """A map and a kernel [height, width, channels in, features]."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, side, side, channels), np.float32)
    return x, rng.standard_normal(of_kernel, np.float32) / 100


def cells(pairs: list[tuple[Callable, Callable]]) -> list[str]:
    """What each takes."""
    times = milliseconds([step for pair in pairs for step in pair])
    return [f"{a:.1f} / {b:.1f}" for a, b in zip(times[::2], times[1::2], strict=True)]


def main() -> None:
    """Prints the rows; what `fast_conv` chooses without oneDNN is bold in the first table."""
    whole = {shape: arrays(*shape, 3, 3, shape[-1], shape[-1]) for shape in SHAPES}
    narrow = {shape: arrays(*shape[:3], 3, 3, *shape[2:4]) for shape in NARROW}
    of_each = {shape: arrays(*shape[:3], shape[3], shape[3], 1, shape[2]) for shape in DEPTHWISE}
    sides = (1, 1), ((1, 1), (1, 1))
    gathered = partial(_gathered, strides=sides[0], padding=sides[1])
    without = {
        shape: [jax_steps(form, *given) for form in (convolve, gathered)]
        for shape, given in whole.items()
    }
    chosen = {
        shape: int(_form(*map(jnp.asarray, given), *sides) is _gathered)
        for shape, given in whole.items()
    }
    for shape, given in narrow.items():
        own = partial(convolve, stride=shape[-1])
        without[shape] = [jax_steps(form, *given) for form in (own, partial(own, by=fast_conv))]
    for shape, given in of_each.items():
        form = partial(convolve, stride=shape[-1], by=depthwise_conv)
        without[shape] = [jax_steps(form, *given)]
    use_onednn()  # for what is compiled from here on
    print("| batch, map, channels | XLA | gathered | oneDNN | PyTorch |\n|---|---|---|---|---|")
    for shape, given in whole.items():
        by_onednn = jax_steps(partial(convolve), *given)
        row = cells([*without[shape], by_onednn, torch_convolution(*given)])
        row[chosen[shape]] = f"**{row[chosen[shape]]}**"
        batch, side, channels = shape
        print(f"| {batch}, {side} x {side}, {channels} | {' | '.join(row)} |", flush=True)
    print("\n| batch, map, channels to features | XLA | shifted or paired | oneDNN | PyTorch |")
    print("|---|---|---|---|---|")
    for shape, given in narrow.items():
        batch, side, channels, features, stride = shape
        by_onednn = jax_steps(partial(convolve, stride=stride), *given)
        row = cells([*without[shape], by_onednn, torch_convolution(*given, stride)])
        name = f"{channels} to {features}" + (f", stride {stride}" if stride > 1 else "")
        print(f"| {batch}, {side} x {side}, {name} | {' | '.join(row)} |", flush=True)
    print("\n| batch, map, channels | kernel | shifted | oneDNN | PyTorch |\n|---|---|---|---|---|")
    for shape, given in of_each.items():
        batch, side, channels, of_kernel, stride = shape
        by_onednn = jax_steps(partial(convolve, stride=stride, by=depthwise_conv), *given)
        row = cells([*without[shape], by_onednn, torch_convolution(*given, stride)])
        kernel = f"{of_kernel} x {of_kernel}" + (f", stride {stride}" if stride > 1 else "")
        row = [f"{batch}, {side} x {side}, {channels}", kernel, *row]
        print(f"| {' | '.join(row)} |", flush=True)
    print("\n| batch, map, channels | jax.image.resize | shifted | PyTorch |\n|---|---|---|---|")
    for shape in ENLARGED:
        print(f"| {' | '.join(bilinear(shape))} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
