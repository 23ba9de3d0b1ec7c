"""Semantic segmentation: a softmax over classes at every pixel."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
from clu.metrics import Average

from cvjax import draw
from cvjax.checks import check_between, check_channels, check_labels, valid_rows
from cvjax.errors import InputError, nearest
from cvjax.nn.train_pass import train_pass
from cvjax.segmentation.losses import IGNORE, check_shapes, counted, cross_entropy
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean

Loss = Callable[[jax.Array, jax.Array], jax.Array]

SHOWN = 12  # images in a picture


@dataclass(frozen=True)
class Segmentation:
    """Trains `model` to name the class of every pixel.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "mask": integers [b, h, w], "valid": bool
    [b]}: a pixel's class, or 255 where it does not count. Nothing counts in a row that is not
    valid.

    Attributes:
      model: any module with `__call__(x, *, train=False) -> logits [b, h, w, classes]`, for example
        `cvjax.segmentation.model.Segmenter`. It may draw from the stream "dropout" and keep
        collections of its own (`batch_stats`). If its call also takes `valid` it is told which rows
        are real; an invalid row is an image of zeros.
      losses: functions (logits, mask) -> scalar, 255 in the mask being no class, by name.
      weights: of the losses in their sum, by name; 1 where none is given.
      mean, std: the model sees (image - mean) / std: numbers, or one for each channel. The default
        maps [0, 1] to [-1, 1].

    Raises:
      InputError: there are no losses, one is named as another metric, or there is a weight for one
        that is not there.
    """

    model: nn.Module
    losses: Mapping[str, Loss] = field(default_factory=lambda: {"cross_entropy": cross_entropy})
    weights: Mapping[str, float] | None = None
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def __post_init__(self):
        if not self.losses:
            raise InputError("Segmentation: losses is empty; there must be at least one")
        for name in ("loss", "accuracy"):
            if name in self.losses:
                raise InputError(
                    f"losses: {name!r} is the name of another metric; call it something else"
                )
        for name, loss in self.losses.items():
            if not callable(loss):
                raise InputError(f"losses.{name} is {loss!r}; it must be a function")
        for name, weight in (self.weights or {}).items():
            check_between(0, math.inf, **{f"weights.{name}": weight})
            if name not in self.losses:
                raise InputError(f"weights: no loss is named {name!r}{nearest(name, self.losses)}")

    @property
    def objectives(self) -> Sequence[Objective]:
        """One: the weighted sum of the losses, for the group "model"."""
        return (Objective("model", self.loss),)

    def check(self, batch: Batch) -> None:
        """Raises InputError for a batch on the host without masks, or with a class too many.

        The latter where the model's head says how many there are, by a field `num_classes`. Also
        for a `mean` or `std` that has another length than the images have channels.
        """
        if "mask" not in batch:
            raise InputError(f"Segmentation needs a field mask; there are: {', '.join(batch)}")
        check_channels(batch, mean=self.mean, std=self.std)
        check_masks(batch, getattr(self.model, "head", None))

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": parameters} and the model's other collections."""
        params_rng, dropout_rng = jax.random.split(rng)
        variables = self.model.init(
            {"params": params_rng, "dropout": dropout_rng},
            self._input(batch["image"], batch["valid"]),
            train=False,
        )
        return {"model": variables.pop("params")}, variables

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The weighted sum of the losses over the pixels that count; 0 when none does."""
        valid = batch["valid"]
        variables = {"params": params["model"], **state.model_state}
        image, rngs = self._input(batch["image"], valid), {"dropout": rng}
        logits, model_state = train_pass(self.model, variables, image, valid, rngs)
        value, metrics = measure(logits, batch, losses=self.losses, weights=self.weights)
        return value, (model_state, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the loss, the losses where there are several, and accuracy, of pixels.

        Each is weighted with the number of pixels that count: over a whole set that is exact for
        the accuracy and for losses that are means over pixels; for `dice` and `lovasz_softmax` it
        is the mean over batches.
        """
        logits = self.logits(params, model_state, batch["image"], batch["valid"])
        return measure(logits, batch, losses=self.losses, weights=self.weights)[1]

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns prediction, the most probable class of each pixel, int32 [b, h, w]."""
        logits = self.logits(params, model_state, batch["image"], batch["valid"])
        return {"prediction": jnp.argmax(logits, axis=-1).astype(jnp.int32)}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the first 12 images, each beside its truth and the prediction, in one picture.

        The same ones at every evaluation: one sees how they are learned. A row of the batch that is
        not valid is black. Channels as `draw.in_colour`.
        """
        batch = {name: jnp.asarray(batch[name])[:SHOWN] for name in ("image", "mask", "valid")}
        logits = self.logits(params, model_state, batch["image"], batch["valid"])
        return {"segmentation": side_by_side(logits, batch)}

    def logits(
        self,
        params: Params,
        model_state: PyTree,
        image: jax.Array,
        valid: jax.Array | None = None,
    ) -> jax.Array:
        """The logits, float32 [b, h, w, classes], of images [b, h, w, c] in [0, 1]."""
        variables = {"params": params["model"], **model_state}
        logits = self.model.apply(variables, self._input(image, valid), train=False)
        return logits.astype(jnp.float32)

    def _input(self, image: jax.Array, valid: jax.Array | None) -> jax.Array:
        """The normalized images; zeros where not valid, whatever (NaN, even) is there."""
        image = (image - jnp.array(self.mean)) / jnp.array(self.std)
        return image if valid is None else jnp.where(valid[:, None, None, None], image, 0.0)


def measure(
    logits: jax.Array,
    batch: Batch,
    *,
    losses: Mapping[str, Loss],
    weights: Mapping[str, float] | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of losses over the pixels that count, and all metrics.

    Args:
      logits: [b, h, w, classes].
      batch: has `mask`, integers [b, h, w], 255 where a pixel does not count, and `valid`.
      losses: (logits, mask) -> scalar, by name.
      weights: of the losses, by name; 1 where none is given.

    Returns:
      The sum, and as metrics loss (that sum), each loss by its name where there are several, and
      accuracy, each with the number of pixels that count.
    """
    mask = _truth(logits, batch)
    counts = counted(mask)
    pixels = jnp.sum(counts)
    values = {name: loss(logits, mask) for name, loss in losses.items()}
    total = sum((weights or {}).get(name, 1.0) * value for name, value in values.items())
    reported = {"loss": total, **(values if len(values) > 1 else {})}
    metrics = {
        name: Average(total=value * pixels, count=pixels) for name, value in reported.items()
    }
    return total, {**metrics, "accuracy": mean(jnp.argmax(logits, axis=-1) == mask, counts)}


def side_by_side(logits: jax.Array, batch: Batch) -> jax.Array:
    """One picture [H, W, 3]: the first 12 images, each beside its true and its predicted mask.

    The masks are painted over the image. `logits` are [b, h, w, classes]; see `Segmentation`.
    """
    batch = {name: jnp.asarray(batch[name])[:SHOWN] for name in ("image", "mask", "valid")}
    logits = logits[:SHOWN]
    valid = jnp.asarray(batch["valid"])[:, None, None]
    images = jnp.where(valid[..., None], jnp.clip(jnp.asarray(batch["image"]), 0.0, 1.0), 0.0)
    images = draw.in_colour(images)
    truth = jnp.where(valid, batch["mask"], 0)
    prediction = jnp.where(valid, jnp.argmax(logits, axis=-1), 0)
    panels = [images, draw.paint_classes(images, truth), draw.paint_classes(images, prediction)]
    return draw.grid(jnp.concatenate(panels, axis=2), columns=3, padding=2)


def check_masks(batch: Batch, module: object) -> None:
    """Raises InputError for a class in a mask of a batch on the host that `module` does not have.

    That is where it says how many there are, by a field `num_classes`.
    """
    name = f"mask, where it is not {IGNORE} (ignored),"
    classes = getattr(module, "num_classes", 0)
    check_labels(valid_rows(batch, "mask"), classes, name, ignored=IGNORE)


def _truth(logits: jax.Array, batch: Batch) -> jax.Array:
    """The mask, int32, without the rows that are not valid."""
    mask = jnp.asarray(batch["mask"]).astype(jnp.int32)
    check_shapes(logits, mask)  # another would be broadcast
    return jnp.where(jnp.asarray(batch["valid"])[:, None, None], mask, IGNORE)
