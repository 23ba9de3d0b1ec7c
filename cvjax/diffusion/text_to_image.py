"""Diffusion by captions: a base model, and an upsampler that makes its images larger.

The two stages of A. Nichol et al.: GLIDE (https://arxiv.org/abs/2112.10741). Both are `Diffusion`
with another condition, so that samplers, guidance and losses are the same.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cvjax import draw
from cvjax.checks import check_at_least, check_unit, valid_rows
from cvjax.data.captions import encode
from cvjax.diffusion.task import Diffusion
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree
from cvjax.train.task import Batch, example_keys, first_row


@dataclass(frozen=True)
class TextToImage(Diffusion):
    """Images for captions.

    A batch has "tokens", int32 [b, length] (`cvjax.data.captions`), in place of labels; zeros mean
    that nothing is said. `class_dropout` is the share of captions that are left out in training.
    If a batch has labels, `predict` passes them on to evaluators.

    Attributes:
      num_classes: 0, also in the network, whose `text` reads the tokens.
      words: the vocabulary, in the order of its tokens.
      length: tokens of a caption.
      captions: those of the pictures, a row for each; without any there is no picture.
    """

    num_classes: int = 0
    words: tuple[str, ...] = ()
    length: int = 8
    captions: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes:
            raise InputError(f"num_classes is {self.num_classes}; with captions it must be 0")
        self.tokens(self.captions)  # an unknown word is told before the training
        text = getattr(getattr(self.network, "network", self.network), "text", self)
        if text is None:
            raise InputError(
                "text of the network is None; with captions it must be a module that reads them, "
                "such as nn.text_encoder.TextEncoder"
            )
        known = getattr(text, "length", self.length)
        if known != self.length:
            raise InputError(
                f"length is {self.length}, but that of the network's text is {known}; they must be "
                "equal"
            )
        known = getattr(text, "vocabulary", len(self.words))
        if known != len(self.words):
            raise InputError(
                f"words are {len(self.words)}, but the vocabulary of the network's text is "
                f"{known}; they must be equal"
            )

    def check(self, batch: Batch) -> None:
        """As of `Diffusion`; and each caption must have `length` tokens, of `words`."""
        super().check(batch)
        if "tokens" not in batch:
            raise InputError(f"captions need a field tokens; there are: {', '.join(batch)}")
        self._check_tokens("a caption of the data", valid_rows(batch, "tokens"))

    def _check_tokens(self, who: str, tokens: np.ndarray) -> None:
        if tokens.shape[1:] != (self.length,):
            raise InputError(
                f"length is {self.length}, but {who} has {list(tokens.shape[1:])} tokens; they "
                "must be equal"
            )
        most = len(self.words)
        is_word = (tokens >= 0) & (tokens <= most) & (tokens == np.floor(tokens))  # NaN is none
        if (wrong := tokens[~is_word]).size:
            raise InputError(f"a token is {wrong[0]}; with {most} words it must be in 0..{most}")

    def tokens(self, captions: tuple[str, ...] | list[str]) -> np.ndarray:
        """Captions as the network reads them, int32 [b, length].

        Raises InputError for an unknown word or too long a caption.
        """
        rows = [encode(caption, self.words, self.length) for caption in captions]
        return np.stack(rows) if rows else np.zeros((0, self.length), np.int32)

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns one sample, float32 [b, h, w, c] in [0, 1], for each caption, and the labels."""
        _, condition = self._clean(batch)
        labels = {name: batch[name] for name in ("label",) if name in batch}
        return {"sample": self.sample(params, condition, rng, first=first_row(batch)), **labels}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns a row of 8 samples for each of `captions`, of the same noise every time."""
        if not self.captions:
            return {}
        tokens = jnp.repeat(jnp.asarray(self.tokens(self.captions)), 8, axis=0)
        return {"samples": draw.grid(self.sample(params, tokens, jax.random.key(0)), 8)}

    def _clean(self, batch: Batch) -> tuple[jax.Array, PyTree]:
        # The labels, if there are any, are not looked at.
        image, _ = super()._clean(batch)
        return image, jnp.where(batch["valid"][:, None], batch["tokens"], 0).astype(jnp.int32)

    def _null(self, condition: PyTree) -> PyTree:
        return jnp.zeros_like(condition)

    @property
    def _is_conditional(self) -> bool:
        return True


@dataclass(frozen=True)
class Upsampler(TextToImage):
    """Large images for small ones and their captions.

    A batch is as of `TextToImage`; the small image is made of the large one, by the mean over
    squares of pixels. In training noise of a random strength is added to it, so that the network
    forgives the faults of the stage before it: noise conditioning augmentation (J. Ho et al.,
    https://arxiv.org/abs/2106.15282, section 4.2). The network sees the noisy image, the small one
    scaled bilinearly, and the strength, as channels.

    A condition is {"tokens": int32 [b, length], "low": float32 [b, h, w, c] in [-1, 1], "level":
    float32 [b]}; `condition` makes it.

    Attributes:
      factor: by which height and width grow.
      augmentation: the greatest standard deviation of that noise, of small images in [-1, 1].
    """

    factor: int = 2
    augmentation: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        if self.factor < 2 or any(side % self.factor for side in self.image_shape[:2]):
            raise InputError(
                f"factor is {self.factor}; it must be at least 2 and divide the height and width "
                f"of image_shape {tuple(self.image_shape)}"
            )
        check_at_least(self, augmentation=0)
        if self.coupling is not None:
            raise InputError("coupling: an upsampler has none, for no two conditions are alike")

    def condition(
        self,
        tokens: jax.Array,
        low: jax.Array,
        level: float = 0.0,
        rng: jax.Array | None = None,
        first: int = 0,
    ) -> PyTree:
        """What `sample` takes: for tokens and small images [b, h, w, c] in [0, 1].

        `level` in [0, `augmentation`] says how faulty these are: noise of so large a standard
        deviation hides it, as in training, and is drawn for row i from `fold_in(rng, first + i)`.

        Raises InputError for another level, for one above 0 without an `rng`, and for images of
        another shape, that are no floats or, outside of jit, not in [0, 1].
        """
        if not 0 <= level <= self.augmentation:
            raise InputError(f"level is {level}; it must be in [0, {self.augmentation}]")
        height, width, channels = self.image_shape
        expected = (len(tokens), height // self.factor, width // self.factor, channels)
        if low.shape != expected:
            raise InputError(f"small images are {list(low.shape)}; they must be {list(expected)}")
        check_unit(low)
        low = 2 * low - 1
        if level:
            if rng is None:
                raise InputError(f"level is {level}: give an rng for its noise")
            keys = example_keys(rng, len(low), first)
            low += level * jax.vmap(lambda key: jax.random.normal(key, low.shape[1:]))(keys)
        level = jnp.full(len(tokens), level, jnp.float32)
        return {"tokens": jnp.asarray(tokens), "low": low, "level": level}

    def bilinear(self, low: jax.Array) -> jax.Array:
        """Images [b, h, w, c], `factor` times larger: what is there without an upsampler."""
        batch, height, width, channels = low.shape
        shape = (batch, height * self.factor, width * self.factor, channels)
        return jax.image.resize(low, shape, "linear")

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns "sample" and "bilinear", both [b, h, w, c] in [0, 1], and the labels."""
        _, condition = self._clean(batch)
        outputs = super().predict(params, model_state, batch, rng)
        return {**outputs, "bilinear": (self.bilinear(condition["low"]) + 1) / 2}

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns rows of 8 images of the batch: scaled bilinearly, upsampled, and true."""
        few = {name: value[:8] for name, value in batch.items()}
        outputs = self.predict(params, model_state, few, jax.random.key(0))
        rows = outputs["bilinear"], outputs["sample"], jnp.clip(few["image"], 0, 1)
        return {"samples": draw.grid(jnp.concatenate(rows), len(few["image"]))}

    def _clean(self, batch: Batch) -> tuple[jax.Array, PyTree]:
        image, tokens = super()._clean(batch)
        b, h, w, c = image.shape
        squares = image.reshape(b, h // self.factor, self.factor, w // self.factor, self.factor, c)
        return image, {
            "tokens": tokens,
            "low": jnp.mean(squares, axis=(2, 4)),
            "level": jnp.zeros(b),
        }

    def _null(self, condition: PyTree) -> PyTree:
        return {**condition, "tokens": jnp.zeros_like(condition["tokens"])}

    def _dropped(self, condition: PyTree, rng: jax.Array) -> PyTree:
        drop_rng, level_rng, noise_rng = jax.random.split(rng, 3)
        condition, low = super()._dropped(condition, drop_rng), condition["low"]
        level = self.augmentation * jax.random.uniform(level_rng, condition["level"].shape)
        noise = level[:, None, None, None] * jax.random.normal(noise_rng, low.shape)
        return {**condition, "low": low + noise, "level": level}

    def _inputs(self, x: jax.Array, t: jax.Array, condition: PyTree) -> tuple[PyTree, ...]:
        level = jnp.broadcast_to(condition["level"][:, None, None, None], (*x.shape[:3], 1))
        seen = jnp.concatenate([x, self.bilinear(condition["low"]), level], axis=-1)
        return seen, t, condition["tokens"]
