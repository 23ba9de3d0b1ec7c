"""The maps of any backbone, as heads read them, and a pass through any model in training."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least
from cvjax.nn.space_to_depth import space_to_depth


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


def ordered_features(
    backbone: nn.Module, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
) -> list[jax.Array]:
    """The maps [b, h_i, w_i, c_i] of images [b, h, w, c] in the order of their strides.

    The finest comes first, and of equal strides the one named first. `valid`, bool [b], says which
    rows are real; a backbone whose `features` does not take it is not told.
    """
    maps = backbone.features(x, train=train, **accepted(backbone.features, valid=valid))
    return [maps[name] for name in sorted(backbone.strides, key=backbone.strides.get)]


class Patches(nn.Module):
    """A backbone that sees squares of pixels, stacked as channels, in place of pixels.

    Nothing of the image is lost, all strides are `patch` times as large, and the maps cost so much
    less. Zeros fill up the last squares of an image whose sides are no multiples of `patch`.

    Attributes:
      backbone: a module with `features` and `strides`.
      patch: height and width of a square.
    """

    backbone: nn.Module
    patch: int = 2

    def __post_init__(self):
        check_at_least(self, patch=1)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map."""
        return {name: self.patch * stride for name, stride in self.backbone.strides.items()}

    @nn.compact
    def features(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The maps of the backbone, by their names."""
        height, width = (-side % self.patch for side in x.shape[1:3])
        x = space_to_depth(jnp.pad(x, ((0, 0), (0, height), (0, width), (0, 0))), self.patch)
        features = self.backbone.features
        return features(x, train=train, **accepted(features, valid=valid))
