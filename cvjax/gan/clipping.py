"""Weights that stay in a box: how the first Wasserstein GAN kept its critic smooth."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cvjax.checks import check_positive


def clipped(
    transform: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    limit: float = 0.01,
) -> optax.GradientTransformation:
    """An optimizer that leaves all parameters in [-limit, limit], but for rounding.

    M. Arjovsky et al., https://arxiv.org/abs/1701.07875, algorithm 1, there with RMSProp. It is for
    the group "discriminator" alone; `configs/wgan_gp.py` says how to give it to that.

    Raises InputError for a limit that is not positive.
    """
    check_positive(**{"clipped: limit": limit})

    def clip(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u, p: jnp.clip(p + u, -limit, limit) - p, updates, params)

    return optax.chain(transform(learning_rate=learning_rate), optax.stateless(clip))
