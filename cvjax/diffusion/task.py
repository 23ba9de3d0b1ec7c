"""Diffusion: a network learns to take noise away, and noise becomes images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax import draw
from cvjax.diffusion.process import FlowMatching, Process, combine, perturb
from cvjax.diffusion.samplers import dpm_solver_2m, example_keys
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean


@dataclass(frozen=True)
class Diffusion:
    """Trains `network` to predict, from a noisy image, its time and its class, what `process` asks.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "label": int32 [b], "valid": bool [b]}; the
    process sees images in [-1, 1]. Samples are clipped to [0, 1].

    Attributes:
      network: any module with `__call__(x [b, h, w, c], t [b], label [b]) -> [b, h, w, c]`; the
        label `num_classes` means that no class is given.
      process: what is added to images, what is predicted, and at which times it is learned.
      num_classes: 0 ignores the labels.
      image_shape: (height, width, channels).
      class_dropout: probability that an example is shown without its class in training, so that
        guidance has an unconditional prediction to leave from.
      guidance: weight w of classifier-free guidance, uncond + w (cond - uncond); 1 is none
        (J. Ho, T. Salimans, https://arxiv.org/abs/2207.12598, equation 6, where it is 1 + w).
      sampler: one of `cvjax.diffusion.samplers`.
      sample_steps: of the sampler.
    """

    network: nn.Module
    process: Process = FlowMatching()
    num_classes: int = 10
    image_shape: tuple[int, int, int] = (28, 28, 1)
    class_dropout: float = 0.1
    guidance: float = 1.0
    sampler: Callable[..., jax.Array] = dpm_solver_2m
    sample_steps: int = 50

    def __post_init__(self):
        if not 0 <= self.class_dropout < 1:
            raise InputError(f"class_dropout is {self.class_dropout}; it must be in [0, 1)")
        if self.sample_steps < 1:
            raise InputError(f"sample_steps is {self.sample_steps}; it must be at least 1")
        known = getattr(self.network, "num_classes", self.num_classes)
        if known != self.num_classes:
            raise InputError(
                f"num_classes is {self.num_classes}, but that of the network is {known}; they "
                "must be equal"
            )
        self._check_guidance(self.guidance)

    @property
    def objectives(self) -> Sequence[Objective]:
        """One: the squared error of the prediction, for the group "network"."""
        return (Objective("network", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"network": parameters} and no other state."""
        image, label = self._clean(batch)
        variables = self.network.init(rng, image, jnp.zeros(len(image)), label)
        return {"network": variables["params"]}, {}

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The mean over the valid examples of their squared errors; 0 when there is none.

        The times of a batch are stratified: one in each of b equally likely intervals, with one
        random offset for all (D. Kingma et al., https://arxiv.org/abs/2107.00630, appendix I.1).
        """
        image, label = self._clean(batch)
        offset_rng, noise_rng, dropout_rng = jax.random.split(rng, 3)
        dropped = jax.random.bernoulli(dropout_rng, self.class_dropout, label.shape)
        label = jnp.where(dropped, self.num_classes, label)
        offset = jax.random.uniform(offset_rng)
        errors = self._errors(params, image, label, offset, noise_rng)
        losses = mean(errors, batch["valid"])
        return losses.total / jnp.maximum(losses.count, 1), (state.model_state, {"loss": losses})

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the loss, at the middle of each interval of time and with every class shown."""
        image, label = self._clean(batch)
        return {"loss": mean(self._errors(params, image, label, 0.5, rng), batch["valid"])}

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns one sample, float32 [b, h, w, c] in [0, 1], for each label, int32 [b]."""
        _, label = self._clean(batch)
        return {"sample": self.sample(params, label, rng), "label": label}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns 10 rows of samples, a column for each class, of the same noise every time."""
        columns = self.num_classes or 10
        label = jnp.tile(jnp.arange(columns), 10)
        return {"samples": draw.grid(self.sample(params, label, jax.random.key(0)), columns)}

    def sample(
        self,
        params: Params,
        labels: jax.Array,
        rng: jax.Array,
        guidance: float | None = None,
        steps: int | None = None,
        first: int = 0,
    ) -> jax.Array:
        """Returns an image of each class in `labels`, float32 [b, h, w, c] in [0, 1]; jit it.

        Args:
          params: {"network": parameters}.
          labels: int32 [b]; `num_classes` for an image of any class.
          rng: the image at row i comes from `fold_in(rng, first + i)`, so that a set of images may
            be made in batches of any size.
          guidance, steps: numbers in place of `guidance` and `sample_steps`.
          first: the place of the first row in the whole set.
        """
        guidance = self.guidance if guidance is None else guidance
        self._check_guidance(guidance)

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            if guidance == 1:
                return self._predict(params, x, t, labels)
            # One pass over a doubled batch. All parameterizations are affine in each other, so that
            # it makes no difference which of them is extrapolated.
            null = jnp.full_like(labels, self.num_classes)
            twice = (jnp.concatenate([a, b]) for a, b in ((x, x), (t, t), (labels, null)))
            conditional, unconditional = jnp.split(self._predict(params, *twice), 2)
            return unconditional + guidance * (conditional - unconditional)

        labels = labels if self.num_classes else jnp.zeros_like(labels)
        steps = self.sample_steps if steps is None else steps
        keys = example_keys(rng, len(labels), first)
        x = self.sampler(denoise, self.process, keys, tuple(self.image_shape), steps)
        return jnp.clip((x + 1) / 2, 0.0, 1.0)

    def _predict(self, params: Params, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        return self.network.apply({"params": params["network"]}, x, t, label)

    def _errors(
        self,
        params: Params,
        image: jax.Array,
        label: jax.Array,
        offset: jax.Array | float,
        rng: jax.Array,
    ) -> jax.Array:
        """Squared errors, mean over pixels [b], at stratified times."""
        process, batch = self.process, len(image)
        tiny = 1e-6  # 0 and 1 may be quantiles of infinity
        t = process.times(jnp.clip((jnp.arange(batch) + offset) / batch, tiny, 1 - tiny))
        eps = jax.random.normal(rng, image.shape)
        prediction = self._predict(params, perturb(process, image, eps, t), t, label)
        target = combine(process, process.prediction, image, eps, t)
        return jnp.mean((prediction - target) ** 2, axis=range(1, image.ndim))

    def _clean(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Images in [-1, 1] and labels; zeros and the null class where not valid."""
        image, valid = batch["image"], batch["valid"]
        if image.shape[1:] != tuple(self.image_shape):
            raise InputError(
                f"image_shape is {tuple(self.image_shape)}, but the images are {image.shape[1:]}"
            )
        image = jnp.where(valid[:, None, None, None], 2 * image - 1, 0.0)
        # Without classes a batch needs no labels.
        label = jnp.where(valid, batch["label"] if self.num_classes else 0, self.num_classes)
        return image, label.astype(jnp.int32)

    def _check_guidance(self, guidance: float) -> None:
        if guidance != 1 and not (self.class_dropout and self.num_classes):
            raise InputError(
                f"guidance is {guidance}, but the network has not learned to do without the class; "
                "set class_dropout above 0 (0.1, say) and train, or set guidance to 1"
            )
