"""Muon: kernels move by their momentum, made orthogonal.

K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. The numbers are those of
`optax.contrib.muon`; the iteration is done on the small side of a kernel alone.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation, ScalarOrSchedule

from cvjax.checks import check_between, check_choice, check_count
from cvjax.errors import InputError
from cvjax.train.state import PyTree

_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan: steep at 0, near 1 from there on
_LEAST = 1e-8  # what is divided by is never less
_AT_A_TIME = 3
_PRECONDITIONINGS = "frobenius", "aol"


def muon(
    learning_rate: ScalarOrSchedule,
    *,
    ns_steps: int = 5,
    preconditioning: str = "frobenius",
    beta: float = 0.95,
    adam_b2: float = 0.999,
) -> GradientTransformation:
    """Muon for parameters of two or more axes, Adam with Nesterov's momentum for all others.

    A parameter is a matrix of all its axes but the last (the inputs of a dense or convolutional
    layer) by the last (its outputs). Its updates are longer by sqrt(outputs / inputs), if it has
    more outputs.

    Args:
      learning_rate: of both.
      ns_steps, preconditioning: as of `orthogonalize`.
      beta: the decay of the momentum, which is Nesterov's, with correction of the bias.
      adam_b2: that of Adam's second moment.

    Raises InputError for no steps, another preconditioning, and decays outside [0, 1).
    """
    check_count(1, **{"muon: ns_steps": ns_steps})
    check_choice(_PRECONDITIONINGS, **{"muon: preconditioning": preconditioning})
    for name, decay in (("beta", beta), ("adam_b2", adam_b2)):
        check_between(0, 1, **{f"muon: {name}": decay})
        if decay == 1:
            raise InputError(f"muon: {name} is 1; a mean with this decay would never begin")

    def direction(momentum: jax.Array) -> jax.Array:
        matrix = momentum.reshape(-1, momentum.shape[-1])
        longer = math.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))
        return longer * orthogonalize(matrix, ns_steps, preconditioning).reshape(momentum.shape)

    matrices = optax.chain(
        _momentum(beta),
        optax.stateless(lambda momentum, _: jax.tree.map(direction, momentum)),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition(
        {"matrix": matrices, "other": optax.nadam(learning_rate, b2=adam_b2)},
        lambda params: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "other", params),
    )


def orthogonalize(x: jax.Array, steps: int, preconditioning: str) -> jax.Array:
    """Makes all singular values of a matrix [m, n] about 1 (0.7 to 1.2), and keeps its vectors.

    By Newton-Schulz steps X <- (a + b A + c A^2) X with A = X X^T (of the smaller side). What
    several of them multiply X with is a polynomial of the first A, so that three steps at a time
    are taken on the small matrices, and X is multiplied once: for a kernel [3, 3, 64, 64] a third
    of the products. More at a time would be less exact: A is known to a rounding of its largest
    entry, and each step lets that grow up to 12 times where a singular value is small.

    Args:
      x: float32; all 0 stays 0.
      steps: 5 after the scaling of Jordan, 3 after the better one.
      preconditioning: what brings the singular values below 1 before: "frobenius" divides by the
        norm, "aol" each row by the root of its sum in |A| (T. Boissin et al.,
        https://arxiv.org/abs/2512.04632).

    Raises InputError for another preconditioning.
    """
    check_choice(_PRECONDITIONINGS, preconditioning=preconditioning)
    multiply = partial(jnp.matmul, precision="highest")
    a, b, c = _COEFFICIENTS
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    gram = multiply(x, x.T)
    if preconditioning == "aol":
        scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.abs(gram), axis=1), _LEAST))
    else:
        scale = jnp.broadcast_to(1 / (jnp.sqrt(jnp.trace(gram)) + _LEAST), gram.shape[:1])
    product, gram = jnp.diag(scale), scale[:, None] * gram * scale
    for step in range(steps):
        if step and step % _AT_A_TIME == 0:
            x = multiply(product, x)
            product, gram = jnp.eye(len(x)), multiply(x, x.T)
        factor = a * jnp.eye(len(x)) + b * gram + c * multiply(gram, gram)
        product, gram = multiply(factor, product), multiply(multiply(factor, gram), factor)
    x = multiply(product, x)
    return x.T if is_tall else x


class _Momentum(NamedTuple):
    count: jax.Array
    mean: PyTree


def _momentum(beta: float) -> GradientTransformation:
    """Replaces a gradient by where its decaying mean will be after one more like it."""

    def init(params: PyTree) -> _Momentum:
        return _Momentum(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(gradient: PyTree, state: _Momentum, _: PyTree = None) -> tuple[PyTree, _Momentum]:
        mean = optax.tree.update_moment(gradient, state.mean, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = jax.tree.map(
            lambda mean, gradient: beta * mean + (1 - beta) * gradient,
            optax.tree.bias_correction(mean, beta, optax.safe_increment(count)),
            optax.tree.bias_correction(gradient, beta, count),
        )
        return ahead, _Momentum(count, mean)

    return GradientTransformation(init, update)
