"""Which classes are in an image: any number of them, each yes or no."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cvjax.checks import check_at_least, valid_rows
from cvjax.errors import InputError
from cvjax.train.task import Batch, Metrics, mean


class Pooled(nn.Module):
    """A linear score of the mean of the coarsest map, float32.

    Attributes:
      outputs: length of the scores.
    """

    outputs: int

    def __post_init__(self):
        check_at_least(self, outputs=1)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        maps: Sequence[jax.Array],
        size: tuple[int, int],
        *,
        train: bool = False,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """Maps [b, h, w, c], the finest first, to scores, float32 [b, outputs]."""
        pooled = jnp.mean(maps[-1], axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.outputs, name="score")(pooled)


def check(batch: Batch, module: object, *, field: str = "present") -> None:
    """Raises InputError for a truth in a batch on the host that is not in [0, 1]."""
    truth = valid_rows(batch, field)
    if truth.size and not (0 <= truth.min() and truth.max() <= 1):  # NaN is neither
        raise InputError(
            f"{field} goes from {truth.min()} to {truth.max()}; it must be 0 or 1: a yes or no for "
            "each class"
        )


def measure(
    logits: jax.Array, batch: Batch, *, field: str = "present"
) -> tuple[jax.Array, Metrics]:
    """The binary cross-entropy, mean over classes and valid examples; 0 when there is none.

    Args:
      logits: [b, k].
      batch: has the truth, 0 or 1, [b, k], under the name `field`, and `valid`, bool [b].
      field: see there.

    Returns:
      The loss, and as metrics loss, accuracy (of the yes and no of each class) and all_right (the
      share of the examples in which each of them is).

    Raises:
      InputError: the truth is of another shape.
    """
    valid = jnp.asarray(batch["valid"])
    if jnp.shape(batch[field]) != logits.shape:
        raise InputError(
            f"{field} is {list(jnp.shape(batch[field]))}; for scores {list(logits.shape)} it must "
            "be the same: a yes or no for each class"
        )
    truth = jnp.where(valid[:, None], batch[field], 0).astype(jnp.float32)
    logits = jnp.where(valid[:, None], logits.astype(jnp.float32), 0.0)
    losses = optax.sigmoid_binary_cross_entropy(logits, truth).mean(axis=-1)
    right = (logits > 0) == (truth > 0)
    value = jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
    return value, {
        "loss": mean(losses, valid),
        "accuracy": mean(right.mean(axis=-1), valid),
        "all_right": mean(right.all(axis=-1), valid),
    }
