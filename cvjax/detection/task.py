"""Object detection: images to boxes, labels and scores."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
from clu.metrics import Average

from cvjax import draw
from cvjax.detection.boxes import clip
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective

SHOWN = 12  # images in a picture


@dataclass(frozen=True)
class Detection:
    """Trains `model` to find objects.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "boxes": float32 [b, n, 4], x1 y1 x2 y2 in
    pixels, "box_label": integers [b, n] in 0..classes - 1, "box_valid": bool [b, n], "valid": bool
    [b]}. Nothing counts in a row that is not valid, be it an image or a box; a box that has no
    area inside of the image is none.

    Attributes:
      model: a module with `__call__(x, *, train=False) -> outputs`, arrays [b, ...], and
        two methods that are functions of these alone: `losses(outputs, truth, size) -> {name:
        scalar}` and `detections(outputs, size) -> {"boxes": [b, m, 4], "scores": [b, m], "labels":
        [b, m], "detected": bool [b, m]}`, with `truth` as the batch, without image, and `size` =
        (h, w). Such are `cvjax.detection.retinanet.RetinaNet` and `cvjax.detection.fcos.FCOS`. If
        its call takes `valid` it is told which rows are real. It may draw from the stream
        "dropout".
      weights: of the losses in their sum, by name; 1 where none is given.
      mean, std: the model sees (image - mean) / std: numbers, or one for each channel. The default
        maps [0, 1] to [-1, 1].
      shown_score: predictions with a lower score are not drawn.
    """

    model: nn.Module
    weights: Mapping[str, float] = field(default_factory=dict)
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    shown_score: float = 0.5

    @property
    def objectives(self) -> Sequence[Objective]:
        """One: the weighted sum of the model's losses, for the group "model"."""
        return (Objective("model", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": parameters} and the model's other collections."""
        params_rng, dropout_rng = jax.random.split(rng)
        variables = self.model.init(
            {"params": params_rng, "dropout": dropout_rng}, self._input(batch), train=False
        )
        return {"model": variables.pop("params")}, variables

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The weighted sum of the losses; 0 for a batch of nothing."""
        valid = jnp.asarray(batch["valid"])
        any_valid = jnp.any(valid)
        takes_valid = "valid" in inspect.signature(self.model.__call__).parameters
        outputs, model_state = self.model.apply(
            {"params": params["model"], **state.model_state},
            self._input(batch),
            train=True,
            rngs={"dropout": rng},
            mutable=list(state.model_state),
            # The statistics of no rows at all would be NaN.
            **({"valid": valid | ~any_valid} if takes_valid else {}),
        )
        model_state = jax.tree.map(
            lambda new, old: jnp.where(any_valid, new, old), dict(model_state), state.model_state
        )
        value, metrics = self._measure(outputs, batch)
        return value, (model_state, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the loss and each of its parts, the mean over batches by their valid images."""
        return self._measure(self._outputs(params, model_state, batch), batch)[1]

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns what the model detects, the best first, in a fixed number of rows m.

        `boxes` float32 [b, m, 4], x1 y1 x2 y2 in pixels, `scores` float32 [b, m] in [0, 1],
        `labels` int32 [b, m], and `detected` bool [b, m], False in the rows that are padding.
        """
        outputs = self._outputs(params, model_state, batch)
        return self.model.detections(outputs, batch["image"].shape[1:3])

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the first 12 images, each with its true boxes and beside it with the predicted.

        The colour is that of the class. A row of the batch that is not valid is black. Images have
        1 or 3 channels.
        """
        batch = {name: jnp.asarray(value)[:SHOWN] for name, value in batch.items()}
        found = self.predict(params, model_state, batch, rng)
        truth = self._truth(batch)
        images = jnp.clip(jnp.where(_rows(batch["valid"], batch["image"]), batch["image"], 0), 0, 1)
        seen = found["detected"] & (found["scores"] >= self.shown_score) & batch["valid"][:, None]
        panels = [
            draw.paint_boxes(images, truth["boxes"], truth["box_label"], truth["box_valid"]),
            draw.paint_boxes(images, found["boxes"], found["labels"], seen),
        ]
        return {"detection": draw.grid(jnp.concatenate(panels, axis=2), columns=4, padding=2)}

    def _outputs(self, params: Params, model_state: PyTree, batch: Batch) -> PyTree:
        variables = {"params": params["model"], **model_state}
        return self.model.apply(variables, self._input(batch), train=False)

    def _measure(self, outputs: PyTree, batch: Batch) -> tuple[jax.Array, Metrics]:
        truth = self._truth(batch)
        values = self.model.losses(outputs, truth, batch["image"].shape[1:3])
        total = sum(self.weights.get(name, 1.0) * value for name, value in values.items())
        count = jnp.sum(truth["valid"])
        return total, {
            name: Average(total=value * count, count=count)
            for name, value in {"loss": total, **values}.items()
        }

    def _input(self, batch: Batch) -> jax.Array:
        """The normalized images; zeros where not valid, whatever (NaN, even) is there."""
        image = (batch["image"] - jnp.array(self.mean)) / jnp.array(self.std)
        return jnp.where(_rows(batch["valid"], image), image, 0.0)

    def _truth(self, batch: Batch) -> Batch:
        """The truth with zeros in each row that is not valid, and at least one row."""
        height, width = batch["image"].shape[1:3]
        valid = jnp.asarray(batch["valid"])
        boxes = jnp.asarray(batch["boxes"], jnp.float32)
        inside = clip(boxes, height, width)
        has_area = jnp.all(inside[..., 2:] > inside[..., :2], axis=-1)
        real = jnp.asarray(batch["box_valid"]) & valid[:, None] & has_area
        boxes = jnp.where(real[..., None], boxes, 0.0)
        labels = jnp.where(real, jnp.asarray(batch["box_label"]).astype(jnp.int32), 0)
        if boxes.shape[1] == 0:
            boxes = jnp.pad(boxes, ((0, 0), (0, 1), (0, 0)))
            labels, real = jnp.pad(labels, ((0, 0), (0, 1))), jnp.pad(real, ((0, 0), (0, 1)))
        return {"boxes": boxes, "box_label": labels, "box_valid": real, "valid": valid}


def _rows(valid: jax.Array, x: jax.Array) -> jax.Array:
    """`valid` [b], shaped to go with x [b, ...]."""
    return jnp.reshape(valid, (-1,) + (1,) * (x.ndim - 1))
