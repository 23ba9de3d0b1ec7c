"""A transformer for captions, trained together with what it is a condition of.

As in A. Nichol et al.: GLIDE (https://arxiv.org/abs/2112.10741), section 2.1 and 3: its last layer
is given to attention word by word, and one vector of the whole to all blocks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cvjax.checks import check_at_least
from cvjax.errors import InputError
from cvjax.nn.vit import Block


class TextEncoder(nn.Module):
    """Tokens to a vector for the caption and one for each word.

    Token 0 is no word. It has an embedding too, and is not masked: a caption of nothing but zeros,
    the null one of classifier-free guidance, is as good as any. A token out of range gives NaN.

    Attributes:
      vocabulary: how many words there are; their tokens are 1..vocabulary.
      length: tokens of a caption.
      width, depth, heads: channels, blocks and heads.
      dtype: of the computation and the output; parameters are float32.
    """

    vocabulary: int
    length: int
    width: int = 64
    depth: int = 1
    heads: int = 2
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_at_least(self, vocabulary=1, length=1, width=1, depth=1, heads=1)
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps int32 [b, length] to [b, width] and [b, length, width]."""
        if tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise InputError(
                f"TextEncoder: tokens are {list(tokens.shape)}; they must be [b, {self.length}]"
            )
        init = nn.initializers.normal(1.0)
        table = nn.Embed(self.vocabulary + 1, self.width, embedding_init=init, name="table")
        # Counted from the end, a negative token would be a word.
        tokens = jnp.where(tokens < 0, self.vocabulary + 1, tokens)
        x = table(tokens) + self.param("position", init, (self.length, self.width))
        x = x.astype(self.dtype)
        for number in range(self.depth):
            x = Block(self.heads, dtype=self.dtype, name=f"block_{number}")(x, False)
        x = nn.LayerNorm(1e-6, dtype=self.dtype, name="norm")(x)
        return jnp.mean(x, axis=1), x
