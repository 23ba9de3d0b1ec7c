"""Image classification: one class for each image, or any number of labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cvjax import draw
from cvjax.checks import (
    check_call,
    check_channels,
    check_fractions,
    check_labels,
    check_positive,
    fitting,
    valid_rows,
)
from cvjax.classification.losses import (
    distillation,
    sigmoid_distillation,
    softmax_cross_entropy,
)
from cvjax.data.transforms.mixing import Mixed
from cvjax.errors import InputError
from cvjax.nn.train_pass import train_pass
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean

GREEN, RED, BLACK = (0.0, 0.7, 0.2), (0.9, 0.1, 0.1), (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Classification:
    """Trains `model` to name the class of an image.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "label": int32 [b], "valid": bool [b]}. A
    label may also be soft: float32 [b, classes], rows of probabilities; the right class is then the
    most probable one. Without `exclusive` it is float32 [b, classes] with 1 for each label that the
    image has and 0 for the others.

    Attributes:
      model: any module with `__call__(x, *, train=False) -> logits [b, classes]`. It may draw from
        the stream "dropout" and keep collections of its own (`batch_stats`). If its call also
        takes `valid` it is told which rows are real; an invalid row is an image of zeros.
      loss_function: logits and targets, both [b, classes], to [b]: one of
        `cvjax.classification.losses`, its settings bound.
      exclusive: an image has exactly one class (probabilities by softmax). False: labels do not
        exclude each other (by sigmoid, and a label is given to what is above 0.5); take
        `losses.sigmoid_cross_entropy` or `losses.sigmoid_focal`.
      label_smoothing: probability taken from the label and spread evenly over all classes
        (C. Szegedy et al., https://arxiv.org/abs/1512.00567, section 7), in training only.
      augment: changes the images on the device, in training only: `augment(images, rng)`, such as
        those of `data.transforms.batched`.
      mix: mixes images and targets, in training only: `mix(images, rng, valid)`, such as those of
        `data.transforms.mixing`. The accuracy of training is then that of naming the class with
        the larger share.
      views: test-time augmentation: functions of images [b, h, w, c], by name. Held-out logits are
        the mean of those of the image and of all its views (`cvjax.classification.views`).
      teacher: a trained classifier to learn from, on the same augmented and mixed images (L. Beyer
        et al., https://arxiv.org/abs/2106.05237). Its parameters are the group "teacher", which no
        objective trains: `fit(initialize=...)` must load them (`train.restore.load_params` with
        take={"model": "teacher", "model_state/batch_stats": "model_state/teacher/batch_stats"}).
      teacher_weight: w in (1 - w) loss + w distillation.
      temperature: of the distillation.
      mean, std: the model sees (image - mean) / std: numbers, or one for each channel. The default
        maps [0, 1] to [-1, 1].

    Raises:
      InputError: label_smoothing or teacher_weight outside [0, 1], or smoothed labels that do not
        exclude each other.
    """

    model: nn.Module
    loss_function: Callable[[jax.Array, jax.Array], jax.Array] = softmax_cross_entropy
    exclusive: bool = True
    label_smoothing: float = 0.0
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    mix: Callable[[jax.Array, jax.Array, jax.Array], Mixed] | None = None
    views: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None
    teacher: nn.Module | None = None
    teacher_weight: float = 0.5
    temperature: float = 1.0
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def __post_init__(self):
        check_fractions(self, "label_smoothing", "teacher_weight")
        if self.label_smoothing and not self.exclusive:
            raise InputError(
                f"label_smoothing is {self.label_smoothing}; without exclusive it must be 0"
            )
        check_positive(temperature=self.temperature)

    @property
    def objectives(self) -> Sequence[Objective]:
        """One, for the group "model"."""
        return (Objective("model", self.loss),)

    def check(self, batch: Batch) -> None:
        """Raises InputError for a batch on the host without labels, or with one that is no class.

        The latter where the model says how many there are, by a field `num_classes`; then also for
        probabilities outside [0, 1] or, of classes that exclude each other, of another sum than 1
        (but for rounding). Also for a `mean` or `std` of another length than images have channels.
        """
        if "label" not in batch:
            raise InputError(f"Classification needs a field label; there are: {', '.join(batch)}")
        check_channels(batch, mean=self.mean, std=self.std)
        label = valid_rows(batch, "label")
        classes = getattr(self.model, "num_classes", 0)
        if label.ndim == 1:
            check_labels(label, classes)
        elif label.shape[1:] == (classes,):
            wrong = label[~((label >= -1e-3) & (label <= 1 + 1e-3))]
            if wrong.size:
                raise InputError(f"label is {wrong[0]}; one for each class must be in [0, 1]")
            total = label.sum(axis=1, dtype=float)
            if self.exclusive and (wrong := total[abs(total - 1) > 1e-2]).size:
                raise InputError(
                    f"label sums to {wrong[0]:.4g}; for classes that exclude each other it must "
                    "sum to 1: if an image can have several, set exclusive to False"
                )

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": parameters} and the model's other collections; also the teacher's.

        Raises InputError for a model whose output is not [b, classes], or a loss that is not [b].
        """
        params_rng, dropout_rng = jax.random.split(rng)
        rngs, image = {"params": params_rng, "dropout": dropout_rng}, self._input(batch)
        logits, variables = self.model.init_with_output(rngs, image, train=False)
        classes = getattr(self.model, "num_classes", logits.shape[-1])
        if logits.shape != (len(image), classes):
            raise InputError(
                f"the model gives {list(logits.shape)} for {len(image)} images; it must be logits "
                f"[{len(image)}, {classes}]"
            )
        found = check_call("loss_function", self.loss_function, logits, logits)
        if getattr(found, "shape", None) != (len(image),):
            raise InputError(
                f"loss_function gives {found}; it must be a number for each of {len(image)} images"
            )
        params = {"model": variables.pop("params")}
        if self.teacher is not None:
            # Of another key: one of the same kind would else be the student itself.
            own = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
            variables["teacher"] = self.teacher.init(own, image, train=False)
            params["teacher"] = variables["teacher"].pop("params")
        return params, variables

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The loss, mean over the valid examples; 0 when there is none."""
        valid = batch["valid"]
        dropout_rng, augment_rng, mix_rng = (jax.random.fold_in(rng, i) for i in range(3))
        mixed = None
        if self.augment is not None:
            with fitting("augment"):
                batch = {**batch, "image": self.augment(batch["image"], augment_rng)}
        if self.mix is not None:
            with fitting("mix"):
                mixed = self.mix(batch["image"], mix_rng, valid)
            batch = {**batch, "image": mixed.images}
        variables = {"params": params["model"], **_own(state.model_state)}
        rngs = {"dropout": dropout_rng}
        logits, model_state = train_pass(self.model, variables, self._input(batch), valid, rngs)
        target = _target(batch, logits.shape[-1])
        if mixed is not None:
            target = mixed.targets(target)
        losses = self.loss_function(logits, optax.smooth_labels(target, self.label_smoothing))
        metrics = self._metrics(losses, logits, target, valid)
        if self.teacher is not None:
            model_state["teacher"] = state.model_state["teacher"]
            variables = {"params": params["teacher"], **model_state["teacher"]}
            taught = self.teacher.apply(variables, self._input(batch), train=False)
            apart = distillation if self.exclusive else sigmoid_distillation
            distance = apart(logits, taught, temperature=self.temperature)
            metrics["distillation"] = mean(distance, valid)
            losses = (1 - self.teacher_weight) * losses + self.teacher_weight * distance
        value = jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        return value, (model_state, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns loss (without smoothing and teacher) and accuracy (of all labels alike)."""
        logits = self._logits(params, model_state, batch)
        target = _target(batch, logits.shape[-1])
        return self._metrics(self.loss_function(logits, target), logits, target, batch["valid"])

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns logits and probabilities, float32 [b, classes], and prediction.

        That is int32 [b], or bool [b, classes] of labels that do not exclude each other.
        """
        logits = self._logits(params, model_state, batch)
        probabilities = (jax.nn.softmax if self.exclusive else jax.nn.sigmoid)(logits)
        prediction = jnp.argmax(logits, axis=-1) if self.exclusive else logits > 0
        return {"logits": logits, "probabilities": probabilities, "prediction": prediction}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the 30 images with the highest loss, worst first, framed green or red.

        Green: named rightly; red: wrongly; invalid ones are black. Channels as `draw.in_colour`.
        """
        logits = self._logits(params, model_state, batch)
        valid = jnp.asarray(batch["valid"])
        target = _target(batch, logits.shape[-1])
        losses = jnp.where(valid, self.loss_function(logits, target), -jnp.inf)
        worst = jnp.argsort(-losses)[:30]
        right, valid = self._accuracy(logits, target)[worst] == 1, valid[worst]
        images = jnp.where(valid[:, None, None, None], jnp.asarray(batch["image"])[worst], 0.0)

        n, height, width, _ = images.shape
        images = draw.in_colour(images)
        color = jnp.where(right[:, None], jnp.array(GREEN), jnp.array(RED))
        color = jnp.where(valid[:, None], color, jnp.array(BLACK))[:, None, None, :]
        frame = max(1, min(height, width) // 16)
        framed = jnp.broadcast_to(color, (n, height + 2 * frame, width + 2 * frame, 3))
        framed = framed.at[:, frame:-frame, frame:-frame].set(jnp.clip(images, 0.0, 1.0))
        return {"worst": draw.grid(framed)}

    def _input(self, batch: Batch) -> jax.Array:
        """The normalized images; zeros where not valid, whatever (NaN, even) is there."""
        image = (batch["image"] - jnp.array(self.mean)) / jnp.array(self.std)
        return jnp.where(batch["valid"][:, None, None, None], image, 0.0)

    def _logits(self, params: Params, model_state: PyTree, batch: Batch) -> jax.Array:
        """Float32 [b, classes]: the mean over the image and its views."""
        variables = {"params": params["model"], **_own(model_state)}
        image = self._input(batch)
        images = [image, *(view(image) for view in (self.views or {}).values())]
        logits = [self.model.apply(variables, x, train=False).astype(jnp.float32) for x in images]
        return sum(logits) / len(logits)

    def _accuracy(self, logits: jax.Array, target: jax.Array) -> jax.Array:
        """The share of an image's labels that are right, [b]: 0 or 1 where there is one class."""
        if self.exclusive:
            return jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)
        return jnp.mean((logits > 0) == (target > 0.5), axis=-1)

    def _metrics(
        self, losses: jax.Array, logits: jax.Array, target: jax.Array, valid: jax.Array
    ) -> Metrics:
        accuracy = self._accuracy(logits, target)
        return {"loss": mean(losses, valid), "accuracy": mean(accuracy, valid)}


def _own(model_state: PyTree) -> dict[str, PyTree]:
    """The collections of the model itself."""
    return {name: value for name, value in model_state.items() if name != "teacher"}


def _target(batch: Batch, classes: int) -> jax.Array:
    """What is to be learnt, [b, classes]: one-hot, or what is given; zeros where not valid.

    NaN where the label is no class: a row of zeros would be learnt as nothing, and nobody would
    know. Raises InputError for labels of another shape, which would be repeated for each class.
    """
    label, valid = batch["label"], batch["valid"][:, None]
    if label.ndim != 1 and label.shape[1:] != (classes,):
        raise InputError(
            f"label is {list(label.shape)}; for {classes} classes it must be [{len(label)}], a "
            f"number for each image, or [{len(label)}, {classes}], a probability for each class"
        )
    if label.ndim == 1:
        # In 8 bits the number of classes would be another one.
        label = label.astype(jnp.promote_types(label.dtype, jnp.int32))
        is_class = (label >= 0) & (label < classes) & (label == jnp.floor(label))
        label = jnp.where(is_class[:, None], jax.nn.one_hot(label, classes), jnp.nan)
    return jnp.where(valid, label, 0.0)
