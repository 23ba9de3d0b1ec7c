"""A pass through any model in training, in a batch of which some rows may be padding."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def accepted(function: Callable, **known: Any) -> dict[str, Any]:
    """Of what is known, by name, that which a function takes."""
    takes = inspect.signature(function).parameters
    return {name: value for name, value in known.items() if name in takes}


def train_pass(
    model: nn.Module,
    variables: Mapping[str, Any],
    x: Any,
    valid: jax.Array,
    rngs: Mapping[str, jax.Array],
    **known: Any,
) -> tuple[Any, dict[str, Any]]:
    """Applies a model in training; (outputs, its collections after that).

    Args:
      model: called as `model(x, train=True, ...)`, with those of `valid` and `known` that it takes.
      variables: {"params": ...} and other collections, such as "batch_stats", all of which may
        change. Without any valid row they stay.
      valid: bool [b], the rows of the batch that are real.
    """
    any_valid = jnp.any(valid)
    before = {name: value for name, value in variables.items() if name != "params"}
    outputs, after = model.apply(
        dict(variables), x, train=True, rngs=rngs, mutable=list(before),
        # The statistics of no rows at all would be NaN.
        **accepted(model.__call__, valid=valid | ~any_valid, **known),
    )  # fmt: skip
    return outputs, jax.tree.map(
        lambda new, old: jnp.where(any_valid, new, old), dict(after), before
    )
