"""VQGAN: a quantized autoencoder whose images a discriminator cannot tell from real ones.

P. Esser et al.: Taming Transformers for High-Resolution Image Synthesis,
https://arxiv.org/abs/2012.09841, section 3.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.autoencoder.quantize import Quantized, Quantizer
from cvjax.autoencoder.task import Autoencoder, images_of
from cvjax.checks import check_at_least
from cvjax.errors import InputError, nearest
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean

Distance = Callable[[jax.Array, jax.Array], jax.Array]


def absolute_error(a: jax.Array, b: jax.Array) -> jax.Array:
    """The mean of |a - b| over each pair of images [b, h, w, c]; [b]."""
    return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


@dataclass(frozen=True)
class VQGAN:
    """Trains an autoencoder on pixels, a perceptual distance and a discriminator.

    The autoencoder ("model") pays L_rec + L_quantizer + lambda L_G; L_rec is the mean absolute
    error and the perceptual distance, and lambda makes the adversarial loss pull at the decoder's
    last layer as strongly as L_rec does (equation 7). The discriminator pays what `adversarial`
    asks, for real images and for reconstructions. Before `start` micro-batches both of these are 0.
    A batch is {"image": float32 [b, h, w, c] in [0, 1], "valid": bool [b]}.

    Attributes:
      encoder, decoder, bottleneck: as of `Autoencoder`.
      discriminator: `__call__(image [b, h, w, c]) -> logits [b, ...]`, of parameters alone, such as
        `gan.model.PatchDiscriminator` without spectral norm.
      adversarial: an object with `real`, `fake` and `generator`, each of logits and as large, such
        as those of `gan.losses`.
      last_layer: the path of the kernel of the decoder's last layer in the autoencoder's
        parameters.
      perceptual: `(image, image) -> [b]`, such as those of `cvjax.autoencoder.perceptual`; or None.
      perceptual_weight: of that distance.
      adversarial_weight: times lambda.
      start: micro-batches without a discriminator.
    """

    encoder: nn.Module
    decoder: nn.Module
    bottleneck: Quantizer
    discriminator: nn.Module
    adversarial: Any
    last_layer: str = "decoder/last/kernel"
    perceptual: Distance | None = None
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.8
    start: int = 0
    autoencoder: Autoencoder = field(init=False, repr=False)

    def __post_init__(self):
        check_at_least(self, perceptual_weight=0, adversarial_weight=0, start=0)
        missing = [
            part for part in ("real", "fake", "generator") if not hasattr(self.adversarial, part)
        ]
        if missing:
            raise InputError(
                f"VQGAN: adversarial is {self.adversarial!r}, which has no {missing[0]}; it must "
                "be a loss of cvjax.gan.losses"
            )
        plain = Autoencoder(self.encoder, self.decoder, self.bottleneck)
        object.__setattr__(self, "autoencoder", plain)

    @property
    def objectives(self) -> Sequence[Objective]:
        """The autoencoder, then the discriminator."""
        return (
            Objective("model", self.model_loss),
            Objective("discriminator", self.discriminator_loss),
        )

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model", "discriminator"} and the collections of the autoencoder."""
        one, two = jax.random.split(rng)
        params, model_state = self.autoencoder.init(one, batch)
        last = _at(params["model"], self.last_layer)
        if isinstance(last, dict):
            raise InputError(f"last_layer is {self.last_layer!r}, which is no array")
        discriminator = dict(self.discriminator.init(two, batch["image"]))
        params["discriminator"] = discriminator.pop("params")
        if discriminator:
            raise InputError(
                f"the discriminator has {', '.join(discriminator)}; it must have parameters alone"
            )
        return params, model_state

    def check(self, batch: Batch) -> None:
        """Raises InputError unless the valid images of a batch on the host are in [0, 1]."""
        self.autoencoder.check(batch)

    def model_loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The mean over the valid examples of what the autoencoder pays."""
        image, valid = images_of(batch), batch["valid"]
        found, code, changed = self._reconstruct(
            params["model"], state.model_state, image, batch, rng
        )
        average = lambda x: mean(x, valid).total / jnp.maximum(valid.sum(), 1)  # noqa: E731
        reconstruction = lambda found: average(self._distance(found, image))  # noqa: E731
        generator = lambda found: average(self._generator(params, found))  # noqa: E731

        # Lambda is a number: nothing of it is differentiated again.
        fixed = jax.lax.stop_gradient(params["model"])

        def of_last(kernel: jax.Array) -> jax.Array:
            model = _with(fixed, self.last_layer, kernel)
            return self._reconstruct(model, state.model_state, image, batch, rng)[0]

        _, pull = jax.vjp(of_last, _at(fixed, self.last_layer))
        still = jax.lax.stop_gradient(found)
        weight = adaptive_weight(
            *(pull(jax.grad(loss)(still))[0] for loss in (reconstruction, generator))
        )
        weight = jax.lax.stop_gradient(weight) * self.adversarial_weight
        weight = jnp.where(state.step < self.start, 0.0, weight)
        loss = reconstruction(found) + average(code.loss) + weight * generator(found)
        metrics = {
            "reconstruction": mean(self._distance(found, image), valid),
            "generator": mean(self._generator(params, found), valid),
            "adversarial_weight": mean(weight[None]),
            **self.autoencoder.of_codes(code, valid),
        }
        return loss, ({**state.model_state, **changed}, metrics)

    def discriminator_loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The mean over the valid examples of what the discriminator pays; 0 before `start`."""
        image, valid = images_of(batch), batch["valid"]
        variables = {"params": params["model"], **state.model_state}
        found, _ = self.autoencoder.network.apply(variables, image, valid)
        both = jnp.concatenate([image, jax.lax.stop_gradient(found)])
        logits = self.discriminator.apply({"params": params["discriminator"]}, both)
        real, fake = jnp.split(logits, 2)
        metrics = {
            "discriminator/real": mean(_mean_of(self.adversarial.real(real)), valid),
            "discriminator/fake": mean(_mean_of(self.adversarial.fake(fake)), valid),
        }
        total = sum(metric.total for metric in metrics.values()) / jnp.maximum(valid.sum(), 1)
        # Half of the sum, as the published code has it.
        loss = jnp.where(state.step < self.start, 0.0, 0.5 * total)
        return loss, (state.model_state, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """What `Autoencoder` returns, and the perceptual distance."""
        found = self.autoencoder.evaluate(params, model_state, batch, rng)
        if self.perceptual is not None:
            image = self.predict(params, model_state, batch, rng)["reconstruction"]
            distance = self.perceptual(image, images_of(batch))
            found["perceptual"] = mean(distance, batch["valid"])
        return found

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """As `Autoencoder`."""
        return self.autoencoder.predict(params, model_state, batch, rng)

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """As `Autoencoder`."""
        return self.autoencoder.visualize(params, model_state, batch, rng)

    def _reconstruct(
        self, model: PyTree, model_state: PyTree, image: jax.Array, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, Quantized, PyTree]:
        (found, code), changed = self.autoencoder.network.apply(
            {"params": model, **model_state}, image, batch["valid"], True,
            rngs={"codebook": rng}, mutable=list(model_state),
        )  # fmt: skip
        return found, code, changed

    def _distance(self, found: jax.Array, image: jax.Array) -> jax.Array:
        """L_rec of each pair, [b]."""
        distance = absolute_error(found, image)
        if self.perceptual is not None and self.perceptual_weight:
            distance += self.perceptual_weight * self.perceptual(found, image)
        return distance

    def _generator(self, params: Params, found: jax.Array) -> jax.Array:
        """L_G of each image, [b]; the discriminator stands still."""
        fixed = jax.lax.stop_gradient(params["discriminator"])
        return _mean_of(
            self.adversarial.generator(self.discriminator.apply({"params": fixed}, found))
        )


def adaptive_weight(reconstruction: jax.Array, generator: jax.Array) -> jax.Array:
    """|gradient of L_rec| / (|gradient of L_G| + 1e-6), at most 1e4 (equation 7).

    Both are gradients with respect to the kernel of the decoder's last layer.
    """
    ratio = jnp.linalg.norm(reconstruction.ravel()) / (jnp.linalg.norm(generator.ravel()) + 1e-6)
    return jnp.clip(ratio, 0.0, 1e4)


def _at(tree: PyTree, path: str) -> PyTree:
    for name in path.split("/"):
        if not isinstance(tree, dict) or name not in tree:
            known = nearest(name, tree) if isinstance(tree, dict) else ""
            raise InputError(f"last_layer is {path!r}; there is no {name!r}{known}")
        tree = tree[name]
    return tree


def _with(tree: PyTree, path: str, value: jax.Array) -> PyTree:
    """A copy of nested dictionaries with another leaf."""
    name, _, rest = path.partition("/")
    return {**tree, name: _with(tree[name], rest, value) if rest else value}


def _mean_of(values: jax.Array) -> jax.Array:
    """The mean of each row, [b, ...] -> [b]."""
    return values.reshape(len(values), -1).mean(axis=1)
