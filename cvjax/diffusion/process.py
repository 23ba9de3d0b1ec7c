"""Gaussian diffusion processes: how data turns into noise, and what a network may predict of it.

Notation, after D. Kingma et al., Variational Diffusion Models (https://arxiv.org/abs/2107.00630):

    t       time in [0, 1]; 0 is data, 1 is noise
    x_0     an image, values about [-1, 1];  eps: noise, N(0, I)
    x_t     = alpha(t) x_0 + sigma(t) eps, hence p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)
    log SNR = 2 log(alpha(t) / sigma(t)), falls with t

A process is alpha and sigma; all else follows from them. The time that they see runs from MARGIN
to 1 - MARGIN (but for EDM, which has a floor of its own): nothing is ever divided by zero, every
parameterization is defined at both ends of [0, 1], and the noise that is left at t = 0 is about a
grey level or less.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_choices, check_positive, fitting
from cvjax.errors import InputError, nearest

MARGIN = 1e-3

TimeQuantile = Callable[[jax.Array], jax.Array]


@runtime_checkable
class Process(Protocol):
    """What losses and samplers know of a process.

    Attributes:
      prediction: what the network predicts, one of `PARAMETERIZATIONS`.
      times: quantile function of the distribution of t in training: maps uniform numbers in
        (0, 1) to times.
    """

    prediction: str
    times: TimeQuantile

    def alpha(self, t: jax.Array) -> jax.Array:
        """What is left of the data at time t: the factor of x_0."""

    def sigma(self, t: jax.Array) -> jax.Array:
        """The standard deviation of the noise at time t."""


def uniform(u: jax.Array) -> jax.Array:
    """Every time is as likely as any other."""
    return u


def logit_normal(u: jax.Array, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """The quantiles of sigmoid(N(mean, std^2)): more often the middle, where most is to learn.

    P. Esser et al., https://arxiv.org/abs/2403.03206, section 3.1. Raises InputError unless
    std > 0.
    """
    check_positive(**{"logit_normal: std": std})
    return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))


def log_normal(u: jax.Array, mean: float = -1.2, std: float = 1.2) -> jax.Array:
    """The quantiles of exp(N(mean, std^2)): the noise levels of EDM (T. Karras et al., table 1).

    They are no times in [0, 1]: `EDM` makes such of them. Raises InputError unless std > 0.
    """
    check_positive(**{"log_normal: std": std})
    return jnp.exp(mean + std * jax.scipy.special.ndtri(u))


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1 at all times.

    Attributes:
      schedule: "cosine": alpha = cos(pi t / 2) (A. Nichol, P. Dhariwal,
        https://arxiv.org/abs/2102.09672, section 3.2); "linear": the SDE with beta(t) from 0.1 to
        20 (Y. Song et al., https://arxiv.org/abs/2011.13456, equations 32 and 33), the limit of
        DDPM.
      prediction, times: as in `Process`. With "eps" take "linear": the cosine leaves so little of
        the image at t = 1 that an error in eps makes a large one in x_0.
    """

    schedule: str = "cosine"
    prediction: str = "v"
    times: TimeQuantile = uniform

    def __post_init__(self):
        _check_prediction(self.prediction)
        check_choices(self, schedule=("cosine", "linear"))

    def alpha(self, t: jax.Array) -> jax.Array:
        """The factor of x_0."""
        if self.schedule == "cosine":
            return jnp.cos(jnp.pi / 2 * _inside(t))
        return jnp.exp(_half_integral_of_beta(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        """The standard deviation of the noise."""
        if self.schedule == "cosine":
            return jnp.sin(jnp.pi / 2 * _inside(t))
        return jnp.sqrt(-jnp.expm1(2 * _half_integral_of_beta(t)))


@dataclass(frozen=True)
class SubVariancePreserving:
    """alpha of the linear `VariancePreserving`, but sigma = 1 - alpha^2, the square of its sigma.

    Y. Song et al., https://arxiv.org/abs/2011.13456, equation 29: less noise at all times.

    Attributes:
      prediction, times: as in `Process`.
    """

    prediction: str = "eps"
    times: TimeQuantile = uniform

    def __post_init__(self):
        _check_prediction(self.prediction)

    def alpha(self, t: jax.Array) -> jax.Array:
        """The factor of x_0."""
        return jnp.exp(_half_integral_of_beta(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        """The standard deviation of the noise."""
        return -jnp.expm1(2 * _half_integral_of_beta(t))


@dataclass(frozen=True)
class FlowMatching:
    """Straight lines from data to noise: alpha = 1 - t, sigma = t.

    Y. Lipman et al., https://arxiv.org/abs/2210.02747 (the conditional optimal transport path),
    X. Liu et al., https://arxiv.org/abs/2209.03003 (rectified flow); their time runs the other way.

    Attributes:
      prediction, times: as in `Process`.
    """

    prediction: str = "velocity"
    times: TimeQuantile = logit_normal

    def __post_init__(self):
        _check_prediction(self.prediction)

    def alpha(self, t: jax.Array) -> jax.Array:
        """The factor of x_0."""
        return 1 - _inside(t)

    def sigma(self, t: jax.Array) -> jax.Array:
        """The standard deviation of the noise."""
        return _inside(t)


@dataclass(frozen=True)
class VarianceExploding:
    """alpha = 1 at all times; sigma grows geometrically from `sigma_min` to `sigma_max`.

    Y. Song et al., https://arxiv.org/abs/2011.13456, equation 30. x_t has a standard deviation
    up to `sigma_max`: a network must scale its input itself.

    Attributes:
      sigma_min, sigma_max: the noise at t = 0 and t = 1, to within MARGIN of the time.
      prediction, times: as in `Process`.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    prediction: str = "eps"
    times: TimeQuantile = uniform

    def __post_init__(self):
        _check_prediction(self.prediction)
        _check_sigmas(self.sigma_min, self.sigma_max)

    def alpha(self, t: jax.Array) -> jax.Array:
        """The factor of x_0."""
        return jnp.ones_like(t, _float(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        """The standard deviation of the noise."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** _inside(t)


@dataclass(frozen=True)
class EDM:
    """alpha = 1 at all times, and sigma itself is the time: sigma = sigma_max t.

    T. Karras et al., https://arxiv.org/abs/2206.00364. As a straight line through the origin would
    make sigma(0) = 0, where x_0 says nothing of the noise, it starts at sigma_min / 20. A network
    must scale its input itself; the grid of times that belongs to it is `grids.karras`.

    Attributes:
      sigma_min: the last noise level at which the network is asked; no sampler needs less.
      sigma_max: the noise at t = 1.
      mean, std: of log sigma in training, which is normal (their P_mean and P_std).
      prediction: as in `Process`.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    mean: float = -1.2
    std: float = 1.2
    prediction: str = "x0"

    def __post_init__(self):
        _check_prediction(self.prediction)
        _check_sigmas(self.sigma_min, self.sigma_max)
        check_positive(**{"EDM: std": self.std})

    def alpha(self, t: jax.Array) -> jax.Array:
        """The factor of x_0."""
        return jnp.ones_like(t, _float(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        """The standard deviation of the noise."""
        floor = self.sigma_min / 20
        return floor + (self.sigma_max - floor) * t

    def times(self, u: jax.Array) -> jax.Array:
        """The quantiles of t in training, with sigma log-normal but in [sigma(0), sigma_max]."""
        floor = self.sigma_min / 20
        sigma = log_normal(u, self.mean, self.std)
        return jnp.clip((sigma - floor) / (self.sigma_max - floor), 0.0, 1.0)


def like(factor: jax.Array, x: jax.Array) -> jax.Array:
    """A factor [b] with axes of length 1 appended, so that it multiplies x [b, ...]."""
    return factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))


def log_snr(process: Process, t: jax.Array) -> jax.Array:
    """log(alpha^2 / sigma^2)."""
    return 2 * (jnp.log(process.alpha(t)) - jnp.log(process.sigma(t)))


def time_at(process: Process, ratio: jax.Array) -> jax.Array:
    """The time at which sigma / alpha is `ratio`, in [0, 1]: 0 or 1 where it never is.

    By bisection, to the last bit of t or of sigma: a process needs no inverse of its own.
    """
    ratio = jnp.asarray(ratio, jnp.result_type(float))

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        is_later = process.sigma(middle) < ratio * process.alpha(middle)
        return jnp.where(is_later, middle, low), jnp.where(is_later, high, middle)

    ends = jnp.zeros_like(ratio), jnp.ones_like(ratio)
    low, high = jax.lax.fori_loop(0, 80, halve, ends)
    return jnp.where(high == 1, high, low)


def perturb(process: Process, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t, shape of `x0` [b, ...], for times [b]."""
    return like(process.alpha(t), x0) * x0 + like(process.sigma(t), x0) * eps


def renewed(process: Process, t: jax.Array, s: jax.Array) -> jax.Array:
    """The share of the noise's variance that a step between s < t renews, [b]: 1 - SNR_t / SNR_s.

    p(x_t | x_s) has the variance sigma_t^2 share, p(x_s | x_t, x_0) has sigma_s^2 share.
    """
    return -jnp.expm1(log_snr(process, t) - log_snr(process, s))


def posterior(
    process: Process, x0: jax.Array, eps: jax.Array, t: jax.Array, s: jax.Array, eta: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of p(x_s | x_t, x_0), s < t, the latter `eta`-fold.

    What of the noise is not drawn anew stays in the mean, so that x_s has the noise of s (J. Song
    et al., https://arxiv.org/abs/2010.02502, equations 7 and 16, for any process).

    Args:
      x0, eps: [b, ...], of which x_t is made (see `split`).
      t, s: [b].
    """
    part = like(eta * jnp.sqrt(renewed(process, t, s)), x0)
    mean = perturb(process, x0, jnp.sqrt(1 - part**2) * eps, s)
    return mean, like(process.sigma(s), x0) * part


def prior(process: Process, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise to start sampling from, N(0, sigma(1)^2 I): what is left of the data counts as zero."""
    return process.sigma(jnp.float32(1.0)) * jax.random.normal(rng, shape)


def drift(process: Process, t: jax.Array) -> jax.Array:
    """f of the SDE dx = f(t) x dt + g(t) dw that has these marginals: d log alpha / dt."""
    return _derivative(process.alpha, t) / process.alpha(t)


def diffusion(process: Process, t: jax.Array) -> jax.Array:
    """g of that SDE: g^2 = d sigma^2 / dt - 2 f sigma^2 = -sigma^2 d log SNR / dt."""
    return process.sigma(t) * jnp.sqrt(-_derivative(lambda t: log_snr(process, t), t))


# What a network may predict. Each is a x_0 + b eps with a and b functions of the time, so that
# together with x_t = alpha x_0 + sigma eps it determines both.
PARAMETERIZATIONS: dict[str, Callable] = {
    "x0": lambda process, t: (jnp.ones_like(t), jnp.zeros_like(t)),
    "eps": lambda process, t: (jnp.zeros_like(t), jnp.ones_like(t)),
    # T. Salimans, J. Ho, https://arxiv.org/abs/2202.00512, appendix D.
    "v": lambda process, t: (-process.sigma(t), process.alpha(t)),
    # dx/dt along the probability flow ODE (Y. Lipman et al., theorem 3).
    "velocity": lambda process, t: (
        _derivative(process.alpha, t),
        _derivative(process.sigma, t),
    ),
    # The gradient of log p(x_t | x_0).
    "score": lambda process, t: (jnp.zeros_like(t), -1 / process.sigma(t)),
}


def combine(process: Process, name: str, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """The quantity `name` of PARAMETERIZATIONS, shape of `x0` [b, ...], for times [b]."""
    a, b = PARAMETERIZATIONS[name](process, t)
    return like(a, x0) * x0 + like(b, x0) * eps


def split(
    process: Process, name: str, value: jax.Array, x: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x_0, eps) of which x is x_t and `value` is the quantity `name`: the inverse of `combine`.

    It solves the 2 x 2 system  alpha x_0 + sigma eps = x,  a x_0 + b eps = value. Raises InputError
    unless x and value have one shape.
    """
    if value.shape != x.shape:  # they would be broadcast
        raise InputError(
            f"the prediction of {name} is {list(value.shape)}, but x is {list(x.shape)}; they must "
            "be equal: of a network with learned variances take the first half of its channels"
        )
    alpha, sigma = like(process.alpha(t), x), like(process.sigma(t), x)
    a, b = (like(factor, x) for factor in PARAMETERIZATIONS[name](process, t))
    determinant = alpha * b - sigma * a
    return (b * x - sigma * value) / determinant, (alpha * value - a * x) / determinant


def convert(
    process: Process, source: str, target: str, value: jax.Array, x: jax.Array, t: jax.Array
) -> jax.Array:
    """The quantity `target` where `value` is the quantity `source`, at x = x_t [b, ...], t [b]."""
    return combine(process, target, *split(process, source, value, x, t), t)


def check_times(process: Process) -> None:
    """Raises InputError unless `process.times` gives times in [0, 1]."""
    u = jnp.array([1e-6, 0.5, 1 - 1e-6])
    with fitting("process.times"):
        t = np.asarray(process.times(u))
    if t.shape != u.shape or not np.all((t >= 0) & (t <= 1)):  # NaN is neither
        raise InputError(f"process.times of {u} are {t}; they must be in [0, 1]")


def _half_integral_of_beta(t: jax.Array) -> jax.Array:
    """log alpha of the linear schedule: half the integral of -beta(t) = -0.1 - 19.9 t from 0."""
    t, first, last = _inside(t), 0.1, 20.0
    return -(t**2) * (last - first) / 4 - t * first / 2


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise InputError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}; they must be above 0 and rise"
        )


def _float(t: jax.Array) -> jnp.dtype:
    return jnp.result_type(t, float)


def _check_prediction(name: str) -> None:
    if name not in PARAMETERIZATIONS:
        raise InputError(f"prediction is {name!r}{nearest(name, PARAMETERIZATIONS)}")


def _inside(t: jax.Array) -> jax.Array:
    """[0, 1] -> [MARGIN, 1 - MARGIN]."""
    return MARGIN + (1 - 2 * MARGIN) * t


def _derivative(function: Callable, t: jax.Array) -> jax.Array:
    t = jnp.asarray(t, _float(t))
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]
