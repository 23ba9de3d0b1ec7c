"""Diffusion: a network learns to take noise away, and noise becomes images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cvjax import draw
from cvjax.checks import (
    check_at_least,
    check_between,
    check_call,
    check_fractions,
    check_labels,
    check_unit_images,
    fitting,
    valid_rows,
)
from cvjax.diffusion.guidance import classifier_free
from cvjax.diffusion.losses import Weighting, of_prediction
from cvjax.diffusion.process import FlowMatching, Process, check_times, combine, perturb
from cvjax.diffusion.samplers import Denoise, dpm_solver_2m, evaluations, example_keys
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, first_row, mean


@dataclass(frozen=True)
class Diffusion:
    """Trains `network` to predict, from a noisy image, its time and its class, what `process` asks.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "label": int32 [b], "valid": bool [b]}; the
    process sees images in [-1, 1]. `check` refuses others. Samples are clipped to [0, 1].

    Attributes:
      network: any module with `__call__(x [b, h, w, c], t [b], label [b]) -> [b, h, w, c]`; the
        label `num_classes` means that no class is given.
      process: what is added to images, what is predicted, and at which times it is learned.
      weighting: of the squared error, one of `cvjax.diffusion.losses`; None weighs that of what is
        predicted equally at all times.
      coupling: `coupling(image, noise, group) -> noise` pairs the noise of a training batch with
        its images (`cvjax.diffusion.coupling`); None leaves it to chance. `group`, int32 [b, ...],
        is what an image is shown with (its label or caption), and whether it is valid.
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
    weighting: Weighting | None = None
    coupling: Callable[..., jax.Array] | None = None
    num_classes: int = 10
    image_shape: tuple[int, int, int] = (28, 28, 1)
    class_dropout: float = 0.1
    guidance: float = 1.0
    sampler: Callable[..., jax.Array] = dpm_solver_2m
    sample_steps: int = 50

    def __post_init__(self):
        check_fractions(self, "class_dropout")
        if self.class_dropout == 1:
            raise InputError(f"class_dropout is {self.class_dropout}; it must be in [0, 1)")
        check_at_least(self, num_classes=0, sample_steps=1)
        inside = getattr(self.network, "network", self.network)  # of a preconditioned one
        known = getattr(inside, "num_classes", self.num_classes)
        if known != self.num_classes:
            raise InputError(
                f"num_classes is {self.num_classes}, but that of the network is {known}; they "
                "must be equal"
            )
        self._check_guidance(self.guidance)
        self._check_process()

    @property
    def objectives(self) -> Sequence[Objective]:
        """One: the squared error of the prediction, for the group "network"."""
        return (Objective("network", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"network": parameters} and no other state.

        Raises InputError if the network does not give images of the right shape. And if the sampler
        does not fit the process, or another function is none of its kind: else a run would tell
        that at its first sample. An `adaptive` one that needs more steps does.
        """
        image, condition = self._clean(batch)
        inputs = self._inputs(image, jnp.zeros(len(image)), condition)
        with fitting("network"):
            output, variables = self.network.init_with_output(rng, *inputs)
        expected = (*image.shape[:-1], self._channels)
        if output.shape != expected:
            raise InputError(
                f"the network gives {list(output.shape)}; of images {list(image.shape)} it must "
                f"give {list(expected)}: set its out_channels"
            )
        self._check_functions()
        return {"network": variables["params"]}, {}

    def check(self, batch: Batch) -> None:
        """Raises InputError unless a batch has images in [0, 1] and labels of classes."""
        check_unit_images(batch)
        if self.num_classes:
            if "label" not in batch:
                raise InputError(
                    f"num_classes is {self.num_classes}, but the data have no field label (there "
                    f"are: {', '.join(batch)}); give such, or set num_classes to 0"
                )
            check_labels(valid_rows(batch, "label"), self.num_classes)

    def _check_functions(self) -> None:
        with jax.ensure_compile_time_eval():
            check_times(self.process)
        shape, steps, ones = tuple(self.image_shape), self.sample_steps, jnp.ones(1)
        if self.weighting is not None:
            check_call("weighting", partial(of_prediction, self.weighting, self.process), ones)
        if self.coupling is not None:
            image = jnp.zeros((1, *shape))
            check_call("coupling", self.coupling, image, image, jnp.zeros((1, 2), jnp.int32))
        sample = lambda keys: self.sampler(self._blank, self.process, keys, shape, steps)  # noqa: E731
        check_call("sampler", sample, example_keys(jax.random.key(0), 1))

    def summary(self) -> str:
        """Says how many evaluations of the network an image takes, of a sampler that fits."""
        shape = tuple(self.image_shape)
        try:
            count = evaluations(
                self.sampler, self.process, self.sample_steps, shape=shape, answer=self._blank
            )
        except InputError:  # it has steps of its own
            count = None
        is_guided = self.guidance != 1
        told = "a varying number of" if count is None else count * (1 + is_guided)
        name = getattr(getattr(self.sampler, "func", self.sampler), "__name__", self.sampler)
        return (
            f"an image takes {told} evaluations of the network: {name}, "
            f"{'at most ' if count is None else ''}{self.sample_steps} steps"
            f"{f', twice for guidance {self.guidance:g}' if is_guided else ''}"
        )

    def _blank(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """What the network says, as far as its shape."""
        return jnp.zeros((*x.shape[:-1], self._sampled_channels))

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The mean over the valid examples of their squared errors; 0 when there is none.

        The times of a batch are stratified: one in each of as many equally likely intervals as
        there are valid examples, with one random offset for all (D. Kingma et al.,
        https://arxiv.org/abs/2107.00630, appendix I.1).
        """
        image, condition = self._clean(batch)
        offset_rng, noise_rng, dropout_rng = jax.random.split(rng, 3)
        eps = jax.random.normal(noise_rng, image.shape)
        if self.coupling is not None:
            # Rows that are not valid are a group of their own: they take no noise from others.
            shown = jnp.column_stack([condition, batch["valid"]])
            eps = self.coupling(image, eps, shown)
        condition = self._dropped(condition, dropout_rng)
        t = self._times(batch["valid"], jax.random.uniform(offset_rng))
        errors = self._errors(params, image, condition, t, eps)
        losses = mean(errors, batch["valid"])
        return losses.total / jnp.maximum(losses.count, 1), (state.model_state, {"loss": losses})

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the loss, at the middle of each interval of time and with every class shown."""
        image, condition = self._clean(batch)
        eps = jax.random.normal(rng, image.shape)
        errors = self._errors(params, image, condition, self._times(batch["valid"], 0.5), eps)
        return {"loss": mean(errors, batch["valid"])}

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns a sample, float32 [b, h, w, c] in [0, 1], for each condition, and the labels.

        These are for evaluators; where images are made without a condition, none are told.
        """
        _, condition = self._clean(batch)
        told = {"label": batch["label"]} if self._is_conditional and "label" in batch else {}
        return {"sample": self.sample(params, condition, rng, first=first_row(batch)), **told}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns 10 rows of samples, of the same noise every time.

        A column for each of the first 10 classes: of 1,000 they would be a set of their own.
        """
        columns = min(self.num_classes or 10, 10)
        label = jnp.tile(jnp.arange(columns), 10)
        return {"samples": draw.tiled(self.sample(params, label, jax.random.key(0)), columns)}

    def sample(
        self,
        params: Params,
        condition: PyTree,
        rng: jax.Array,
        guidance: float | None = None,
        steps: int | None = None,
        first: int = 0,
    ) -> jax.Array:
        """Returns an image for each row of the condition, float32 [b, h, w, c] in [0, 1]; jit it.

        Args:
          params: {"network": parameters}.
          condition: labels, int32 [b]; `num_classes` for an image of any class.
          rng: the image at row i comes from `fold_in(rng, first + i)`, so that a set of images may
            be made in batches of any size.
          guidance, steps: numbers in place of `guidance` and `sample_steps`.
          first: the place of the first row in the whole set.

        Raises InputError for settings that do not fit and, outside of jit, for no such label.
        """
        condition = self._checked(condition)
        steps = self.sample_steps if steps is None else steps
        keys = example_keys(rng, len(jax.tree.leaves(condition)[0]), first)
        denoise = self.denoiser(params, condition, guidance)
        x = self.sampler(denoise, self.process, keys, tuple(self.image_shape), steps)
        return jnp.clip((x + 1) / 2, 0.0, 1.0)

    def denoiser(self, params: Params, condition: PyTree, guidance: float | None = None) -> Denoise:
        """Returns the guided network as samplers and the like want it: (x, t [b]) -> prediction."""
        guidance = self.guidance if guidance is None else guidance
        self._check_guidance(guidance)
        # Without classes all labels are the null one.
        condition = condition if self._is_conditional else self._null(condition)

        def predict(x: jax.Array, t: jax.Array, condition: PyTree) -> jax.Array:
            return self._predict(params, x, t, condition)

        return classifier_free(predict, condition, self._null(condition), guidance)

    def _predict(self, params: Params, x: jax.Array, t: jax.Array, condition: PyTree) -> jax.Array:
        return self.network.apply({"params": params["network"]}, *self._inputs(x, t, condition))

    def _errors(
        self,
        params: Params,
        image: jax.Array,
        condition: PyTree,
        t: jax.Array,
        eps: jax.Array,
    ) -> jax.Array:
        """Weighted squared errors at times t [b], mean over pixels, [b]."""
        prediction = self._predict(params, perturb(self.process, image, eps, t), t, condition)
        return self._errors_of(prediction, image, t, eps)

    def _errors_of(
        self, prediction: jax.Array, image: jax.Array, t: jax.Array, eps: jax.Array
    ) -> jax.Array:
        """The same of what was predicted."""
        target = combine(self.process, self.process.prediction, image, eps, t)
        errors = jnp.mean((prediction - target) ** 2, axis=range(1, image.ndim))
        if self.weighting is None:
            return errors
        return of_prediction(self.weighting, self.process, t) * errors

    def _times(self, valid: jax.Array, offset: jax.Array | float) -> jax.Array:
        """Stratified over the valid rows: were it over all, those of a padded batch, which come
        first, would see early times alone."""
        share = (jnp.cumsum(valid) - 1 + offset) / jnp.maximum(jnp.sum(valid), 1)
        tiny = 1e-6  # 0 and 1 may be quantiles of infinity
        return self.process.times(jnp.clip(share, tiny, 1 - tiny))

    # What a condition is; other tasks have others. Here it is the label.

    def _clean(self, batch: Batch) -> tuple[jax.Array, PyTree]:
        """Images in [-1, 1] and their conditions; zeros and the null condition where not valid."""
        image, valid = batch["image"], batch["valid"]
        if image.shape[1:] != tuple(self.image_shape):
            raise InputError(
                f"image_shape is {tuple(self.image_shape)}, but the images are {image.shape[1:]}"
            )
        image = jnp.where(valid[:, None, None, None], 2 * image - 1, 0.0)
        # Without classes a batch needs no labels.
        label = jnp.where(valid, batch["label"] if self.num_classes else 0, self.num_classes)
        return image, label.astype(jnp.int32)

    def _checked(self, condition: PyTree) -> PyTree:
        """The condition that `sample` is given, as arrays; InputError for one that is none."""
        if not self.num_classes:
            return condition
        label = jnp.asarray(condition)
        if label.ndim != 1:
            raise InputError(f"labels are {list(label.shape)}; they must be [b]")
        if not isinstance(label, jax.core.Tracer):
            check_labels(np.asarray(label), self.num_classes, ignored=self.num_classes)
        return label

    def _null(self, condition: PyTree) -> PyTree:
        """The condition that says nothing."""
        return jnp.full_like(condition, self.num_classes)

    def _dropped(self, condition: PyTree, rng: jax.Array) -> PyTree:
        """The condition with some rows replaced by null ones."""
        batch = len(jax.tree.leaves(condition)[0])
        drop = jax.random.bernoulli(rng, self.class_dropout, (batch,))
        return jax.tree.map(
            lambda null, said: jnp.where(drop.reshape(batch, *[1] * (said.ndim - 1)), null, said),
            self._null(condition),
            condition,
        )

    def _inputs(self, x: jax.Array, t: jax.Array, condition: PyTree) -> tuple[PyTree, ...]:
        """What the network is called with."""
        return x, t, condition

    @property
    def _channels(self) -> int:
        """Of what the network gives."""
        return self.image_shape[-1]

    @property
    def _sampled_channels(self) -> int:
        """Of what a sampler is given."""
        return self.image_shape[-1]

    @property
    def _is_conditional(self) -> bool:
        return self.num_classes > 0

    def _check_guidance(self, guidance: float) -> None:
        if isinstance(guidance, jax.core.Tracer):
            raise InputError("guidance is traced; it must be a number: 1 is another program")
        check_between(-math.inf, math.inf, guidance=guidance)
        if not np.isfinite(guidance):
            raise InputError(f"guidance is {guidance}; it must be finite")
        if guidance != 1 and not self._is_conditional:
            raise InputError(
                f"guidance is {guidance}, but num_classes is 0: without classes it must be 1"
            )
        if guidance != 1 and not self.class_dropout:
            raise InputError(
                f"guidance is {guidance}, but the network has not learned to do without the class; "
                "set class_dropout above 0 (0.1, say) and train, or set guidance to 1"
            )

    def _check_process(self) -> None:
        """A preconditioned network knows the process too."""
        if not isinstance(self.process, Process):
            kind = getattr(self.process, "__name__", type(self.process).__name__)
            raise InputError(f"process is {kind}; it must be one of cvjax.diffusion.process")
        other, t = getattr(self.network, "process", self.process), jnp.linspace(0.0, 1.0, 5)
        is_same = other.prediction == self.process.prediction and all(
            np.allclose(getattr(other, name)(t), getattr(self.process, name)(t))
            for name in ("alpha", "sigma")
        )
        if not is_same:
            raise InputError(
                f"process is {self.process}, but that of the network is {other}; they must be equal"
            )
