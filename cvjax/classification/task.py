"""Image classification: a softmax over classes."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cvjax import draw
from cvjax.data.transforms.mixing import Mixed
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean

GREEN, RED, BLACK = (0.0, 0.7, 0.2), (0.9, 0.1, 0.1), (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Classification:
    """Trains `model` to name the class of an image.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "label": int32 [b], "valid": bool [b]}. A
    label may also be soft: float32 [b, classes], rows of probabilities; the right class is then the
    most probable one.

    Attributes:
      model: any module with `__call__(x, *, train=False) -> logits [b, classes]`. It may draw from
        the stream "dropout" and keep collections of its own (`batch_stats`). If its call also
        takes `valid` it is told which rows are real; an invalid row is an image of zeros.
      label_smoothing: probability taken from the label and spread evenly over all classes
        (C. Szegedy et al., https://arxiv.org/abs/1512.00567, section 7), in training only.
      augment: changes the images on the device, in training only: `augment(images, rng)`, such as
        those of `data.transforms.batched`.
      mix: mixes images and targets, in training only: `mix(images, rng, valid)`, such as those of
        `data.transforms.mixing`. The accuracy of training is then that of naming the class with
        the larger share.
      mean, std: the model sees (image - mean) / std: numbers, or one for each channel. The default
        maps [0, 1] to [-1, 1].
    """

    model: nn.Module
    label_smoothing: float = 0.0
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    mix: Callable[[jax.Array, jax.Array, jax.Array], Mixed] | None = None
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    @property
    def objectives(self) -> Sequence[Objective]:
        """One: the cross-entropy, for the group "model"."""
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
        """The cross-entropy, mean over the valid examples; 0 when there is none."""
        valid = batch["valid"]
        any_valid = jnp.any(valid)
        dropout_rng, augment_rng, mix_rng = (jax.random.fold_in(rng, i) for i in range(3))
        mixed = None
        if self.augment is not None:
            batch = {**batch, "image": self.augment(batch["image"], augment_rng)}
        if self.mix is not None:
            mixed = self.mix(batch["image"], mix_rng, valid)
            batch = {**batch, "image": mixed.images}
        takes_valid = "valid" in inspect.signature(self.model.__call__).parameters
        logits, model_state = self.model.apply(
            {"params": params["model"], **state.model_state},
            self._input(batch),
            train=True,
            rngs={"dropout": dropout_rng},
            mutable=list(state.model_state),
            # The statistics of no rows at all would be NaN.
            **({"valid": valid | ~any_valid} if takes_valid else {}),
        )
        model_state = jax.tree.map(
            lambda new, old: jnp.where(any_valid, new, old), dict(model_state), state.model_state
        )
        target = _target(batch, logits.shape[-1])
        if mixed is not None:
            target = mixed.targets(target)
        losses = _cross_entropy(logits, optax.smooth_labels(target, self.label_smoothing))
        value = jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        return value, (model_state, _metrics(losses, logits, target, valid))

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns loss (cross-entropy without smoothing) and accuracy."""
        logits = self._logits(params, model_state, batch)
        target = _target(batch, logits.shape[-1])
        return _metrics(_cross_entropy(logits, target), logits, target, batch["valid"])

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns logits and probabilities, float32 [b, classes], and prediction, int32 [b]."""
        logits = self._logits(params, model_state, batch)
        return {
            "logits": logits,
            "probabilities": jax.nn.softmax(logits),
            "prediction": jnp.argmax(logits, axis=-1),
        }

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the 30 images with the highest loss, worst first, framed green or red.

        Green: named rightly; red: wrongly; invalid ones are black. Images have 1 or 3 channels.
        """
        logits = self._logits(params, model_state, batch)
        valid = jnp.asarray(batch["valid"])
        target = _target(batch, logits.shape[-1])
        losses = jnp.where(valid, _cross_entropy(logits, target), -jnp.inf)
        worst = jnp.argsort(-losses)[:30]
        right, valid = _is_right(logits, target)[worst], valid[worst]
        images = jnp.where(valid[:, None, None, None], jnp.asarray(batch["image"])[worst], 0.0)

        n, height, width, _ = images.shape
        images = jnp.broadcast_to(images, (n, height, width, 3))
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
        variables = {"params": params["model"], **model_state}
        return self.model.apply(variables, self._input(batch), train=False).astype(jnp.float32)


def _target(batch: Batch, classes: int) -> jax.Array:
    """Probabilities [b, classes] to be learnt: one-hot, or those given; zeros where not valid.

    NaN where the label is no class: a row of zeros would be learnt as nothing, and nobody would
    know.
    """
    label, valid = batch["label"], batch["valid"][:, None]
    if label.ndim == 1:
        is_class = (label >= 0) & (label < classes)
        label = jnp.where(is_class[:, None], jax.nn.one_hot(label, classes), jnp.nan)
    return jnp.where(valid, label, 0.0)


def _cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy, float32 [b], of logits with the target, both [b, classes]."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), target)


def _is_right(logits: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)


def _metrics(losses: jax.Array, logits: jax.Array, target: jax.Array, valid: jax.Array) -> Metrics:
    return {
        "loss": mean(losses, valid),
        "accuracy": mean(_is_right(logits, target), valid),
    }
