"""Squares of pixels as the channels of one, and back."""

import jax


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
    """[b, h, w, c] -> [b, h / patch, w / patch, patch * patch * c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `space_to_depth`: [b, h, w, patch * patch * c] -> [b, h p, w p, c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, c // patch**2)
