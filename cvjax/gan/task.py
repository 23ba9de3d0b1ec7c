"""Generative adversarial networks: two objectives, taken in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cvjax import draw
from cvjax.checks import check_at_least, check_labels, check_unit_images, valid_rows
from cvjax.errors import InputError
from cvjax.gan.losses import Loss, NonSaturating, gradient_penalty, r1_penalty
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, example_keys, first_row, mean

KEYS = ("image", "label", "valid")


@dataclass(frozen=True)
class GAN:
    """Trains `generator` against `discriminator`, `critic_steps` steps to one.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "label": int32 [b], "valid": bool [b]}.
    Each objective draws as many images as its share of the batch has rows (see `critic_steps`), of
    classes chosen uniformly.

    Attributes:
      generator: `__call__(z [b, latents], label [b], train=) -> [b, h, w, c]` in [0, 1].
      discriminator: `__call__(image, label [b], train=) -> logit [b]`, or [b, ...] with a logit for
        each of several patches; with an auxiliary head a pair with the logits of the classes.
      latents: the dimension of z, standard normal.
      num_classes: 0 ignores the labels.
      loss: one of `cvjax.gan.losses`.
      critic_steps: steps of the discriminator for each step of the generator. Each has rows of its
        own, every `critic_steps`-th of the batch.
      auxiliary: the weight of the cross-entropy of an auxiliary head, which both players pay
        (A. Odena et al., https://arxiv.org/abs/1610.09585).
      gradient_penalty: the weight of (|grad D| - 1)^2 between real and generated images, which D
        is shown with the class of the real one.
      r1: gamma; gamma / 2 |grad D|^2 at real images is added.
      augment: `(image, rng) -> image`, what the discriminator sees; such as
        `cvjax.gan.augment.diff_augment`.
      statistics_batch: how many images the BatchNorm statistics of `sample` are taken of.
    """

    generator: nn.Module
    discriminator: nn.Module
    latents: int = 64
    num_classes: int = 10
    loss: Loss = NonSaturating()
    critic_steps: int = 1
    auxiliary: float = 0.0
    gradient_penalty: float = 0.0
    r1: float = 0.0
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    statistics_batch: int = 500

    def __post_init__(self):
        check_at_least(
            self, latents=1, num_classes=0, critic_steps=1, auxiliary=0, gradient_penalty=0, r1=0,
            statistics_batch=1,
        )  # fmt: skip
        for name in ("generator", "discriminator"):
            known = getattr(getattr(self, name), "num_classes", self.num_classes)
            if known != self.num_classes:
                raise InputError(
                    f"num_classes is {self.num_classes}, but that of the {name} is {known}; they "
                    "must be equal"
                )
        auxiliary = getattr(self.discriminator, "conditioning", None) == "auxiliary"
        has_head = auxiliary and self.num_classes > 0
        if has_head != (self.auxiliary > 0):
            raise InputError(
                f"auxiliary is {self.auxiliary}, but the discriminator "
                f"{'has an' if has_head else 'has no'} auxiliary head; set both or neither"
            )

    @property
    def objectives(self) -> Sequence[Objective]:
        """The discriminator, `critic_steps` times, then the generator."""
        critics = [
            Objective("discriminator", partial(self.discriminator_loss, turn=turn))
            for turn in range(self.critic_steps)
        ]
        return (*critics, Objective("generator", self.generator_loss))

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"generator", "discriminator"} and their statistics, by the same names."""
        one, two = jax.random.split(rng)
        image, label = self._clean(batch)
        z = jnp.zeros((len(image), self.latents))
        fake, generator = self.generator.init_with_output(one, z, label)
        if fake.shape != image.shape:
            raise InputError(
                f"the generator gives {list(fake.shape)}, but the images are {list(image.shape)}"
            )
        variables = {
            "generator": generator,
            "discriminator": self.discriminator.init(two, image, label),
        }
        params = {name: of["params"] for name, of in variables.items()}
        state = {
            name: {key: value for key, value in of.items() if key != "params"}
            for name, of in variables.items()
        }
        return params, state

    def check(self, batch: Batch) -> None:
        """Raises InputError unless a batch on the host has images in [0, 1] and true classes."""
        check_unit_images(batch)
        if self.num_classes and "label" not in batch:
            raise InputError(
                f"num_classes is {self.num_classes}, but the data has no field label; it must be 0"
            )
        if self.num_classes:
            check_labels(valid_rows(batch, "label"), self.num_classes)

    def discriminator_loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array, turn: int = 0
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """real + fake + penalties, of the batch's rows `turn`, `turn + critic_steps`, ...

        The real part is a mean over the valid examples.
        """
        if len(batch["valid"]) % self.critic_steps:
            raise InputError(
                f"a batch of {len(batch['valid'])} cannot be divided among critic_steps="
                f"{self.critic_steps}; batch_size must be a multiple of it"
            )
        batch = {name: batch[name][turn :: self.critic_steps] for name in KEYS if name in batch}
        image, label = self._clean(batch)
        fake_rng, change_rng, penalty_rng = jax.random.split(rng, 3)
        fake, fake_label, _ = self._fake(params, state.model_state, len(image), fake_rng)
        variables = {
            "params": params["discriminator"], **state.model_state["discriminator"],
        }  # fmt: skip
        both = self._seen(jnp.concatenate([image, fake]), change_rng)
        labels = jnp.concatenate([label, fake_label])
        output, changed = self.discriminator.apply(
            variables, both, labels, train=True, mutable=True
        )
        logit, named = self._paid(output, labels)
        real_logit, fake_logit = jnp.split(logit, 2)
        real_named, fake_named = jnp.split(named, 2)
        real_image, fake_image = jnp.split(both, 2)
        values = _per_image(self.loss.real(real_logit)) + real_named
        critic = lambda x: self._logit(params, state.model_state, x, label)  # noqa: E731
        if self.gradient_penalty:
            penalty = gradient_penalty(critic, real_image, fake_image, penalty_rng)
            values += self.gradient_penalty * penalty
        if self.r1:
            values += self.r1 / 2 * r1_penalty(critic, real_image)
        real = mean(values, batch["valid"])
        fakes = mean(_per_image(self.loss.fake(fake_logit)) + fake_named)
        any_valid = real.count > 0  # without real images there is nothing to learn
        loss = real.total / jnp.maximum(real.count, 1) + any_valid * fakes.total / fakes.count
        changed = {key: value for key, value in changed.items() if key != "params"}
        metrics = {"discriminator/real": real, "discriminator/fake": fakes}
        return loss, ({**state.model_state, "discriminator": changed}, metrics)

    def generator_loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """What the discriminator makes of new images; the batch gives only their number."""
        count = len(batch["valid"]) // self.critic_steps
        fake_rng, change_rng = jax.random.split(rng)
        image, label, changed = self._fake(params, state.model_state, count, fake_rng)
        image = self._seen(image, change_rng)
        logit, named = self._paid(self._output(params, state.model_state, image, label), label)
        losses = mean(_per_image(self.loss.generator(logit)) + named)
        metrics = {"generator/loss": losses}
        # Without real images the discriminator learns nothing, nor does this.
        loss = jnp.any(batch["valid"]) * losses.total / count
        return loss, ({**state.model_state, "generator": changed}, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the mean logits of held-out and of generated images: far apart is overfitting."""
        image, label = self._clean(batch)
        fake = self.sample(params, label, rng)
        return {
            "logit_real": mean(self._logit(params, model_state, image, label), batch["valid"]),
            "logit_fake": mean(self._logit(params, model_state, fake, label), batch["valid"]),
        }

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns a sample, float32 [b, h, w, c] in [0, 1], for each label, int32 [b], if told."""
        _, label = self._clean(batch)
        told = {"label": label} if self.num_classes else {}
        return {"sample": self.sample(params, label, rng, first=first_row(batch)), **told}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns 10 rows of samples, of the same latents every time.

        A column for each of the first 10 classes: of 1,000 they would be a set of their own.
        """
        columns = min(self.num_classes or 10, 10)
        label = jnp.tile(jnp.arange(columns), 10)
        return {"samples": draw.tiled(self.sample(params, label, jax.random.key(0)), columns)}

    def sample(
        self, params: Params, labels: jax.Array, rng: jax.Array, first: int = 0
    ) -> jax.Array:
        """Returns an image of each class in `labels`, float32 [b, h, w, c] in [0, 1]; jit it.

        The image at row i comes from `fold_in(rng, first + i)`, whatever the batch. The BatchNorm
        statistics are taken anew, of `statistics_batch` images of all classes, or spread over
        them if they are more: those of training do not fit averaged parameters.

        Raises InputError, outside of jit, for no such label.
        """
        if self.num_classes and not isinstance(labels, jax.core.Tracer):
            check_labels(np.asarray(labels), self.num_classes)
        count = self.statistics_batch
        z = jax.random.normal(jax.random.key(0), (count, self.latents))
        classes = max(self.num_classes, 1)
        every = jnp.arange(count)
        every = every % classes if count >= classes else every * classes // count
        weights = {"params": params["generator"]}
        _, statistics = self.generator.apply(weights, z, every, train=True, mutable="batch_stats")
        keys = example_keys(rng, len(labels), first)
        z = jax.vmap(lambda key: jax.random.normal(key, (self.latents,)))(keys)
        labels = labels if self.num_classes else jnp.zeros_like(labels)
        return self.generator.apply({**weights, **statistics}, z, labels)

    def _fake(
        self, params: Params, model_state: PyTree, count: int, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, PyTree]:
        """New images, their labels, and the state of the generator after them."""
        one, two = jax.random.split(rng)
        z = jax.random.normal(one, (count, self.latents))
        label = jax.random.randint(two, (count,), 0, max(self.num_classes, 1))
        variables = {"params": params["generator"], **model_state["generator"]}
        image, changed = self.generator.apply(variables, z, label, train=True, mutable=True)
        return image, label, {key: value for key, value in changed.items() if key != "params"}

    def _output(
        self, params: Params, model_state: PyTree, image: jax.Array, label: jax.Array
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        variables = {"params": params["discriminator"], **model_state["discriminator"]}
        return self.discriminator.apply(variables, image, label)

    def _logit(
        self, params: Params, model_state: PyTree, image: jax.Array, label: jax.Array
    ) -> jax.Array:
        """float32 [b]; of patches the mean."""
        output = self._output(params, model_state, image, label)
        return _per_image(output[0] if self.auxiliary else output)

    def _paid(
        self, output: jax.Array | tuple[jax.Array, jax.Array], label: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The logits, and [b] what the auxiliary head makes both players pay."""
        if not self.auxiliary:
            return output, jnp.zeros(len(label))
        logit, of_classes = output
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(of_classes, label)
        return logit, self.auxiliary * cross_entropy

    def _seen(self, image: jax.Array, rng: jax.Array) -> jax.Array:
        return image if self.augment is None else self.augment(image, rng)

    def _clean(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Images and labels; zeros where not valid."""
        valid = batch["valid"]
        image = jnp.where(valid[:, None, None, None], batch["image"], 0.0)
        label = jnp.where(valid, batch["label"] if self.num_classes else 0, 0)
        return image, label.astype(jnp.int32)


def _per_image(values: jax.Array) -> jax.Array:
    """[b, ...] to the mean of each row, [b]."""
    return values.reshape(len(values), -1).mean(1)
