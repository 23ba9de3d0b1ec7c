"""SiLU, x sigmoid(x) (S. Elfwing et al., https://arxiv.org/abs/1702.03118)."""

from typing import Any

import flax.linen as nn
import jax


@jax.custom_jvp
def silu(x: jax.Array) -> jax.Array:
    """As `flax.linen.silu`, but nothing is kept for the gradient besides x; any shape, floats.

    Else XLA writes the sigmoid beside the result, and reads it again in the backward pass: a
    training step of the main job's U-Net is 2 to 3 % longer (`experiments/diffusion_speed`). The
    gradient has sigmoid(-x), lest the compiler find that it is the same one.
    """
    return nn.silu(x)


@silu.defjvp
def _silu_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    rest = nn.sigmoid(-x)
    return silu(x), tangent * ((1 - rest) * (1 + x * rest))
