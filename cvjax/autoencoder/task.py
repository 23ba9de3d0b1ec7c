"""Autoencoders: images become a few numbers, and such numbers become images.

`VAE` is the variational one; `Autoencoder` is the plain one, the denoising one (with a `corrupt`)
and the vector-quantized one (with a `bottleneck`). Those that see a part of the patches are in
`masked.py`, those with a discriminator in `vqgan.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax import draw
from cvjax.autoencoder.likelihoods import Bernoulli, Likelihood
from cvjax.autoencoder.quantize import Quantized, Quantizer, perplexity
from cvjax.checks import check_at_least, check_unit_images
from cvjax.errors import InputError
from cvjax.evaluation.similarity import psnr, ssim
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, example_keys, first_row, mean


@dataclass(frozen=True)
class VAE:
    """Maximizes E_q[log p(x | z)] - beta KL(q(z | x), p(z)) with a standard normal prior p(z).

    D. Kingma, M. Welling, https://arxiv.org/abs/1312.6114; beta as in I. Higgins et al.,
    https://openreview.net/forum?id=Sy2fzU9gl. A batch is {"image": float32 [b, h, w, c] in [0, 1],
    "valid": bool [b]}. All figures are in nats for an image.

    Attributes:
      encoder: `__call__(image [b, h, w, c]) -> [b, 2 * latents]`, mean and log-std of q(z | x).
      decoder: `__call__(z [b, latents]) -> [b, h, w, likelihood.channels(c)]`.
      latents: the dimension of z.
      likelihood: one of `cvjax.autoencoder.likelihoods`.
      beta: the weight of the KL term.
      warmup_steps: in this many micro-batches that weight rises from 0 to beta.
      free_bits: nats below which the KL of a latent, mean over the batch, costs no less
        (D. Kingma et al., https://arxiv.org/abs/1606.04934, equation 15).
      importance_samples: K of the bound on log p(x) that `evaluate` reports.
    """

    encoder: nn.Module
    decoder: nn.Module
    latents: int = 16
    likelihood: Likelihood = Bernoulli()
    beta: float = 1.0
    warmup_steps: int = 0
    free_bits: float = 0.0
    importance_samples: int = 64

    def __post_init__(self):
        check_at_least(self, latents=1, beta=0, warmup_steps=0, free_bits=0, importance_samples=1)

    @property
    def objectives(self) -> Sequence[Objective]:
        """One, for the group "model"."""
        return (Objective("model", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": {"encoder", "decoder"}} and no other state."""
        one, two = jax.random.split(rng)
        shape = batch["image"].shape
        encoder = self.encoder.init(one, batch["image"])["params"]
        z = jnp.zeros((shape[0], self.latents))
        outputs, decoder = self.decoder.init_with_output(two, z)
        expected = (*shape[:-1], self.likelihood.channels(shape[-1]))
        if outputs.shape != expected:
            raise InputError(
                f"the decoder gives {list(outputs.shape)}; for {type(self.likelihood).__name__} of "
                f"images {list(shape)} it must give {list(expected)}"
            )
        return {"model": {"encoder": encoder, "decoder": decoder["params"]}}, {}

    def check(self, batch: Batch) -> None:
        """Raises InputError unless the valid images of a batch on the host are in [0, 1]."""
        check_unit_images(batch)

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The negative bound, mean over the valid examples; without any, the free bits alone."""
        image, valid = images_of(batch), batch["valid"]
        location, log_std = self.encode(params, image)
        z = location + jnp.exp(log_std) * jax.random.normal(rng, location.shape)
        log_likelihood = self.likelihood.log_prob(self.decode(params, z), image)
        divergence = kl_divergence(location, log_std)

        count = jnp.maximum(jnp.sum(valid), 1)
        average = lambda x: jnp.sum(jnp.where(valid[:, None], x, 0.0), axis=0) / count  # noqa: E731
        cost = jnp.sum(jnp.maximum(average(divergence), self.free_bits))
        weight = self.beta * jnp.clip(state.step / max(self.warmup_steps, 1), 0.0, 1.0)
        weight = weight if self.warmup_steps else self.beta
        loss = weight * cost - average(log_likelihood[:, None])[0]
        divergence = divergence.sum(-1)
        metrics = {"elbo": mean(log_likelihood - divergence, valid), "kl": mean(divergence, valid)}
        return loss, (state.model_state, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the ELBO (beta 1), its KL, and the importance-sampled bound on -log p(x)."""
        image, valid = images_of(batch), batch["valid"]
        divergence = kl_divergence(*self.encode(params, image)).sum(-1)
        log_weights, log_likelihood = self.log_weights(params, image, rng, self.importance_samples)
        return {
            "elbo": mean(log_likelihood.mean(0) - divergence, valid),
            "kl": mean(divergence, valid),
            "nll": mean(-importance_weighted_bound(log_weights), valid),
        }

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns latent means [b, latents], their reconstructions, and samples [b, h, w, c]."""
        location, _ = self.encode(params, images_of(batch))
        return {
            "latent": location,
            "reconstruction": self.likelihood.mean(self.decode(params, location)),
            "sample": self.sample(params, len(location), rng, first_row(batch)),
        }

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns reconstructions under their images, samples, traversals, interpolations.

        In a row of the traversals one latent goes from -3 to 3, the others are those of the first
        image; a row of the interpolations goes from the latent mean of one image to another's.
        """
        image = images_of(batch)[:10]
        location, _ = self.encode(params, image)
        found = self.likelihood.mean(self.decode(params, location))
        values = jnp.linspace(-3.0, 3.0, 10)
        one = jnp.eye(self.latents, dtype=bool)[:, None]  # a row for each latent
        lines = jnp.where(one, values[:, None], location[0])
        walk = self.likelihood.mean(self.decode(params, lines.reshape(-1, self.latents)))
        return {
            "reconstructions": draw.tiled(jnp.concatenate([image, found]), len(image)),
            "samples": draw.tiled(self.sample(params, 100, jax.random.key(0)), 10),
            "traversals": draw.tiled(walk, 10),
            "interpolations": draw.tiled(
                self.likelihood.mean(self.decode(params, between(location))), 10
            ),
        }

    def encode(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-std of q(z | x), [b, latents] each."""
        outputs = self.encoder.apply({"params": params["model"]["encoder"]}, image)
        if outputs.shape[-1] != 2 * self.latents:
            raise InputError(
                f"latents is {self.latents}, but the encoder has {outputs.shape[-1]} outputs; it "
                f"must have {2 * self.latents}"
            )
        location, log_std = jnp.split(outputs, 2, axis=-1)
        return location, log_std

    def decode(self, params: Params, z: jax.Array) -> jax.Array:
        """What the likelihood asks for, from z [b, latents]."""
        return self.decoder.apply({"params": params["model"]["decoder"]}, z)

    def sample(self, params: Params, count: int, rng: jax.Array, first: int = 0) -> jax.Array:
        """Expected images of z from the prior, [count, h, w, c] in [0, 1].

        The image at row i comes from `fold_in(rng, first + i)`, whatever the batch.
        """
        keys = example_keys(rng, count, first)
        z = jax.vmap(lambda key: jax.random.normal(key, (self.latents,)))(keys)
        return self.likelihood.mean(self.decode(params, z))

    def log_weights(
        self, params: Params, image: jax.Array, rng: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """log p(x, z) - log q(z | x) and log p(x | z) of `count` draws of z, [count, b] each."""
        location, log_std = self.encode(params, image)

        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            noise = jax.random.normal(key, location.shape)
            z = location + jnp.exp(log_std) * noise
            log_likelihood = self.likelihood.log_prob(self.decode(params, z), image)
            ratio = jnp.sum(0.5 * (noise**2 - z**2) + log_std, axis=-1)  # log p(z) / q(z | x)
            return log_likelihood + ratio, log_likelihood

        return jax.lax.map(one, jax.random.split(rng, count))


class Network(nn.Module):
    """Encoder, bottleneck if there is one, and decoder, as one module."""

    encoder: nn.Module
    decoder: nn.Module
    bottleneck: Quantizer | None = None

    def __call__(
        self, image: jax.Array, valid: jax.Array, train: bool = False
    ) -> tuple[jax.Array, Quantized]:
        """Returns reconstructions [b, h, w, c], of any range, and the latents."""
        code = self.squeeze(self.encode(image), valid, train)
        return self.decoder(code.z), code

    def encode(self, image: jax.Array) -> jax.Array:
        """Latents [b, ..., d] before the bottleneck."""
        return self.encoder(image)

    def squeeze(self, z: jax.Array, valid: jax.Array, train: bool = False) -> Quantized:
        """What of the latents goes to the decoder; without a bottleneck all of it, indices -1."""
        if self.bottleneck is None:
            return Quantized(z, jnp.full(z.shape[:-1], -1), jnp.zeros(len(z)))
        return self.bottleneck(z, valid, train=train)

    def decode(self, z: jax.Array) -> jax.Array:
        """Images of latents."""
        return self.decoder(z)

    def decode_latents(self, z: jax.Array) -> jax.Array:
        """Images of latents that go through the bottleneck first."""
        return self.decoder(self.squeeze(z, jnp.ones(len(z), bool)).z)


@dataclass(frozen=True)
class Autoencoder:
    """Minimizes the mean squared error of the image that comes out, plus the bottleneck's loss.

    With `corrupt` it is a denoising autoencoder (P. Vincent et al., ICML 2008): the corrupted image
    goes in, the clean one shall come out. With `bottleneck` it is a VQ-VAE (arXiv:1711.00937). A
    batch is {"image": float32 [b, h, w, c] in [0, 1], "valid": bool [b]}.

    The parameters are {"model": {"encoder", "decoder", "bottleneck"}}: a classifier takes its
    beginning from "model/encoder".

    Attributes:
      encoder: `__call__(image [b, h, w, c]) -> z [b, ..., d]`.
      decoder: `__call__(z) -> [b, h, w, c]`.
      bottleneck: one of `cvjax.autoencoder.quantize`, or None.
      corrupt: `(image, rng) -> image`, such as those of `cvjax.autoencoder.corrupt`.
    """

    encoder: nn.Module
    decoder: nn.Module
    bottleneck: Quantizer | None = None
    corrupt: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    @property
    def network(self) -> Network:
        """Encoder, bottleneck and decoder."""
        return Network(self.encoder, self.decoder, self.bottleneck)

    @property
    def objectives(self) -> Sequence[Objective]:
        """One, for the group "model"."""
        return (Objective("model", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": parameters} and the other collections, such as the codebook."""
        shape = batch["image"].shape
        (found, _), variables = self.network.init_with_output(rng, batch["image"], batch["valid"])
        if found.shape != shape:
            raise InputError(
                f"the decoder gives {list(found.shape)}; of images {list(shape)} it must give such"
            )
        variables = dict(variables)
        return {"model": variables.pop("params")}, variables

    def check(self, batch: Batch) -> None:
        """Raises InputError unless the valid images of a batch on the host are in [0, 1]."""
        check_unit_images(batch)

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The mean over the valid examples of squared error and bottleneck's loss."""
        image, valid = images_of(batch), batch["valid"]
        variables = {"params": params["model"], **state.model_state}
        (found, code), changed = self.network.apply(
            variables, self._seen(image, rng), valid, True,
            rngs={"codebook": jax.random.fold_in(rng, 1)}, mutable=list(state.model_state),
        )  # fmt: skip
        error = jnp.mean((found - image) ** 2, axis=(1, 2, 3))
        metrics = {"mse": mean(error, valid), **self.of_codes(code, valid)}
        total = mean(error + code.loss, valid)
        loss = total.total / jnp.maximum(total.count, 1)
        return loss, ({**state.model_state, **changed}, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the squared error, PSNR (dB) and SSIM of reconstructions clipped to [0, 1]."""
        image, valid = images_of(batch), batch["valid"]
        found = self.predict(params, model_state, batch, rng)["reconstruction"]
        return {
            "mse": mean(jnp.mean((found - image) ** 2, axis=(1, 2, 3)), valid),
            "psnr": mean(psnr(found, image), valid),
            "ssim": mean(ssim(found, image), valid),
        }

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns latents, reconstructions in [0, 1] and, with a bottleneck, indices of codes."""
        image = self._seen(images_of(batch), rng, first_row(batch))
        variables = {"params": params["model"], **model_state}
        found, code = self.network.apply(variables, image, batch["valid"])
        outputs = {"latent": code.z, "reconstruction": jnp.clip(found, 0.0, 1.0)}
        return outputs if self.bottleneck is None else outputs | {"indices": code.indices}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns images, what is seen of them if they are corrupted, and reconstructions, in rows.

        And interpolations: each row goes from the latents of one image to those of another.
        """
        image = images_of(batch)
        variables = {"params": params["model"], **model_state}
        found = self.predict(params, model_state, batch, rng)["reconstruction"]
        rows = [image, found] if self.corrupt is None else [image, self._seen(image, rng), found]
        z = self.network.apply(variables, image[:10], method=Network.encode)
        walk = self.network.apply(variables, between(z), method=Network.decode_latents)
        return {
            "reconstructions": draw.tiled(
                jnp.clip(jnp.concatenate([row[:10] for row in rows]), 0.0, 1.0), len(z)
            ),
            "interpolations": draw.tiled(jnp.clip(walk, 0.0, 1.0), 10),
        }

    def _seen(self, image: jax.Array, rng: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """The images as the encoder gets them: what is done to each, its own key decides."""
        if self.corrupt is None:
            return image
        keys = example_keys(rng, len(image), first)
        return jax.vmap(lambda one, key: self.corrupt(one[None], key)[0])(image, keys)

    def of_codes(self, code: Quantized, valid: jax.Array) -> Metrics:
        """The perplexity of a batch's codes and the bottleneck's loss, where there is one."""
        if self.bottleneck is None:
            return {}
        found = perplexity(code.indices, valid, self.bottleneck.size)
        return {"perplexity": mean(found[None]), "bottleneck": mean(code.loss, valid)}


def between(z: jax.Array, steps: int = 10) -> jax.Array:
    """`steps` points on the line from each z [b, ...] to the next, float32 [b // 2 * steps, ...].

    Of a pair the first comes first; what is left over of an odd number takes no part, but one alone
    is paired with itself.
    """
    z = jnp.concatenate([z, z]) if len(z) == 1 else z
    first, second = z[0 : len(z) // 2 * 2 : 2], z[1::2]
    weight = jnp.linspace(0.0, 1.0, steps).reshape(-1, *[1] * (z.ndim - 1))
    line = first[:, None] * (1 - weight) + second[:, None] * weight
    return line.reshape(-1, *z.shape[1:])


def kl_divergence(location: jax.Array, log_std: jax.Array) -> jax.Array:
    """KL(N(location, exp(log_std)^2), N(0, 1)) of each element, in nats."""
    return 0.5 * (location**2 + jnp.expm1(2 * log_std)) - log_std


def importance_weighted_bound(log_weights: jax.Array) -> jax.Array:
    """log (1/K sum_k w_k) over the first axis: at most log p(x) in the mean, and rising with K.

    Y. Burda et al., https://arxiv.org/abs/1509.00519, equation 8; with one draw it is the ELBO.
    """
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(len(log_weights))


def images_of(batch: Batch) -> jax.Array:
    """The images, black where not valid."""
    return jnp.where(batch["valid"][:, None, None, None], batch["image"], 0.0)
