"""DETR: a set of queries looks at the image, and each says what it has found, or nothing.

N. Carion, F. Massa, G. Synnaeve, N. Usunier, A. Kirillov, S. Zagoruyko: End-to-End Object Detection
with Transformers, ECCV 2020 (https://arxiv.org/abs/2005.12872). Neither anchors nor suppression: in
training each truth is given to the query for which that is cheapest.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least, check_fractions
from cvjax.detection.boxes import (
    clip,
    cxcywh_to_xyxy,
    to_absolute,
    to_relative,
    xyxy_to_cxcywh,
)
from cvjax.detection.dense import Detections
from cvjax.detection.hungarian import detr_cost, hungarian
from cvjax.detection.losses import check_normalizer, giou_loss, normalized
from cvjax.errors import InputError
from cvjax.nn.attention import attend
from cvjax.nn.dense import Dense
from cvjax.nn.features import ordered_features

TEMPERATURE = 10_000.0  # of the sines, as in https://arxiv.org/abs/1706.03762, section 3.5


def sine_positions(height: int, width: int, features: int) -> jax.Array:
    """A vector for each place of a map, float32 [height * width, features], row by row.

    The first half tells y, the second x: sine and cosine in turn, of wavelengths that grow
    geometrically. Places are 2 pi / height, 4 pi / height, ..., 2 pi (appendix A.4; the code of the
    paper counts from 1). `features` is a multiple of 4.
    """
    if features % 4:
        raise InputError(f"features is {features}; it must be a multiple of 4")
    quarter = features // 4
    frequencies = TEMPERATURE ** -(jnp.arange(quarter) / quarter)

    def along(length: int) -> jax.Array:
        place = 2 * math.pi * jnp.arange(1, length + 1) / (length + 1e-6)
        angles = place[:, None] * frequencies
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(length, 2 * quarter)

    y, x = along(height)[:, None], along(width)[None]
    shape = height, width, 2 * quarter
    whole = jnp.concatenate([jnp.broadcast_to(y, shape), jnp.broadcast_to(x, shape)], -1)
    return whole.reshape(height * width, features)


class Projections(nn.Module):
    """Three dense layers, of the queries, keys and values, [b, n or m, c] each, in one kernel.

    It has all queries, then all keys, then all values, as in `cvjax.nn.attention.SelfAttention`.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> list[jax.Array]:
        """Keeps the shapes."""
        channels = inputs[0].shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (channels, 3 * channels))
        bias = self.param("bias", nn.initializers.zeros, (3 * channels,))
        kernels = jnp.split(kernel.astype(self.dtype), 3, axis=1)
        biases = jnp.split(bias.astype(self.dtype), 3)
        return [
            (x.astype(self.dtype).reshape(-1, channels) @ k).reshape(x.shape) + b  # as in Dense
            for x, k, b in zip(inputs, kernels, biases, strict=True)
        ]


class Attention(nn.Module):
    """Queries [b, n, c] look at keys [b, m, c] and take what they find there of values [b, m, c].

    Attributes:
      heads: each has c / heads channels.
      dtype: of the computation, softmax excepted; parameters are float32.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """[b, n, c]."""
        channels = query.shape[-1]
        if channels % self.heads:
            raise InputError(f"DETR: {channels} features do not divide into {self.heads} heads")
        query, key, value = (
            x.reshape(*x.shape[:2], self.heads, channels // self.heads)
            for x in Projections(self.dtype, name="query_key_value")(query, key, value)
        )
        x = attend(query, key, value)
        x = x.reshape(*x.shape[:2], channels)
        return _dense(channels, self.dtype, "output")(x)


class Layer(nn.Module):
    """One layer of the encoder or of the decoder, each branch followed by a norm (their figure 10).

    Attributes:
      heads: of the attention.
      hidden: features within the perceptron.
      dropout: of what each branch gives.
      dtype: of the computation; parameters are float32.
    """

    heads: int
    hidden: int
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        memory: jax.Array | None = None,
        memory_positions: jax.Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        """[b, n, c] and their positions; in the decoder also a memory [b, m, c] to look at."""

        def add(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
            norm = nn.LayerNorm(
                epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=f"{name}_norm"
            )
            return norm(x + y)

        placed = x + positions
        attention = Attention(self.heads, self.dtype, name="attention")
        x = add(x, attention(placed, placed, x), "attention")
        if memory is not None:
            attention = Attention(self.heads, self.dtype, name="memory")
            x = add(x, attention(x + positions, memory + memory_positions, memory), "memory")
        y = nn.relu(_dense(self.hidden, self.dtype, "hidden")(x))
        return add(x, _dense(x.shape[-1], self.dtype, "output")(y), "output")


class DETR(nn.Module):
    """The detector.

    Attributes:
      backbone: a module with `features(x, *, train)` and `strides`; its coarsest map is read.
      num_classes: of objects; there is one logit more, the last, of no object.
      queries: how many objects there can be; at least as many as there are rows of truth.
      features, heads, hidden: of the transformer; `features` is a multiple of 4.
      encoder_layers, decoder_layers: how many there are.
      dropout: in the transformer.
      no_object: weight of queries without an object in the loss of the classes, above 0.
      class_cost, box_cost, giou_cost: of the matching, see `cvjax.detection.hungarian.detr_cost`.
      normalizer: of the losses, see `cvjax.detection.losses.normalized`; of the classes what is
        divided by is the sum of the weights.
      score: detections with a lower probability are left out.
      dtype: of the computation; parameters, boxes and losses are float32.
    """

    backbone: nn.Module
    num_classes: int
    queries: int = 100
    features: int = 256
    heads: int = 8
    hidden: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    no_object: float = 0.1
    class_cost: float = 1.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    normalizer: str = "batch"
    score: float = 0.05
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_normalizer(self.normalizer)
        if not 0 < self.no_object <= 1:
            raise InputError(f"DETR: no_object is {self.no_object}; it must be in (0, 1]")
        check_at_least(self, num_classes=1, queries=1, decoder_layers=1, encoder_layers=0)
        check_at_least(self, features=1, heads=1, hidden=1)
        check_at_least(self, class_cost=0, box_cost=0, giou_cost=0)
        check_fractions(self, "dropout", "score")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What each layer of the decoder says of images [b, h, w, c], the last layer last.

        "logits" float32 [b, layers, queries, classes + 1], and "boxes" float32 [b, layers, queries,
        4], cxcywh as shares of the image.
        """
        *_, x = ordered_features(self.backbone, x, train=train, valid=valid)
        batch, height, width, _ = x.shape
        x = Dense(self.features, dtype=self.dtype, name="input")(x.astype(self.dtype))
        memory = x.reshape(batch, height * width, self.features)
        memory_positions = sine_positions(height, width, self.features).astype(self.dtype)

        def layer(name: str) -> Layer:
            return Layer(self.heads, self.hidden, self.dropout, self.dtype, name=name)

        for number in range(self.encoder_layers):
            memory = layer(f"encoder_{number}")(memory, memory_positions, train=train)
        shape = self.queries, self.features
        positions = self.param("query_positions", nn.initializers.normal(1.0), shape)
        positions = positions.astype(self.dtype)
        x = jnp.zeros((batch, *shape), self.dtype)
        norm = nn.LayerNorm(
            epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name="decoder_norm"
        )
        said = []
        for number in range(self.decoder_layers):
            x = layer(f"decoder_{number}")(x, positions, memory, memory_positions, train=train)
            said.append(norm(x))
        # The last layers in float32: cheap, and boxes keep their precision.
        x = jnp.stack(said, axis=1).astype(jnp.float32)
        logits = Dense(self.num_classes + 1, name="logits")(x)
        for name in ("box1", "box2"):
            x = nn.relu(Dense(self.features, name=name)(x))
        return {"logits": logits, "boxes": nn.sigmoid(Dense(4, name="box3")(x))}

    def losses(
        self, outputs: dict[str, jax.Array], truth: dict[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """`classification`, `box` (L1) and `giou`, each the sum over the layers of the decoder.

        The paper weights the second with 5 and the third with 2 (appendix A.4). `truth` is "boxes"
        [b, n, 4], "box_label" int [b, n], "box_valid" bool [b, n] and "valid" bool [b]; what is not
        valid is finite. Boxes count as far as they lie in the image.

        Raises:
          InputError: more rows of truth than queries.
        """
        rows = truth["boxes"].shape[1]
        if rows > self.queries:
            raise InputError(
                f"DETR: queries is {self.queries}, but images have up to {rows} boxes; give it as "
                "many queries, or the data a smaller max_instances"
            )

        def of_layer(logits, predicted, boxes, labels, valid):
            cost = detr_cost(
                logits, predicted, boxes, labels, class_weight=self.class_cost,
                l1_weight=self.box_cost, giou_weight=self.giou_cost,
            )  # fmt: skip
            index, found, _ = hungarian(cost, valid)
            target = jnp.where(found, labels[index], self.num_classes)
            log_p = jax.nn.log_softmax(logits)
            entropy = -jnp.take_along_axis(log_p, target[:, None], 1)[:, 0]
            # Over the weight of no object, so that a sum of weights is never below 1.
            weight = jnp.where(found, 1 / self.no_object, 1.0)
            # A query that has no box is its own: its distance is zero, and its gradient finite.
            boxes = jnp.where(found[:, None], boxes[index], predicted)
            losses = {
                "classification": entropy,
                "box": jnp.sum(jnp.abs(predicted - boxes), -1),
                "giou": giou_loss(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes)),
            }
            return losses, weight, found

        boxes = xyxy_to_cxcywh(to_relative(clip(truth["boxes"], *size), *size))
        of_image = jax.vmap(of_layer, in_axes=(0, 0, None, None, None))
        losses, weight, found = jax.vmap(of_image)(
            outputs["logits"], outputs["boxes"], boxes, truth["box_label"], truth["box_valid"]
        )  # each [b, layers, queries]

        def total(losses: jax.Array, counts: jax.Array) -> jax.Array:
            one = lambda x, c: normalized(x, c, c, truth["valid"], by=self.normalizer)  # noqa: E731
            return jnp.sum(jax.vmap(one, in_axes=1)(losses, counts))

        return {
            name: total(value, weight if name == "classification" else found)
            for name, value in losses.items()
        }

    def detections(self, outputs: dict[str, jax.Array], size: tuple[int, int]) -> Detections:
        """The objects that are found: boxes, scores, labels, detected, [b, queries, ...].

        One for each query, the best first, of the class that is most probable.
        """

        def of_image(logits: jax.Array, boxes: jax.Array) -> Detections:
            p = jax.nn.softmax(logits)[:, :-1]
            scores, labels = jnp.max(p, -1), jnp.argmax(p, -1).astype(jnp.int32)
            boxes = clip(to_absolute(cxcywh_to_xyxy(boxes), *size), *size)
            found = (scores > self.score) & jnp.all(boxes[:, 2:] > boxes[:, :2], -1)
            order = jnp.argsort(jnp.where(found, -scores, 0.0), stable=True)
            found = found[order]
            return {
                "boxes": jnp.where(found[:, None], boxes[order], 0.0),
                "scores": jnp.where(found, scores[order], 0.0),
                "labels": jnp.where(found, labels[order], 0),
                "detected": found,
            }

        return jax.vmap(of_image)(outputs["logits"][:, -1], outputs["boxes"][:, -1])


def _dense(features: int, dtype: DTypeLike, name: str) -> Dense:
    init = nn.initializers.xavier_uniform()
    return Dense(features, kernel_init=init, dtype=dtype, name=name)
