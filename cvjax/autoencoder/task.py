"""Variational autoencoder: images become a few numbers, and such numbers become images."""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax import draw
from cvjax.autoencoder.likelihoods import Bernoulli, Likelihood
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, mean


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
        for name, least in (
            ("latents", 1), ("beta", 0), ("warmup_steps", 0), ("free_bits", 0),
            ("importance_samples", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {least} or more")

    @property
    def objectives(self) -> Sequence[Objective]:
        """One, for the group "model"."""
        return (Objective("model", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": {"encoder", "decoder"}} and no other state."""
        one, two = jax.random.split(rng)
        encoder = self.encoder.init(one, batch["image"])["params"]
        z = jnp.zeros((len(batch["image"]), self.latents))
        return {"model": {"encoder": encoder, "decoder": self.decoder.init(two, z)["params"]}}, {}

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The negative bound, mean over the valid examples; without any, the free bits alone."""
        image, valid = _clean(batch), batch["valid"]
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
        image, valid = _clean(batch), batch["valid"]
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
        location, _ = self.encode(params, _clean(batch))
        return {
            "latent": location,
            "reconstruction": self.likelihood.mean(self.decode(params, location)),
            "sample": self.sample(params, len(location), rng),
        }

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns reconstructions under their images, samples, and traversals of each latent."""
        image = _clean(batch)[:10]
        found = self.predict(params, model_state, batch, rng)["reconstruction"][:10]
        values = jnp.linspace(-3.0, 3.0, 10)
        lines = jnp.eye(self.latents)[:, None] * values[:, None]  # a row for each latent
        walk = self.likelihood.mean(self.decode(params, lines.reshape(-1, self.latents)))
        return {
            "reconstructions": draw.grid(jnp.concatenate([image, found]), len(image)),
            "samples": draw.grid(self.sample(params, 100, jax.random.key(0)), 10),
            "traversals": draw.grid(walk, 10),
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

    def sample(self, params: Params, count: int, rng: jax.Array) -> jax.Array:
        """Expected images of z from the prior, [count, h, w, c] in [0, 1]; row i from fold_in i."""
        keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(count))
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


def kl_divergence(location: jax.Array, log_std: jax.Array) -> jax.Array:
    """KL(N(location, exp(log_std)^2), N(0, 1)) of each element, in nats."""
    return 0.5 * (location**2 + jnp.expm1(2 * log_std)) - log_std


def importance_weighted_bound(log_weights: jax.Array) -> jax.Array:
    """log (1/K sum_k w_k) over the first axis: at most log p(x) in the mean, and rising with K.

    Y. Burda et al., https://arxiv.org/abs/1509.00519, equation 8; with one draw it is the ELBO.
    """
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(len(log_weights))


def _clean(batch: Batch) -> jax.Array:
    """The images, black where not valid."""
    return jnp.where(batch["valid"][:, None, None, None], batch["image"], 0.0)
