"""Views of an image for test-time augmentation: functions of normalized images [b, h, w, c]."""

import jax
import jax.numpy as jnp


def mirrored(images: jax.Array) -> jax.Array:
    """From left to right."""
    return images[:, :, ::-1]


def shifted(images: jax.Array, *, rows: int, columns: int, mirror: bool = False) -> jax.Array:
    """Moved down by `rows` and right by `columns`, both of either sign; mirrored first if asked.

    What is uncovered shows the mirror image of what is beside it, so that there are no edges.
    """
    images = mirrored(images) if mirror else images
    down, right = abs(rows), abs(columns)
    padded = jnp.pad(images, ((0, 0), (down, down), (right, right), (0, 0)), mode="reflect")
    height, width = images.shape[1:3]
    top, left = down - rows, right - columns
    return padded[:, top : top + height, left : left + width]
