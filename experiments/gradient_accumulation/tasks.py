"""The losses that the study accumulates, on random images [b, 16, 16, 3] of ten classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cvjax.classification.task import Classification
from cvjax.nn.resnet import ResNet
from cvjax.train.task import Objective, mean


class Plain(nn.Module):
    """Convolutions without statistics of the batch."""

    outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, 3] -> [b, outputs]."""
        for features in (32, 64):
            x = nn.gelu(nn.LayerNorm()(nn.Conv(features, (3, 3))(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.outputs)(x.mean((1, 2)))


@dataclass(frozen=True)
class Contrastive:
    """InfoNCE between two views of an image, against all others of the batch.

    A. van den Oord et al., https://arxiv.org/abs/1807.03748, equation 4, in both directions.
    """

    model: nn.Module = Plain(16)

    @property
    def objectives(self) -> Sequence[Objective]:
        """One."""
        return (Objective("model", self.loss),)

    def init(self, rng, batch):
        """Parameters of the encoder."""
        return {"model": self.model.init(rng, batch["image"])["params"]}, {}

    def embed(self, params, image: jax.Array) -> jax.Array:
        """Unit vectors, of the image and of its mirror image: [b, 2, d]."""
        views = jnp.stack([image, image[:, :, ::-1]], 1).reshape(-1, *image.shape[1:])
        z = self.model.apply({"params": params}, views)
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        return z.reshape(len(image), 2, -1)

    @staticmethod
    def of_embeddings(z: jax.Array) -> jax.Array:
        """The loss of each image, [b]."""
        similarity = z[:, 0] @ z[:, 1].T / 0.1
        own = jnp.arange(len(z))
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return (entropy(similarity, own) + entropy(similarity.T, own)) / 2

    def loss(self, params, state, batch, rng):
        """The mean over the batch."""
        losses = mean(self.of_embeddings(self.embed(params["model"], batch["image"])))
        return losses.compute(), (state.model_state, {"loss": losses})


def cached_gradient(task: Contrastive, params, image: jax.Array, parts: int):
    """The gradient of a whole contrastive batch for the memory of one part.

    L. Gao et al., Scaling Deep Contrastive Learning Batch Size (https://arxiv.org/abs/2101.06983),
    section 3: embed all parts without keeping activations, take the gradient of the loss with
    respect to the embeddings, then push it through the encoder part by part.
    """
    pieces = jnp.moveaxis(image.reshape(-1, parts, *image.shape[1:]), 1, 0)
    _, z = jax.lax.scan(lambda _, part: (None, task.embed(params, part)), None, pieces)
    whole = jnp.moveaxis(z, 0, 1).reshape(-1, *z.shape[2:])
    dz = jax.grad(lambda z: task.of_embeddings(z).mean())(whole)
    dz = jnp.moveaxis(dz.reshape(-1, parts, *dz.shape[1:]), 1, 0)

    def push(total, piece):
        part, slope = piece
        (gradient,) = jax.vjp(lambda p: task.embed(p, part), params)[1](slope)
        return jax.tree.map(jnp.add, total, gradient), None

    return jax.lax.scan(push, jax.tree.map(jnp.zeros_like, params), (pieces, dz))[0]


PLAIN = Classification(Plain())
NORM = Classification(ResNet(stem="cifar", width=16, stage_sizes=(1, 1), num_classes=10))
CONTRASTIVE = Contrastive()


def batch_of(examples: int, ragged: bool) -> dict[str, np.ndarray]:
    """A batch; a ragged one has its valid examples unevenly spread."""
    draws = np.random.default_rng(0)
    valid = np.ones(examples, bool)
    if ragged:
        valid[1::2] = False
        valid[: examples // 3] = False
    return {
        "image": draws.random((examples, 16, 16, 3), np.float32),
        "label": draws.integers(0, 10, examples).astype(np.int32),
        "valid": valid,
    }
