"""GELU, x Phi(x) (D. Hendrycks, K. Gimpel, https://arxiv.org/abs/1606.08415)."""

from typing import Any

import jax
import jax.numpy as jnp

_ROOT_HALF = 0.5**0.5
_PEAK = (2 * jnp.pi) ** -0.5  # of the normal density


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """As `flax.linen.gelu(x, approximate=False)`, with erf as in PyTorch; any shape, floats.

    Flax's has erfc, which keeps the digits of Phi where it is small, and on a CPU takes two and a
    half times as long (`experiments/step_time`). Nothing is kept for the gradient besides x: it has
    Phi(-x), lest the compiler find that it is the same one. Of 16 bits it works out in 32.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    slope = 1 - _normal_cdf(-wide) + wide * _PEAK * jnp.exp(-0.5 * wide**2)
    return gelu(x), tangent * slope.astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    # Beyond 6 erf is 1, in double precision, too. On a CPU XLA gives a whole block before a norm to
    # YNNPACK, which is slow with its GELU; but not one with a `clamp` (`experiments/step_time`).
    x = jax.lax.clamp(jnp.asarray(-6, x.dtype), _ROOT_HALF * x, jnp.asarray(6, x.dtype))
    return 0.5 + 0.5 * jax.lax.erf(x)
