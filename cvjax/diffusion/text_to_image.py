"""Diffusion by captions: a base model, and an upsampler that makes its images larger.

The two stages of A. Nichol et al.: GLIDE (https://arxiv.org/abs/2112.10741). Both are `Diffusion`
with another condition, so that samplers, guidance and losses are the same.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cvjax import draw
from cvjax.checks import valid_rows
from cvjax.data.captions import encode
from cvjax.diffusion.super_resolution import SuperResolution
from cvjax.diffusion.task import Diffusion
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree
from cvjax.train.task import Batch


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

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns a row of 8 samples for each of `captions`, of the same noise every time."""
        if not self.captions:
            return {}
        tokens = jnp.repeat(jnp.asarray(self.tokens(self.captions)), 8, axis=0)
        return {"samples": draw.tiled(self.sample(params, tokens, jax.random.key(0)), 8)}

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
class Upsampler(SuperResolution, TextToImage):
    """Large images for small ones and their captions: `SuperResolution` of `TextToImage`."""

    num_classes: int = 0  # of the two, SuperResolution's default would come first
