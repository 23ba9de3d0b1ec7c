"""How large are the roundings of oneDNN's convolutions beside XLA's, against double precision?

    python experiments/step_time/roundings.py

3 x 3 pixels, stride 1, float32, in the environment of `main.py`. Prints, for the output and the
gradients for the input and for the kernel, oneDNN's root mean square error to XLA's own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cvjax import cpu

if __name__ == "__main__":
    cpu.begin_again()  # before anything heavy is imported

import argparse

import jax
import numpy as np

from cvjax.nn.fast_conv import DIMENSIONS
from cvjax.nn.onednn import use_onednn

SHAPES = (8, 32, 64, 64), (2, 8, 128, 128), (2, 8, 256, 512)  # batch, side, channels, features


def all_of(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    """The output and both gradients."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        pads = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=DIMENSIONS)

    y, pull = jax.vjp(convolve, x, kernel)
    return y, *pull(dy)


def main() -> None:
    """Prints a row for each shape."""
    rng, found = np.random.default_rng(0), {}
    for batch, side, channels, features in SHAPES:
        sizes = (batch, side, side, channels), (3, 3, channels, features)
        given = [rng.standard_normal(size, np.float32) for size in sizes]
        given.append(rng.standard_normal((batch, side, side, features), np.float32))
        by_xla = jax.device_get(jax.jit(all_of)(*given))
        with jax.enable_x64(True):
            exact = jax.device_get(jax.jit(all_of)(*map(np.float64, given)))
        found[batch, side, channels, features] = given, by_xla, exact
    use_onednn()  # for what is compiled from here on
    jax.clear_caches()
    print("| batch, map, channels to features | output | input | kernel |\n|---|---|---|---|")
    for (batch, side, channels, features), (given, by_xla, exact) in found.items():
        ours = jax.device_get(jax.jit(all_of)(*given))
        ratios = [
            np.sqrt(np.mean((mine - truth) ** 2) / np.mean((theirs - truth) ** 2))
            for mine, theirs, truth in zip(ours, by_xla, exact, strict=True)
        ]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {batch}, {side} x {side}, {channels} to {features} | {cells} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
