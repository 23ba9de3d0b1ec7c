"""Which noise goes with which image of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment


def optimal_coupling(x: jax.Array, eps: jax.Array, group: jax.Array | None = None) -> jax.Array:
    """The rows of `eps` [b, ...] in another order: least sum of squared distances to those of `x`.

    A. Tong et al., https://arxiv.org/abs/2302.00482, section 3.2.4 and A. Pooladian et al.,
    https://arxiv.org/abs/2304.14772: the paths of a batch cross less. Exact, by SciPy on the host.

    Args:
      x: images [b, ...].
      eps: noise of the same shape.
      group: integers [b, ...], labels or captions: noise stays among equal rows. It must: else
        noise would depend on the condition in training, but not in sampling.
    """

    def assign(*arrays: jax.Array) -> np.ndarray:
        x, eps, group = map(np.asarray, arrays)
        gain = x @ eps.T  # the rest of |x - eps|^2 is the same for every order
        apart = (group[:, None] != group[None]).any(-1)
        forbidden = 2 * len(x) * np.abs(gain).max(initial=0) + 1
        _, order = linear_sum_assignment(np.where(apart, -forbidden, gain), maximize=True)
        return order.astype(np.int32)

    batch = len(x)
    if batch == 0:
        return eps
    group = jnp.zeros(batch, jnp.int32) if group is None else group
    flat = (jax.lax.stop_gradient(a.reshape(batch, -1)) for a in (x, eps, group))
    return eps[jax.pure_callback(assign, jax.ShapeDtypeStruct((batch,), jnp.int32), *flat)]
