"""Image classification: a softmax over classes."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cvjax import draw
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean

GREEN, RED, BLACK = (0.0, 0.7, 0.2), (0.9, 0.1, 0.1), (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Classification:
    """Trains `model` to name the class of an image.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "label": int32 [b], "valid": bool [b]}.

    Attributes:
      model: any module with `__call__(x, *, train=False) -> logits [b, classes]`. It may draw from
        the stream "dropout" and keep collections of its own (`batch_stats`). If its call also
        takes `valid` it is told which rows are real; an invalid row is an image of zeros.
      label_smoothing: probability taken from the label and spread evenly over all classes
        (C. Szegedy et al., https://arxiv.org/abs/1512.00567, section 7), in training only.
      mean, std: the model sees (image - mean) / std: numbers, or one for each channel. The default
        maps [0, 1] to [-1, 1].
    """

    model: nn.Module
    label_smoothing: float = 0.0
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
        takes_valid = "valid" in inspect.signature(self.model.__call__).parameters
        logits, model_state = self.model.apply(
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
        losses = _cross_entropy(logits, batch, self.label_smoothing)
        value = jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        return value, (model_state, _metrics(losses, logits, batch))

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns loss (cross-entropy without smoothing) and accuracy."""
        logits = self._logits(params, model_state, batch)
        return _metrics(_cross_entropy(logits, batch), logits, batch)

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
        losses = jnp.where(valid, _cross_entropy(logits, batch), -jnp.inf)
        worst = jnp.argsort(-losses)[:30]
        right, valid = _is_right(logits, batch)[worst], valid[worst]
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


def _cross_entropy(logits: jax.Array, batch: Batch, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy, float32 [b], of logits [b, classes] with the smoothed labels."""
    label, classes = batch["label"], logits.shape[-1]
    target = optax.smooth_labels(jax.nn.one_hot(label, classes), label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), target)
    # A label that is no class has a target of zeros: its loss would be 0, and nobody would know.
    return jnp.where((label >= 0) & (label < classes), losses, jnp.nan)


def _is_right(logits: jax.Array, batch: Batch) -> jax.Array:
    return jnp.argmax(logits, axis=-1) == batch["label"]


def _metrics(losses: jax.Array, logits: jax.Array, batch: Batch) -> Metrics:
    return {
        "loss": mean(losses, batch["valid"]),
        "accuracy": mean(_is_right(logits, batch), batch["valid"]),
    }
