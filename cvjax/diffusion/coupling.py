"""Which noise goes with which image of a batch."""

import jax
import jax.numpy as jnp
from optax.assignment import hungarian_algorithm


def optimal_coupling(x: jax.Array, eps: jax.Array, group: jax.Array | None = None) -> jax.Array:
    """The rows of `eps` [b, ...] in another order: least sum of squared distances to those of `x`.

    A. Tong et al., https://arxiv.org/abs/2302.00482, section 3.2.4 and A. Pooladian et al.,
    https://arxiv.org/abs/2304.14772: the paths of a batch cross less. Exact, on the device: a
    callback to SciPy waits for ever where JAX has one thread and the batch is large.

    Args:
      x: images [b, ...].
      eps: noise of the same shape.
      group: integers [b, ...], labels or captions: noise stays among equal rows. It must: else
        noise would depend on the condition in training, but not in sampling.
    """
    batch = len(x)
    if batch == 0:
        return eps
    group = jnp.zeros(batch, jnp.int32) if group is None else group
    x, noise, group = (jax.lax.stop_gradient(a.reshape(batch, -1)) for a in (x, eps, group))
    # The rest of |x - eps|^2 is the same for every order. Numbers, for else the search has no end.
    cost = jnp.nan_to_num(-(x @ noise.T))
    apart = jnp.any(group[:, None] != group[None], -1)
    forbidden = batch * (jnp.max(cost) - jnp.min(cost)) + 1  # more than any order could save
    rows, columns = hungarian_algorithm(cost + jnp.where(apart, forbidden, 0))
    return eps[jnp.zeros(batch, jnp.int32).at[rows].set(columns)]
