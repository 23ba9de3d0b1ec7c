"""How large are the roundings of our convolutions beside XLA's, against double precision?

    python experiments/step_time/roundings.py

3 x 3 pixels, stride 1, float32, in the environment of `main.py`. Prints, for the output and the
gradients for the input and for the kernel, the root mean square error to XLA's own: first of
`fast_conv` where it has a form of its own, then of oneDNN.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import cpu

if __name__ == "__main__":
    cpu.begin_again()  # before anything heavy is imported

import argparse
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from cvjax.nn.fast_conv import DIMENSIONS, fast_conv
from cvjax.nn.onednn import use_onednn

# Batch, side, channels, features.
OF_FORMS = (
    (64, 1, 512, 512), (32, 2, 512, 512), (32, 4, 256, 256), (8, 4, 512, 512), (64, 28, 32, 1),
    (80, 14, 32, 4), (64, 28, 1, 8), (8, 96, 3, 16), (64, 28, 8, 8), (64, 14, 16, 16),
)  # fmt: skip
OF_ONEDNN = (8, 32, 64, 64), (2, 8, 128, 128), (2, 8, 256, 512)

Shape = tuple[int, int, int, int]


def all_of(by: Callable, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    """The output and both gradients."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return by(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)

    y, pull = jax.vjp(convolve, x, kernel)
    return y, *pull(dy)


def own(*given: np.ndarray) -> list[np.ndarray]:
    """What `lax.conv_general_dilated` gives, in the types of what is given."""
    return jax.device_get(jax.jit(partial(all_of, jax.lax.conv_general_dilated))(*given))


def arrays(shape: Shape) -> list[np.ndarray]:
    """A map, a kernel, and the gradient of the output."""
    batch, side, channels, features = shape
    rng = np.random.default_rng(0)
    sizes = (batch, side, side, channels), (3, 3, channels, features), (batch, side, side, features)
    return [rng.standard_normal(size, np.float32) for size in sizes]


def print_rows(shapes: tuple[Shape, ...], by_xla: dict, ours: dict) -> None:
    """A row for each shape, by the root mean square errors of both."""
    print("| batch, map, channels to features | output | input | kernel |\n|---|---|---|---|")
    for shape in shapes:
        with jax.enable_x64(True):
            exact = own(*map(np.float64, arrays(shape)))
        ratios = [
            np.sqrt(np.mean((mine - truth) ** 2) / np.mean((theirs - truth) ** 2))
            for mine, theirs, truth in zip(ours[shape], by_xla[shape], exact, strict=True)
        ]
        batch, side, channels, features = shape
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {batch}, {side} x {side}, {channels} to {features} | {cells} |", flush=True)


def main() -> None:
    """Prints both tables."""
    by_xla = {shape: own(*arrays(shape)) for shape in OF_FORMS + OF_ONEDNN}
    forms = jax.jit(partial(all_of, fast_conv))
    print_rows(OF_FORMS, by_xla, {s: jax.device_get(forms(*arrays(s))) for s in OF_FORMS})
    use_onednn()  # for what is compiled from here on
    jax.clear_caches()
    print()
    ours = {shape: own(*arrays(shape)) for shape in OF_ONEDNN}
    print_rows(OF_ONEDNN, by_xla, ours)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
