"""Gaussian diffusion processes, and what a network may predict in them.

Notation: x0 is data, eps ~ N(0, 1), t in [0, 1] with data at 0 and noise at 1, and

    x_t = alpha(t) x0 + sigma(t) eps.

A process is alpha and sigma; everything else follows from them (Kingma et al. 2021; the
interpolant of Lipman et al. 2023). Times are arrays that broadcast against x:
`expand(t, x)` gives a time per example its trailing axes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cvjax.errors import InputError, nearest

PREDICTIONS = ("eps", "x0", "v", "velocity", "score")
SMALL = 1e-5  # below this alpha or sigma, what is divided by it is not determined by x_t


class Process(Protocol):
    """How data becomes noise."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Coefficient of the data; 1 at t = 0."""

    def sigma(self, t: jax.Array) -> jax.Array:
        """Standard deviation of the noise; 0 at t = 0."""


@dataclass(frozen=True)
class FlowMatching:
    """The straight path of rectified flow: alpha = 1 - t, sigma = t (Liu et al. 2023)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """1 - t."""
        return 1.0 - t

    def sigma(self, t: jax.Array) -> jax.Array:
        """The time itself."""
        return 1.0 * t


@dataclass(frozen=True)
class CosineVariancePreserving:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol and Dhariwal 2021, without offset)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """The cosine."""
        return jnp.cos(0.5 * jnp.pi * t)

    def sigma(self, t: jax.Array) -> jax.Array:
        """The sine."""
        return jnp.sin(0.5 * jnp.pi * t)


@dataclass(frozen=True)
class LinearVariancePreserving:
    """beta(t) rises linearly (Song et al. 2021, equation 32): alpha^2 = exp(-integral of beta)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, t: jax.Array) -> jax.Array:
        """exp(-1/2 integral of beta)."""
        return jnp.exp(-0.5 * self._integral(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        """sqrt(1 - alpha^2), without cancellation near t = 0."""
        variance = -jnp.expm1(-self._integral(t))
        # The root has an infinite slope at 0: keep gradients finite there.
        return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)

    def _integral(self, t: jax.Array) -> jax.Array:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2


class Prediction(NamedTuple):
    """What a network's output says of the data and of the noise, each like x_t."""

    x0: jax.Array
    eps: jax.Array


def expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """t [batch] with as many trailing axes of size 1 as x [batch, ...] has."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def log_snr(process: Process, t: jax.Array) -> jax.Array:
    """log(alpha^2 / sigma^2): falls from +inf at t = 0 to what noise is left at t = 1."""
    return 2.0 * (jnp.log(process.alpha(t)) - jnp.log(process.sigma(t)))


def rates(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The derivatives (alpha'(t), sigma'(t))."""
    one = jnp.ones_like(t)
    return jax.jvp(process.alpha, (t,), (one,))[1], jax.jvp(process.sigma, (t,), (one,))[1]


def drift_and_diffusion(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(f, g^2) of dx = f x dt + g dw: f = alpha'/alpha, g^2 = 2 sigma sigma' - 2 f sigma^2.

    Kingma et al. 2021, equations 41 and 42.
    """
    alpha_rate, sigma_rate = rates(process, t)
    f = _divide(alpha_rate, process.alpha(t))
    sigma = process.sigma(t)
    return f, 2.0 * sigma * (sigma_rate - f * sigma)


def diffuse(process: Process, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t, for x0 and eps [batch, ...] and t [batch]."""
    t = expand(t, x0)
    return process.alpha(t) * x0 + process.sigma(t) * eps


def encode(process: Process, kind: str, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """What a network of that kind should predict at t [batch], from the true x0 and eps.

    "eps"; "x0"; "v" = alpha eps - sigma x0 (Salimans and Ho 2022); "velocity" = dx_t/dt =
    alpha' x0 + sigma' eps; "score" = -eps / sigma.
    """
    t = expand(t, x0)
    alpha, sigma = process.alpha(t), process.sigma(t)
    match kind:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "velocity":
            alpha_rate, sigma_rate = rates(process, t)
            return alpha_rate * x0 + sigma_rate * eps
        case "score":
            return -_divide(eps, sigma)
    raise InputError(f"prediction is {kind!r}{nearest(kind, PREDICTIONS)}")


def decode(
    process: Process, kind: str, output: jax.Array, x: jax.Array, t: jax.Array
) -> Prediction:
    """The inverse of `encode`: x0 and eps from a network's output at x_t [batch, ...], t [batch].

    Where x_t says nothing (eps at t = 0, x0 at t = 1) the division is bounded, not exact.
    """
    t = expand(t, x)
    alpha, sigma = process.alpha(t), process.sigma(t)
    match kind:
        case "eps":
            return Prediction(_divide(x - sigma * output, alpha), output)
        case "x0":
            return Prediction(output, _divide(x - alpha * output, sigma))
        case "v":
            size = alpha**2 + sigma**2
            return Prediction(
                (alpha * x - sigma * output) / size, (sigma * x + alpha * output) / size
            )
        case "velocity":
            alpha_rate, sigma_rate = rates(process, t)
            determinant = alpha * sigma_rate - sigma * alpha_rate
            return Prediction(
                _divide(sigma_rate * x - sigma * output, determinant),
                _divide(alpha * output - alpha_rate * x, determinant),
            )
        case "score":
            eps = -sigma * output
            return Prediction(_divide(x - sigma * eps, alpha), eps)
    raise InputError(f"prediction is {kind!r}{nearest(kind, PREDICTIONS)}")


def uniform_times(quantiles: jax.Array) -> jax.Array:
    """Training times spread evenly: the quantiles in (0, 1) themselves."""
    return quantiles


def logit_normal_times(quantiles: jax.Array, *, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Training times mostly in the middle: sigmoid of a normal (Esser et al. 2024, section 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(quantiles))


Times = Callable[[jax.Array], jax.Array]


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    safe = jnp.where(jnp.abs(denominator) < SMALL, SMALL, denominator)
    return numerator / safe
