"""Object detection: images to boxes, labels and scores, and to masks and keypoints."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

from cvjax import draw
from cvjax.checks import check_between, check_channels, check_labels
from cvjax.detection.boxes import clip
from cvjax.errors import InputError
from cvjax.nn.train_pass import accepted, train_pass
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective

SHOWN = 12  # images in a picture
POINT = 3  # pixels, side of the square that shows a keypoint


@dataclass(frozen=True)
class Detection:
    """Trains `model` to find objects.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "boxes": float32 [b, n, 4], x1 y1 x2 y2 in
    pixels, "box_label": integers [b, n] in 0..classes - 1, "box_valid": bool [b, n], "valid": bool
    [b]} and, where a model learns them, "masks": bool [b, n, h, w] and "keypoints": float32 [b, n,
    k, 3], x y in pixels and visibility, 0 where a point is not annotated. Nothing counts in a row
    that is not valid, be it an image or a box; a box that has no area inside of the image is none,
    nor is one of "crowd" or "ignore", bool [b, n], if a batch has these.

    Attributes:
      model: a module with `__call__(x, *, train=False) -> outputs`, arrays [b, ...], and two
        methods that are functions of these alone: `losses(outputs, truth, size) -> {name: scalar}`
        and `detections(outputs, size)`, what `predict` returns, with `truth` as the batch, without
        image, and `size` = (h, w). Such are `cvjax.detection.retinanet.RetinaNet` and
        `cvjax.detection.rcnn.RCNN`. If its call takes `valid` it is told which rows are real. If it
        takes `truth` it is given that where its losses are wanted, and may draw from the stream
        "sample". In training it may draw from "dropout".
      weights: of the losses in their sum, by name; 1 where none is given.
      fields: what else of each box, [b, n, ...], the model is to learn; it becomes part of `truth`.
      mean, std: the model sees (image - mean) / std: numbers, or one for each channel. The default
        maps [0, 1] to [-1, 1].
      shown_score: predictions with a lower score are not drawn.

    Raises:
      InputError: a batch has no boxes, or not what is named in `fields`; `weights` names a loss
        that the model does not have.
    """

    model: nn.Module
    weights: Mapping[str, float] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    shown_score: float = 0.5

    def __post_init__(self):
        check_between(0, math.inf, **{f"weights.{k}": v for k, v in self.weights.items()})

    @property
    def objectives(self) -> Sequence[Objective]:
        """One: the weighted sum of the model's losses, for the group "model"."""
        return (Objective("model", self.loss),)

    def check(self, batch: Batch) -> None:
        """Raises InputError for a batch on the host with a label that is no class of the model's.

        That is where the model, its `head` or its `box_head` has `num_classes`. Also for a `mean`
        or `std` of another length than images have channels.
        """
        self._check_fields(batch)
        check_channels(batch, mean=self.mean, std=self.std)
        real = np.asarray(batch["box_valid"], bool) & np.asarray(batch["valid"], bool)[:, None]
        check_labels(np.asarray(batch["box_label"])[real], _num_classes(self.model), "box_label")

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
        """The weighted sum of the losses; 0 for a batch of nothing.

        NaN where a label is no class of the model's: as background nobody would miss it.
        """
        valid = jnp.asarray(batch["valid"], bool)
        variables = {"params": params["model"], **state.model_state}
        rngs = {"dropout": rng, "sample": jax.random.fold_in(rng, 1)}
        outputs, model_state = train_pass(
            self.model, variables, self._input(batch), valid, rngs, truth=self._truth(batch)
        )
        value, metrics = self._measure(outputs, batch)
        return value, (model_state, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the loss and each of its parts, the mean over batches by their valid images."""
        told = accepted(self.model.__call__, truth=self._truth(batch))
        rngs = {"sample": rng} if "truth" in told else None
        return self._measure(self._outputs(params, model_state, batch, rngs, **told), batch)[1]

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns what the model detects, the best first, in a fixed number of rows m.

        `boxes` float32 [b, m, 4], x1 y1 x2 y2 in pixels, `scores` float32 [b, m] in [0, 1],
        `labels` int32 [b, m], and `detected` bool [b, m], False in the rows that are padding. If
        the model has them `masks` bool [b, m, h, w] and `keypoints` float32 [b, m, k, 3], x y in
        pixels and how sure it is.
        """
        outputs = self._outputs(params, model_state, batch)
        return self.model.detections(outputs, batch["image"].shape[1:3])

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the first 12 images, each with what is true and beside it what is predicted.

        Boxes and masks have the colour of the class, of keypoints each has its own; one that is not
        annotated is not drawn. A row of the batch that is not valid is black. Images have 1 or 3
        channels.
        """
        batch = {name: jnp.asarray(value)[:SHOWN] for name, value in batch.items()}
        found = self.predict(params, model_state, batch, rng)
        truth = self._truth(batch)
        images = jnp.clip(jnp.where(_rows(batch["valid"], batch["image"]), batch["image"], 0), 0, 1)
        seen = found["detected"] & (found["scores"] >= self.shown_score) & batch["valid"][:, None]
        # Of the truth, too, only what the model knows is drawn.
        known = {name: truth[name] for name in found if name in truth}
        panels = [
            _paint(images, {**known, "labels": truth["box_label"]}, truth["box_valid"]),
            _paint(images, found, seen),
        ]
        return {"detection": draw.grid(jnp.concatenate(panels, axis=2), columns=4, padding=2)}

    def _outputs(
        self,
        params: Params,
        model_state: PyTree,
        batch: Batch,
        rngs: dict[str, jax.Array] | None = None,
        **told: PyTree,
    ) -> PyTree:
        variables = {"params": params["model"], **model_state}
        return self.model.apply(variables, self._input(batch), train=False, rngs=rngs, **told)

    def _measure(self, outputs: PyTree, batch: Batch) -> tuple[jax.Array, Metrics]:
        truth = self._truth(batch)
        values = self.model.losses(outputs, truth, batch["image"].shape[1:3])
        if unknown := sorted(set(self.weights) - set(values)):
            name = unknown[0]
            raise InputError(f"Detection: weights has {name!r}, no loss of the model's; there are: "
                             f"{', '.join(values)}")  # fmt: skip
        total = sum(self.weights.get(name, 1.0) * value for name, value in values.items())
        if classes := _num_classes(self.model):
            label = truth["box_label"]
            is_class = (label >= 0) & (label < classes)
            total = jnp.where(jnp.all(is_class | ~truth["box_valid"]), total, jnp.nan)
        count = jnp.sum(truth["valid"])
        return total, {
            name: Average(total=value * count, count=count)
            for name, value in {"loss": total, **values}.items()
        }

    def _input(self, batch: Batch) -> jax.Array:
        """The normalized images; zeros where not valid, whatever (NaN, even) is there."""
        image = (batch["image"] - jnp.array(self.mean)) / jnp.array(self.std)
        return jnp.where(_rows(batch["valid"], image), image, 0.0)

    def _check_fields(self, batch: Batch) -> None:
        for name in ("boxes", "box_label", "box_valid", *self.fields):
            if name not in batch:
                raise InputError(f"Detection: the batch has no {name!r}, only {', '.join(batch)}")

    def _truth(self, batch: Batch) -> Batch:
        """The truth with zeros in each row that is not valid, and at least one row."""
        self._check_fields(batch)
        height, width = batch["image"].shape[1:3]
        valid = jnp.asarray(batch["valid"], bool)
        boxes = jnp.asarray(batch["boxes"], jnp.float32)
        inside = clip(boxes, height, width)
        has_area = jnp.all(inside[..., 2:] > inside[..., :2], axis=-1)
        real = jnp.asarray(batch["box_valid"], bool) & valid[:, None] & has_area
        for name in ("crowd", "ignore"):
            if name in batch:
                real &= ~jnp.asarray(batch[name], bool)
        truth = {"boxes": boxes, "box_label": jnp.asarray(batch["box_label"]).astype(jnp.int32)}
        if "masks" in batch:
            truth["masks"] = jnp.asarray(batch["masks"], bool)
        if "keypoints" in batch:
            points = jnp.asarray(batch["keypoints"], jnp.float32)
            truth["keypoints"] = jnp.where(points[..., 2:] > 0, points, 0.0)
        truth |= {name: jnp.asarray(batch[name]) for name in self.fields}
        truth = {
            name: jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
            for name, x in truth.items()
        } | {"box_valid": real}
        if boxes.shape[1] == 0:
            truth = {
                name: jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2)))
                for name, x in truth.items()
            }
        return {**truth, "valid": valid}


def _num_classes(model: nn.Module) -> int:
    """How many classes a model has; 0 where it does not say."""
    parts = (model, getattr(model, "head", None), getattr(model, "box_head", None))
    return next((found for part in parts if (found := getattr(part, "num_classes", 0))), 0)


def _paint(images: jax.Array, objects: Mapping[str, jax.Array], shown: jax.Array) -> jax.Array:
    """Draws what there is of "masks", "boxes" and "keypoints" where `shown`, bool [b, n]."""
    labels = objects["labels"]
    if "masks" in objects:
        images = draw.paint_masks(images, objects["masks"], labels, shown)
    images = draw.paint_boxes(images, objects["boxes"], labels, shown)
    if "keypoints" in objects:
        points = objects["keypoints"]
        b, n, k, _ = points.shape
        corner = jnp.floor(points[..., :2] - POINT / 2 + 0.5)
        squares = jnp.concatenate([corner, corner + POINT], axis=-1).reshape(b, n * k, 4)
        colors = jnp.broadcast_to(jnp.arange(k), (b, n, k)).reshape(b, n * k)
        known = (shown[..., None] & (points[..., 2] > 0)).reshape(b, n * k)
        images = draw.paint_boxes(images, squares, colors, known)
    return images


def _rows(valid: jax.Array, x: jax.Array) -> jax.Array:
    """`valid` [b], shaped to go with x [b, ...]."""
    return jnp.reshape(valid, (-1,) + (1,) * (x.ndim - 1))
