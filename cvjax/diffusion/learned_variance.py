"""The variances of the steps back, learned: the bound of improved DDPM, and the sampler with them.

A. Nichol, P. Dhariwal, https://arxiv.org/abs/2102.09672, section 3.1. The network has twice the
channels: what `process.prediction` names, and v in [-1, 1], which means (v + 1) / 2 of the way from
the least to the most log variance. Time goes in steps, from t to s.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least
from cvjax.diffusion import grids
from cvjax.diffusion.process import Process, like, perturb, posterior, renewed, split
from cvjax.diffusion.samplers.integration import (
    Denoise,
    Shape,
    begin,
    integrate,
    normal,
    time_steps,
)
from cvjax.diffusion.task import Diffusion
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree


def log_variances(process: Process, t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the most log variance [b] that a step from time t to s < t can have.

    That of p(x_s | x_t, x_0), beta~, and that of p(x_t | x_s), beta: equation 15 of the paper.
    """
    log_share = jnp.log(renewed(process, t, s))
    return tuple(2 * jnp.log(process.sigma(at)) + log_share for at in (s, t))


def variational_bound(
    process: Process,
    prediction: jax.Array,
    fraction: jax.Array,
    x0: jax.Array,
    x: jax.Array,
    t: jax.Array,
    s: jax.Array,
    levels: int = 256,
) -> jax.Array:
    """One term of the variational bound, nats for a pixel, mean over an image: float32 [b].

    A. Nichol, P. Dhariwal, https://arxiv.org/abs/2102.09672, equations 4 to 7 and 15: the KL
    divergence from p(x_s | x_t, x_0) to N(mean of the prediction, exp(log variance)). Where s is 0
    it is -log p(x_0 | x_t) of grey levels instead: the normal's mass in x_0's bin. T times the
    mean over the T steps, and the small KL of x_1 from noise, is the whole bound.

    Args:
      process: says what the prediction is.
      prediction: [b, ...], of the network at x and t.
      fraction: [b, ...], in [0, 1] between the least and the most log variance; a network that
        gives v in [-1, 1] means (v + 1) / 2.
      x0: images in [-1, 1].
      x: x_t.
      t, s: [b], s < t.
      levels: of grey; those at both ends take in all that is beyond.
    """
    mean, true_mean = (
        posterior(process, *split(process, name, value, x, t), t, s)[0]
        for name, value in ((process.prediction, prediction), ("x0", x0))
    )
    least, most = (like(value, x) for value in log_variances(process, t, s))
    log_variance = least + fraction * (most - least)
    kl = -1 + log_variance - least + jnp.exp(least - log_variance)
    kl = (kl + (true_mean - mean) ** 2 * jnp.exp(-log_variance)) / 2
    decoded = -log_probability_of_level(x0, mean, log_variance, levels)
    terms = jnp.where(like(s, x) <= 0, decoded, kl)
    return jnp.mean(terms, axis=range(1, x.ndim))


def log_probability_of_level(
    x: jax.Array, mean: jax.Array, log_variance: jax.Array, levels: int = 256
) -> jax.Array:
    """log of the normal's mass within half a level of x in [-1, 1]; J. Ho et al., equation 13."""
    half, deviation = 1 / (levels - 1), jnp.exp(log_variance / 2)
    upper, lower = ((x + sign * half - mean) / deviation for sign in (1, -1))
    log_cdf = jax.scipy.special.log_ndtr
    # The difference of two tails is taken on the side where they are small.
    flip = lower > 0
    low, high = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    between = log_cdf(high) + jnp.log(-jnp.expm1(jnp.minimum(log_cdf(low) - log_cdf(high), -1e-6)))
    is_first, is_last = x < -1 + half, x > 1 - half
    return jnp.where(is_first, log_cdf(upper), jnp.where(is_last, log_cdf(-lower), between))


def ddpm_learned(
    denoise: Denoise,
    process: Process,
    keys: jax.Array,
    shape: Shape,
    steps: int,
    *,
    times: grids.TimeGrid = grids.uniform,
) -> jax.Array:
    """Ancestral sampling with the network's variances; a sampler as in `cvjax.diffusion.samplers`.

    `denoise` gives [b, h, w, 2 c]. The last step adds no noise.
    """

    def step(x: jax.Array, index: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        both = denoise(x, t)
        if both.shape != (*x.shape[:-1], 2 * x.shape[-1]):
            raise InputError(
                f"ddpm_learned: the network gives {both.shape[-1]} channels for images of "
                f"{x.shape[-1]}, so that it has no variances; train a LearnedVariance, or take "
                "sampler=ddpm"
            )
        prediction, v = jnp.split(both, 2, axis=-1)
        x0, eps = split(process, process.prediction, prediction, x, t)
        mean, _ = posterior(process, x0, eps, t, s)
        least, most = (like(value, x) for value in log_variances(process, t, s))
        # Guidance may take v out of its range.
        fraction = jnp.clip((v + 1) / 2, 0.0, 1.0)
        deviation = jnp.exp((least + fraction * (most - least)) / 2)
        return mean + (index < steps - 1) * deviation * normal(keys, shape, index)

    grid = time_steps(times, process, steps)
    return integrate(step, begin(process, keys, shape), grid, len(keys))


@dataclass(frozen=True)
class LearnedVariance(Diffusion):
    """Improved DDPM: the network also learns the variances of the steps back.

    The network gives [b, h, w, 2 c]. The loss is L_hybrid, `simple_weight` times the (weighted)
    squared error plus `bound_weight` times the variational bound in nats for a pixel; in the bound
    no gradient reaches the mean, unless it is all (L_vlb: `simple_weight` 0, `bound_weight` 1). The
    sampler that uses the variances is `ddpm_learned`; others leave them out.

    Attributes:
      simple_weight, bound_weight: see above.
      bound_steps: of the process of which it is the bound. Each step counts as often as it comes:
        for the bound itself take a process with uniform `times`.
    """

    simple_weight: float = 1.0
    bound_weight: float = 1e-3
    bound_steps: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, simple_weight=0, bound_weight=0, bound_steps=1)
        if not (self.simple_weight or self.bound_weight):
            raise InputError("simple_weight and bound_weight are 0: nothing is learned")

    def denoiser(self, params: Params, condition: PyTree, guidance: float | None = None) -> Denoise:
        """As of `Diffusion`, with the variances for the sampler that uses them."""
        both = super().denoiser(params, condition, guidance)
        if self._sampled_channels == self._channels:
            return both
        return lambda x, t: jnp.split(both(x, t), 2, axis=-1)[0]

    @property
    def _channels(self) -> int:
        return 2 * self.image_shape[-1]

    @property
    def _sampled_channels(self) -> int:
        is_learned = getattr(self.sampler, "func", self.sampler) is ddpm_learned
        return self._channels if is_learned else self.image_shape[-1]

    def _errors(
        self,
        params: Params,
        image: jax.Array,
        condition: PyTree,
        t: jax.Array,
        eps: jax.Array,
    ) -> jax.Array:
        process, steps = self.process, self.bound_steps
        index = jnp.clip(jnp.ceil(t * steps), 1, steps)
        t, s = index / steps, (index - 1) / steps
        x = perturb(process, image, eps, t)
        prediction, v = jnp.split(self._predict(params, x, t, condition), 2, axis=-1)
        errors = self._errors_of(prediction, image, t, eps)
        of_mean = jax.lax.stop_gradient(prediction) if self.simple_weight else prediction
        bound = variational_bound(process, of_mean, (v + 1) / 2, image, x, t, s)
        return self.simple_weight * errors + self.bound_weight * steps * bound
