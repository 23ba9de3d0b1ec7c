"""Masked autoencoder: from a few patches of an image the others are told.

K. He et al.: Masked Autoencoders Are Scalable Vision Learners, https://arxiv.org/abs/2111.06377.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax import draw
from cvjax.autoencoder.task import images_of
from cvjax.checks import check_at_least, check_fractions, check_unit_images
from cvjax.errors import InputError
from cvjax.nn.dense import Dense
from cvjax.nn.space_to_depth import depth_to_space, space_to_depth
from cvjax.nn.vit import Block, ViT
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective, example_keys, first_row, mean


class PatchDecoder(nn.Module):
    """Some patches' latents [b, k, c] to the pixels of all patches [b, n, outputs].

    Blocks of a transformer over all `n` places; a learned vector stands where nothing was seen
    (section 3, "MAE decoder").
    """

    outputs: int
    width: int = 64
    depth: int = 1
    heads: int = 4

    def __post_init__(self):
        check_at_least(self, outputs=1, width=1, depth=0, heads=1)
        super().__post_init__()

    @nn.compact
    def __call__(self, seen: jax.Array, order: jax.Array, *, train: bool = False) -> jax.Array:
        """`order` int32 [b, n] has the numbers of the patches, the seen ones first."""
        count = order.shape[1]
        small = nn.initializers.normal(0.02)
        x = Dense(self.width, name="embedding")(seen)
        hidden = jnp.broadcast_to(
            self.param("mask_token", small, (self.width,)),
            (len(x), count - x.shape[1], self.width),
        )
        place = jnp.argsort(order, axis=1)  # where in `order` each patch is
        x = jnp.take_along_axis(jnp.concatenate([x, hidden], axis=1), place[..., None], axis=1)
        x = x + self.param("position", small, (count, self.width))
        for i in range(self.depth):
            x = Block(self.heads, name=f"block_{i}")(x, train)
        return Dense(self.outputs, name="output")(nn.LayerNorm(name="norm")(x))


@dataclass(frozen=True)
class MaskedAutoencoder:
    """Minimizes the mean squared error of the patches that were not seen.

    The encoder computes on the seen patches alone, a number that does not depend on the image. A
    batch is {"image": float32 [b, h, w, c] in [0, 1], "valid": bool [b]}, with h and w multiples of
    the encoder's `patch`. The parameters are {"model": {"encoder", "decoder"}}: a ViT classifier
    takes its beginning from "model/encoder", and is given images as the encoder is, with
    `mean` 0.5 and `std` 0.5.

    Attributes:
      encoder: the transformer; its head is not used.
      decoder: `__call__(seen [b, k, width], order [b, n]) -> [b, n, patch * patch * c]`.
      masked: the share of patches that is not seen, rounded so that one is seen and one is not.
    """

    encoder: ViT
    decoder: nn.Module
    masked: float = 0.75

    def __post_init__(self):
        check_fractions(self, "masked")
        if self.masked in (0, 1):
            raise InputError(f"masked is {self.masked}; it must be between 0 and 1")

    @property
    def objectives(self) -> Sequence[Objective]:
        """One, for the group "model"."""
        return (Objective("model", self.loss),)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": {"encoder", "decoder"}} and no other state."""
        one, two = jax.random.split(rng)
        image = images_of(batch)
        order, seen = self.split(rng, image)
        encode = partial(ViT.encode, keep=order[:, :seen])
        latent, encoder = self.encoder.init_with_output(one, image, method=encode)
        told, decoder = self.decoder.init_with_output(two, latent, order)
        expected = patches_of(image, self.encoder.patch).shape
        if told.shape != expected:
            raise InputError(
                f"the decoder gives {list(told.shape)}; of images {list(image.shape)} in patches "
                f"it must give {list(expected)}"
            )
        return {"model": {"encoder": encoder["params"], "decoder": decoder["params"]}}, {}

    def check(self, batch: Batch) -> None:
        """Raises InputError unless the valid images of a batch on the host are in [0, 1]."""
        check_unit_images(batch)

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The mean over the valid examples of the error of unseen patches."""
        error, _, _ = self._error(params, batch, rng, train=True)
        metric = mean(error, batch["valid"])
        loss = metric.total / jnp.maximum(metric.count, 1)
        return loss, (state.model_state, {"masked_mse": metric})

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the mean squared error of the unseen patches."""
        error, _, _ = self._error(params, batch, rng)
        return {"masked_mse": mean(error, batch["valid"])}

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns images [b, h, w, c] in [0, 1] whose unseen patches are told, and what was seen.

        `latent` [b, width] is the mean over the patches of the whole image, encoded unmasked.
        """
        image = images_of(batch)
        _, told, is_seen = self._error(params, batch, rng)
        patch = self.encoder.patch
        pixels = patches_of(image, patch)
        told = jnp.where(is_seen[..., None], pixels, told)
        seen = jnp.where(is_seen[..., None], pixels, 0.5)
        latent = self.encoder.apply(
            {"params": params["model"]["encoder"]}, _scaled(image), method=ViT.encode
        )
        return {
            "reconstruction": jnp.clip(image_of(told, patch, image.shape), 0.0, 1.0),
            "seen": image_of(seen, patch, image.shape),
            "latent": latent.mean(axis=1),
        }

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns images, what is seen of them (the rest is grey), and what is told, in rows."""
        found = self.predict(params, model_state, batch, rng)
        rows = [x[:10] for x in (images_of(batch), found["seen"], found["reconstruction"])]
        return {"reconstructions": draw.tiled(jnp.concatenate(rows), len(rows[0]))}

    def split(
        self, rng: jax.Array, image: jax.Array, first: jax.Array | int = 0
    ) -> tuple[jax.Array, int]:
        """A random order of the patches of each image, int32 [b, n], and how many are seen.

        The first so many of the order are seen; that of row i comes from `fold_in(rng, first + i)`.
        """
        count = patches_of(image, self.encoder.patch).shape[1]
        if count < 2:
            raise InputError("a masked autoencoder needs at least 2 patches; make `patch` smaller")
        seen = min(max(round(count * (1 - self.masked)), 1), count - 1)
        keys = example_keys(rng, len(image), first)
        order = jax.vmap(lambda key: jax.random.permutation(key, count))(keys)
        return order.astype(jnp.int32), seen

    def _error(
        self, params: Params, batch: Batch, rng: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Error of the unseen patches [b], the pixels told [b, n, d], and what is seen [b, n]."""
        mask_rng, dropout_rng = jax.random.split(rng)
        image = images_of(batch)
        order, seen = self.split(mask_rng, image, first_row(batch))
        latent = self.encoder.apply(
            {"params": params["model"]["encoder"]}, _scaled(image), keep=order[:, :seen],
            train=train, method=ViT.encode, rngs={"dropout": dropout_rng},
        )  # fmt: skip
        told = self.decoder.apply({"params": params["model"]["decoder"]}, latent, order)
        rows = jnp.arange(len(image))[:, None]
        is_seen = jnp.zeros(order.shape, bool).at[rows, order[:, :seen]].set(True)
        error = jnp.mean((told - patches_of(image, self.encoder.patch)) ** 2, axis=-1)
        error = jnp.sum(jnp.where(is_seen, 0.0, error), axis=1) / (order.shape[1] - seen)
        return error, told, is_seen


def patches_of(image: jax.Array, patch: int) -> jax.Array:
    """Cuts images [b, h, w, c] into patches [b, n, patch * patch * c], row by row."""
    b, h, w, c = image.shape
    if h % patch or w % patch:
        raise InputError(f"images are {h} x {w}; they must be multiples of patch={patch}")
    return space_to_depth(image, patch).reshape(b, -1, patch * patch * c)


def image_of(patches: jax.Array, patch: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `patches_of`: images of `shape` [b, h, w, c]."""
    b, h, w, _ = shape
    return depth_to_space(patches.reshape(b, h // patch, w // patch, -1), patch)


def _scaled(image: jax.Array) -> jax.Array:
    """[0, 1] to [-1, 1], as `Classification` does by default."""
    return 2 * image - 1
