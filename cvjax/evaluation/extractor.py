"""What images are compared by: the features of a trained classifier, and what it takes them for."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cvjax.checks import check_channels, check_unit
from cvjax.errors import InputError

PyTree = Any
BATCH = 100


@dataclass(frozen=True)
class Extractor:
    """A classifier with its weights; its features are the mean over the last of its maps.

    The digits' classifier, as in the config of an evaluator:

        dict(type="evaluation.extractor.Extractor", name="digits",
             model=dict(type="nn.resnet.ResNet", ...),
             initialize=dict(type="train.restore.load_params", path="runs/judge"))

    Attributes:
      name: of the features. The Frechet distance is called by it, "FD-digits"; "FID" is that of
        `cvjax.nn.inception.InceptionV3` alone, with 1008 classes, images scaled to 299 x 299, and
        mean and std 0.5.
      model: a module with `features(x) -> {name: [b, h, w, c]}` and `__call__(x) -> logits`.
      initialize: `(params, model_state) -> (params, model_state, table)`, where the weights come
        from: `train.restore.load_params` or `nn.pretrained.load_pretrained`, with the path bound.
        The parameters are the group "model".
      image_shape: height, width and channels of what the model sees. Images of another size are
        scaled bilinearly, without a filter, as for the FID; grey is repeated for 3 channels.
      mean, std: the model sees (image - mean) / std, of images in [0, 1].

    Raises:
      InputError: a name that is misleading, a `std` of 0, weights that are not all there, such as
        those of torchvision's Inception for the FID, or what `initialize` raises.
    """

    name: str
    model: nn.Module
    initialize: Callable[[PyTree, PyTree], tuple[PyTree, PyTree, Any]]
    image_shape: tuple[int, int, int] = (28, 28, 1)
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    variables: PyTree = field(init=False, repr=False, compare=False)
    apply: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        if self.is_fid:
            object.__setattr__(self, "name", "inception")
        elif any(word in self.name.lower() for word in ("fid", "inception")):
            raise InputError(
                f"name is {self.name!r}, but FID is of the Inception network alone; name the "
                "features by what they are of"
            )
        blank = jnp.zeros((1, *self.image_shape))
        check_channels({"image": blank}, mean=self.mean, std=self.std)
        variables = jax.jit(self.model.init)(jax.random.key(0), blank)
        state = {key: value for key, value in variables.items() if key != "params"}
        params, state, table = self.initialize({"model": variables["params"]}, state)
        for row in getattr(table, "rows", ()):  # of what both ways of loading tell
            if row.status.startswith(("missing", "fresh", "shape differs", "no numbers")):
                raise InputError(
                    f"features {self.name!r} need all weights of the model, but of {row.path} the "
                    f"status is {row.status!r}"
                )
        object.__setattr__(self, "variables", {"params": params["model"], **state})
        object.__setattr__(self, "apply", jax.jit(self._apply))

    @property
    def is_fid(self) -> bool:
        """Whether the Frechet distance of these features is what is known as FID."""
        is_halved = np.all(np.asarray(self.mean) == 0.5) and np.all(np.asarray(self.std) == 0.5)
        is_of_fid = getattr(self.model, "is_of_fid", False)
        return bool(is_of_fid and is_halved and self.image_shape == (299, 299, 3))

    def __deepcopy__(self, memo: dict) -> "Extractor":
        """Itself: `fit` copies its evaluators, and weights that never change need no copy."""
        return self

    def __call__(self, images: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, d] and class probabilities [n, classes], float32, of images.

        `images` [n, h, w, c] are uint8, or float in [0, 1]. Raises InputError for others, and for
        a number of channels that the model cannot take.
        """
        images = np.asarray(images)
        if images.ndim != 4 or not len(images):
            raise InputError(f"images {list(images.shape)} must be [n, h, w, c], n at least 1")
        if images.shape[-1] not in (1, self.image_shape[-1]):
            raise InputError(
                f"images have {images.shape[-1]} channels; features {self.name!r} are of "
                f"{self.image_shape[-1]}"
            )
        rows = []
        for first in range(0, len(images), BATCH):
            part = unit(images[first : first + BATCH])
            missing = min(BATCH, len(images)) - len(part)  # one program for all parts
            padded = np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0)))
            features, probabilities = jax.device_get(self.apply(self.variables, padded))
            rows.append((features[: len(part)], probabilities[: len(part)]))
        features, probabilities = (np.concatenate(column) for column in zip(*rows, strict=True))
        return features, probabilities

    def _apply(self, variables: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        height, width, channels = self.image_shape
        x = jax.image.resize(
            x, (len(x), height, width, x.shape[-1]), method="linear", antialias=False
        )
        x = jnp.broadcast_to(x, (*x.shape[:-1], channels))
        x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        # Both read the same maps, which XLA computes once.
        *_, last = self.model.apply(variables, x, method="features").values()
        logits = self.model.apply(variables, x).astype(jnp.float32)  # NumPy files have no bfloat16
        return jnp.mean(last, axis=(1, 2), dtype=jnp.float32), jax.nn.softmax(logits)

    def fingerprint(self) -> str:
        """A hash of the weights and of all fields: another one, other features."""
        digest = hashlib.sha256(
            repr((self.name, self.model, self.image_shape, self.mean, self.std)).encode()
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.variables):
            leaf = np.asarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            digest.update(leaf.tobytes())
        return digest.hexdigest()


def unit(images: ArrayLike) -> np.ndarray:
    """Images as float32 in [0, 1]; uint8 are divided by 255, others must be floats in it."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    check_unit(images, "they must be uint8, or floats in [0, 1]")
    return images.astype(np.float32).clip(0, 1)
