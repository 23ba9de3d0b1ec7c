"""Guidance: a denoiser made of others, which any sampler takes in their place.

With x_t and t given, all parameterizations (`process.PARAMETERIZATIONS`) are affine in each other.
So it makes no difference which of them is extrapolated, with weights that sum to 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cvjax.diffusion.process import Process, combine, like
from cvjax.diffusion.samplers.integration import Denoise
from cvjax.train.state import PyTree


def classifier_free(
    predict: Callable[[jax.Array, jax.Array, PyTree], jax.Array],
    condition: PyTree,
    null: PyTree,
    weight: float,
) -> Denoise:
    """uncond + weight (cond - uncond): the score of p(x_t) p(condition given x_t)^weight.

    J. Ho, T. Salimans, https://arxiv.org/abs/2207.12598, equation 6, where the weight is 1 + w.
    Both come from one pass over a doubled batch; with weight 1 there is no second half.

    Args:
      predict: (x [b, ...], t [b], condition) -> prediction, shape of x.
      condition: what is asked for, an array [b, ...] or several.
      null: what says that nothing is asked for, arrays of the same shapes; a network knows it only
        from training with dropped conditions.
    """
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), condition, null)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        if weight == 1:
            return predict(x, t, condition)
        doubled = predict(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        conditional, unconditional = jnp.split(doubled, 2)
        return unconditional + weight * (conditional - unconditional)

    return denoise


def autoguidance(denoise: Denoise, weaker: Denoise, weight: float) -> Denoise:
    """weaker + weight (denoise - weaker): away from the errors that a worse network makes.

    T. Karras et al., https://arxiv.org/abs/2406.02507, equation 3. The weaker network is smaller
    or trained less, for the same condition and the same prediction; with an unconditional one
    this is classifier-free guidance.
    """

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        if weight == 1:
            return denoise(x, t)
        guide = weaker(x, t)
        return guide + weight * (denoise(x, t) - guide)

    return guided


def classifier(
    denoise: Denoise,
    process: Process,
    log_probability: Callable[[jax.Array, jax.Array], jax.Array],
    weight: float = 1.0,
) -> Denoise:
    """Adds weight * gradient of log p(y given x_t) to the score.

    P. Dhariwal, A. Nichol, https://arxiv.org/abs/2105.05233, algorithm 2. A score that is higher by
    d is a noise eps lower by sigma d, and an x_0 higher by sigma^2 / alpha d.

    Args:
      denoise: predicts what `process.prediction` names.
      log_probability: (x_t [b, ...], t [b]) -> log p(y given x_t) [b], each of its own row, of a
        classifier that was trained on noisy images.
    """

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda x: jnp.sum(log_probability(x, t)))(x)
        eps = -like(weight * process.sigma(t), x) * gradient
        x0 = -like(process.sigma(t) / process.alpha(t), x) * eps
        return denoise(x, t) + combine(process, process.prediction, x0, eps, t)

    return guided
