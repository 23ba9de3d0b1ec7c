"""A first convolution that is computed, not learned: it whitens the patches of the training images.

D. Page, How to Train Your ResNet, part 8: the eigenvectors of the covariance of the patches, each
divided by the square root of its eigenvalue, and their negatives, so that no sign is lost.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_count, check_positive
from cvjax.data.sources import Source
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree


def whiten(
    params: Params,
    model_state: PyTree,
    *,
    source: Source,
    mean: float | tuple[float, ...] = 0.5,
    std: float | tuple[float, ...] = 0.5,
    layer: str = "whitening",
    examples: int = 2000,
    epsilon: float = 1e-2,
) -> tuple[Params, PyTree, str]:
    """Returns params with params["model"][layer]["kernel"] computed; for `fit(initialize=...)`.

    The kernel is [k, k, c, 2 k k c]; it should be frozen.

    Args:
      params, model_state: of a fresh model; the latter stays.
      source: the training set; `examples` of its images, evenly spread, are used.
      mean, std: as the task normalizes.
      layer: the name of the convolution.
      epsilon: added to the eigenvalues: directions in which patches hardly vary are not blown up.

    Raises:
      InputError: there is no such layer, its kernel has another shape or is larger than an image,
        or a setting makes no sense.
    """
    check_count(1, **{"whiten: examples": examples})
    check_positive(**{"whiten: epsilon": epsilon})
    layers = params["model"]
    if "kernel" not in layers.get(layer, {}):
        raise InputError(f"whiten: the model has no convolution named {layer!r}")
    kernel = layers[layer]["kernel"]
    size, _, channels, features = kernel.shape
    length = size * size * channels
    if features != 2 * length:
        raise InputError(
            f"whiten: the kernel of {layer!r} is {list(kernel.shape)}; its last axis must be "
            f"{2 * length}"
        )
    rows = np.linspace(0, len(source) - 1, min(examples, len(source))).astype(int)
    covariance, count = np.zeros((length, length)), 0
    for row in rows:
        image = np.asarray(source[int(row)]["image"])
        if min(image.shape[:2]) < size:
            raise InputError(
                f"whiten: image {row} is {image.shape[0]} x {image.shape[1]}; the kernel of "
                f"{layer!r} is {size} x {size}"
            )
        scale = 255 if image.dtype == np.uint8 else 1
        image = (image / scale - np.asarray(mean)) / np.asarray(std)
        windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))
        patches = np.moveaxis(windows, 2, -1).reshape(-1, length)  # [rows, columns, channels]
        covariance += patches.T @ patches
        count += len(patches)
    values, vectors = np.linalg.eigh(covariance / count)
    whitening = (vectors / np.sqrt(values + epsilon)).reshape(size, size, channels, length)
    kernel = jnp.asarray(np.concatenate([whitening, -whitening], -1), kernel.dtype)
    kernel = jax.device_put(kernel, layers[layer]["kernel"].sharding)
    model = {**layers, layer: {**layers[layer], "kernel": kernel}}
    table = f"model/{layer}/kernel  {list(kernel.shape)}  whitens {count} patches"
    return {**params, "model": model}, model_state, table
