"""Grids of learned vectors for images of another size than the one they were learned at."""

import jax
import jax.numpy as jnp
import numpy as np

A = -0.75  # the free parameter of the kernel, as in torch and OpenCV


def cubic_weight(distance: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Keys' equation 4: the weight of a pixel at a distance in [0, 2] pixels."""
    near = (A + 2) * distance**3 - (A + 3) * distance**2 + 1
    far = A * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    xp = np if isinstance(distance, np.ndarray) else jnp
    return xp.where(distance <= 1, near, far)


def resize_bicubic(grid: jax.Array, height: int, width: int) -> jax.Array:
    """Resamples [h, w, c] to [height, width, c] by cubic convolution.

    R. Keys: Cubic Convolution Interpolation for Digital Image Processing, IEEE TASSP 1981,
    equation 4, with a = -0.75, pixels as areas (their corners are aligned, not their centres),
    the border continued, and no filter where the grid becomes smaller. `jax.image.resize` has
    a = -0.5, which is another function: torch resamples position embeddings by
    this one, without a filter as Hugging Face does it (timm 1.0 filters).
    """
    if grid.shape[:2] == (height, width):
        return grid
    rows, columns = _weights(grid.shape[0], height), _weights(grid.shape[1], width)
    resized = jnp.einsum(
        "ij,kl,jlc->ikc", rows, columns, grid.astype(jnp.float32), precision="highest"
    )
    return resized.astype(grid.dtype)


def _weights(old: int, new: int) -> np.ndarray:
    """The matrix float32 [new, old] that resamples a row."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        index = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), index), cubic_weight(np.abs(at - (first + tap))))
    return matrix.astype(np.float32)
