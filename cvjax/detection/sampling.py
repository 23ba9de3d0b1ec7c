"""Which anchors or proposals a two-stage detector learns from: a fixed number, drawn at random.

R. Girshick: Fast R-CNN (https://arxiv.org/abs/1504.08083), section 2.3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cvjax.checks import check_between, check_count
from cvjax.detection.assigners import Assignment


class Samples(NamedTuple):
    """s boxes of one image, those with an object first, then background, then padding.

    `rows` int32 [s] is their place among those from which they were drawn; `boxes` float32 [s, 4];
    `index` int32 [s] the row of the truth, 0 where there is none; `foreground` bool [s]; `valid`
    bool [s]. What is not valid has row 0.
    """

    rows: jax.Array
    boxes: jax.Array
    index: jax.Array
    foreground: jax.Array
    valid: jax.Array


def sample(
    rng: jax.Array, boxes: jax.Array, assignment: Assignment, *, count: int, fraction: float
) -> Samples:
    """Draws `count` of c boxes without replacement; at most `fraction` of them have an object.

    Where there are fewer of those, background takes their place. Whoever has the weight 0 is never
    drawn. The draw of a box depends on `rng` and its row alone, not on how many rows follow.

    Args:
        rng: a key.
        boxes: [c, 4].
        assignment: of the c boxes.
        count: rows of the result; c if that is less.
        fraction: in 0..1.

    Raises:
        InputError: a count below 1, or a fraction outside.
    """
    check_count(1, count=count)
    check_between(0, 1, fraction=fraction)
    boxes, count = jnp.asarray(boxes, jnp.float32), min(count, boxes.shape[0])
    lot = jax.random.uniform(rng, boxes.shape[:1])
    counts = assignment.weight > 0
    # The first of the foreground by lot stand above all of the background.
    best, some = jax.lax.top_k(
        jnp.where(assignment.foreground & counts, lot, -1.0), foreground_rows(count, fraction)
    )
    others = jnp.where(~assignment.foreground & counts, lot, -1.0)
    order = jnp.concatenate([jnp.where(best >= 0, 2 + best, -1.0), others])
    rows = jnp.concatenate([some, jnp.arange(boxes.shape[0])])
    order, place = jax.lax.top_k(order, count)
    valid = order >= 0
    rows = jnp.where(valid, rows[place], 0).astype(jnp.int32)
    return Samples(rows, boxes[rows], assignment.index[rows] * valid, order >= 2, valid)


def foreground_rows(count: int, fraction: float) -> int:
    """So many of `count` samples at most have an object; they are the first."""
    return int(count * fraction)
