"""One prediction for each truth, at the least total cost; exact, in jit. `jax.vmap` for a batch."""

import jax
import jax.numpy as jnp

from cvjax.detection.assigners import Assignment
from cvjax.detection.boxes import cxcywh_to_xyxy, giou
from cvjax.errors import InputError


def detr_cost(
    logits: jax.Array,
    predictions: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
    *,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> jax.Array:
    """What it costs to give each of n truths each of k predictions: float32 [n, k].

    N. Carion et al.: DETR (https://arxiv.org/abs/2005.12872), section 3.1 and appendix A.4: less
    the softmax probability of the class, plus the L1 distance of the boxes, less their GIoU.

    Args:
        logits: [k, classes + 1].
        predictions: [k, 4], cxcywh as shares of the image.
        boxes: [n, 4], the same.
        labels: int [n].
        class_weight: of -p.
        l1_weight: of the distance.
        giou_weight: of -GIoU.
    """
    p = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    labels = jnp.clip(labels, 0, p.shape[-1] - 1)
    boxes, predictions = (jnp.asarray(v, jnp.float32) for v in (boxes, predictions))
    distance = jnp.sum(jnp.abs(boxes[:, None] - predictions), -1)
    overlap = giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(predictions))
    return class_weight * -p[:, labels].T + l1_weight * distance - giou_weight * overlap


def hungarian(cost: jax.Array, valid: jax.Array) -> Assignment:
    """The assignment of k predictions with the least sum of cost [n, k] over valid truths [n].

    Each valid truth gets one prediction, each prediction at most one truth. Shortest augmenting
    paths (R. Jonker, A. Volgenant: A shortest augmenting path algorithm, Computing 38, 1987):
    O(n^2 k). Exact up to the rounding of float32. A cost that is not finite counts as worse than
    all others.

    Raises:
        InputError: more rows of truth than predictions.
    """
    n, k = cost.shape
    if n > k:
        raise InputError(f"{n} rows of truth cannot each have one of {k} predictions")
    if n == 0:
        nobody = jnp.zeros(k, bool)
        return Assignment(jnp.zeros(k, jnp.int32), nobody, jnp.ones(k, jnp.float32))
    cost = jax.lax.stop_gradient(jnp.asarray(cost, jnp.float32))
    valid = jnp.asarray(valid)
    finite = jnp.isfinite(cost) & valid[:, None]
    largest = jnp.max(jnp.where(finite, jnp.abs(cost), 0.0))
    # Scaled down where sums of them would not be finite: the search would not end.
    most = jnp.finfo(jnp.float32).max / (16 * n**2)
    scale = jnp.where(largest > most, most / largest, 1.0)
    cost = jnp.where(finite, cost * scale, 2 * n * (largest * scale) + 1)

    # Column k is where the path of the present truth begins; `owner` is n where nobody is.
    def give(row: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        u, v, owner = carry
        owner = owner.at[k].set(row)

        def extend(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            column, u, v, least, before, used = state
            used = used.at[column].set(True)
            here = owner[column]
            reduced = jnp.append(cost[here], jnp.inf) - u[here] - v
            shorter = ~used & (reduced < least)
            least = jnp.where(shorter, reduced, least)
            before = jnp.where(shorter, column, before)
            following = jnp.argmin(jnp.where(used, jnp.inf, least)).astype(jnp.int32)
            delta = least[following]
            u = u.at[jnp.where(used, owner, n + 1)].add(delta, mode="drop")
            v = jnp.where(used, v - delta, v)
            return following, u, v, jnp.where(used, least, least - delta), before, used

        start = jnp.int32(k)
        far, nowhere = jnp.full(k + 1, jnp.inf), jnp.full(k + 1, k, jnp.int32)
        state = (start, u, v, far, nowhere, jnp.zeros(k + 1, bool))
        column, u, v, _, before, _ = jax.lax.while_loop(lambda s: owner[s[0]] < n, extend, state)

        def hand_on(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            column, owner = state
            return before[column], owner.at[column].set(owner[before[column]])

        _, owner = jax.lax.while_loop(lambda s: s[0] != k, hand_on, (column, owner))
        return u, v, owner.at[k].set(n)

    def step(row: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return jax.lax.cond(valid[row], lambda c: give(row, c), lambda c: c, carry)

    nothing = jnp.zeros(n + 1), jnp.zeros(k + 1), jnp.full(k + 1, n, jnp.int32)
    owner = jax.lax.fori_loop(0, n, step, nothing)[2][:k]
    foreground = owner < n
    return Assignment(jnp.where(foreground, owner, 0), foreground, jnp.ones(k, jnp.float32))
