"""Training a network to undo a diffusion process, and sampling from it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from cvjax.diffusion import samplers
from cvjax.diffusion.process import (
    PREDICTIONS,
    FlowMatching,
    Prediction,
    Process,
    Times,
    decode,
    diffuse,
    encode,
    logit_normal_times,
)
from cvjax.errors import InputError, nearest
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean


@dataclass(frozen=True)
class Diffusion:
    """Class-conditional diffusion; a batch is `image` float32 [b, h, w, c] in [0, 1], `label`.

    Inside, images are in [-1, 1]; samples come back clipped to [0, 1]. The loss is the squared
    error of what the network predicts, so its weighting over time is that of the kind of
    prediction and of the training times. There is one group of parameters, `network`.

    Attributes:
      network: maps (x, t [b] in [0, 1], label int [b], train=) to an array like x.
      num_classes: class `num_classes` means any.
      process: alpha(t) and sigma(t); see `cvjax.diffusion.process`.
      prediction: what the network predicts: "eps", "x0", "v", "velocity" or "score".
      times: maps even quantiles in (0, 1) to training times.
      class_dropout: share of the examples whose class is hidden in training.
      guidance: weight of classifier-free guidance; 1 is none.
      sampler: from `cvjax.diffusion.samplers`.
      sample_steps: of the sampler.
    """

    network: nn.Module
    num_classes: int
    process: Process = FlowMatching()
    prediction: str = "velocity"
    times: Times = logit_normal_times
    class_dropout: float = 0.1
    guidance: float = 2.0
    sampler: Callable[..., jax.Array] = samplers.heun
    sample_steps: int = 25

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise InputError(
                f"task.prediction is {self.prediction!r}{nearest(self.prediction, PREDICTIONS)}"
            )
        if not 0 <= self.class_dropout <= 1:
            raise InputError(f"task.class_dropout is {self.class_dropout}; it must be in [0, 1]")
        if self.guidance != 1 and self.class_dropout == 0:
            raise InputError(
                f"task.guidance is {self.guidance}, but without class_dropout the network never "
                "learns the class 'any': set task.class_dropout=0.1, or task.guidance=1"
            )
        if self.sample_steps < 1:
            raise InputError(f"task.sample_steps is {self.sample_steps}; it must be at least 1")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """One: the denoising loss."""
        return (Objective("network", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """The network's parameters; no other state."""
        x = batch["image"]
        t, label = jnp.zeros(x.shape[0]), jnp.zeros(x.shape[0], jnp.int32)
        return {"network": self.network.init(rng, x, t, label)["params"]}, {}

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The mean over valid examples of the squared error, averaged over pixels."""
        time_key, class_key, noise_key, dropout_key = jax.random.split(rng, 4)
        count = batch["label"].shape[0]
        # One uniform number and even spacing from it: a lower variance than independent times
        # (Kingma et al. 2021, appendix I.1).
        quantiles = (jax.random.uniform(time_key) + jnp.arange(count) / count) % 1.0
        hidden = jax.random.bernoulli(class_key, self.class_dropout, (count,))
        label = jnp.where(hidden, self.num_classes, batch["label"])
        errors = self._errors(params, batch, label, quantiles, noise_key, dropout_key)
        loss = mean(errors, batch["valid"])
        return loss.total / jnp.maximum(loss.count, 1), (state.model_state, {"loss": loss})

    def evaluate(self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array) -> Metrics:
        """The loss at evenly spaced times, the class shown."""
        count = batch["label"].shape[0]
        order = jax.random.permutation(rng, count)
        quantiles = (order + 0.5) / count
        return {"loss": mean(self._errors(params, batch, batch["label"], quantiles, rng), batch["valid"])}

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """One `sample` [b, h, w, c] in [0, 1] for each `label` of the batch."""
        label = batch["label"]
        sample = self.sample(params, rng, label, batch["image"].shape[1:])
        return {"sample": sample, "label": label}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """`samples`: a grid with a column for each class and ten rows, always of the same noise."""
        rows, columns, shape = 10, self.num_classes, batch["image"].shape[1:]
        label = jnp.tile(jnp.arange(columns), rows)
        images = self.sample(params, jax.random.key(0), label, shape)
        images = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
        height, width, channels = images.shape[1:]
        grid = images.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
        return {"samples": grid.reshape(rows * height, columns * width, channels)}

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        label: jax.Array,
        shape: tuple[int, int, int],
        *,
        guidance: float | None = None,
        first: int = 0,
    ) -> jax.Array:
        """Images [b, *shape] in [0, 1] of the classes `label` int [b].

        Image i depends on the key, on its number `first + i` and on its class alone, so that a
        large set may be made in batches of any size.
        """
        keys = jax.vmap(lambda number: jax.random.fold_in(rng, number))(
            first + jnp.arange(label.shape[0])
        )
        output = samplers.guided(
            lambda x, t, label: self.network.apply({"params": params["network"]}, x, t, label),
            label,
            self.num_classes,
            self.guidance if guidance is None else guidance,
        )

        def predict(x: jax.Array, t: jax.Array) -> Prediction:
            return decode(self.process, self.prediction, output(x, t), x, t)

        x = self.process.sigma(jnp.ones(())) * samplers.noise(keys, shape)
        x = self.sampler(predict, self.process, x, keys, steps=self.sample_steps)
        return jnp.clip(0.5 * (x + 1.0), 0.0, 1.0)

    def _errors(
        self,
        params: Params,
        batch: Batch,
        label: jax.Array,
        quantiles: jax.Array,
        noise_key: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The squared error of each example, [b]."""
        valid = batch["valid"]
        # An image that is not valid may hold anything; NaN times zero would still be NaN.
        image = jnp.where(valid.reshape(-1, 1, 1, 1), batch["image"], 0.0)
        x0 = 2.0 * image - 1.0
        eps = jax.random.normal(noise_key, x0.shape)
        t = self.times(jnp.clip(quantiles, 1e-4, 1 - 1e-4))
        x = diffuse(self.process, x0, eps, t)
        target = encode(self.process, self.prediction, x0, eps, t)
        rngs = {"dropout": dropout_key} if dropout_key is not None else {}
        output = self.network.apply(
            {"params": params["network"]}, x, t, jnp.where(valid, label, 0),
            train=dropout_key is not None, rngs=rngs,
        )  # fmt: skip
        return jnp.mean((output - target) ** 2, axis=(1, 2, 3))
