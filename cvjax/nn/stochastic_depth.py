"""Stochastic depth: in training a residual block is the identity for some of the examples.

G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger: Deep Networks with Stochastic Depth, ECCV 2016
(https://arxiv.org/abs/1603.09382). As usual since, what is kept is scaled up in training, so that
evaluation needs no factor.
"""

import flax.linen as nn
import jax

from cvjax.errors import InputError


def drop_rates(last: float, blocks: int) -> list[float]:
    """The rate of each block: it rises linearly from 0 in the first to `last` in the last."""
    if not 0 <= last < 1:
        raise InputError(f"stochastic_depth is {last}; it must be in [0, 1)")
    return [last * block / max(blocks - 1, 1) for block in range(blocks)]


def drop_branch(branch: jax.Array, rate: float, train: bool) -> jax.Array:
    """Zero for a share `rate` of the examples, else branch / (1 - rate); itself in evaluation.

    Called inside a compact method, before the shortcut is added; [b, ...], drawn from the
    stream "dropout".
    """
    drop = nn.Dropout(rate, broadcast_dims=tuple(range(1, branch.ndim)))
    return drop(branch, deterministic=not train)
