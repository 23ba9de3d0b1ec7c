"""Latent vectors become the nearest of a few: a learned codebook, or a fixed grid.

A quantizer is a Linen module, `__call__(z [b, ..., d], valid [b], train=) -> Quantized`; `size` is
the number of its codes and `vectors(indices [...]) -> [..., d]` looks them up.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least, check_fractions
from cvjax.errors import InputError

# What the random first vectors weigh in the averages: the first training batch outweighs them.
_NOTHING = 1e-6


class Quantized(NamedTuple):
    """What a quantizer makes of z [b, ..., d].

    Attributes:
      z: the codes [b, ..., d]; gradients pass to the input as if nothing had happened.
      indices: int32 [b, ...], in 0..size - 1.
      loss: float32 [b], to be added to the loss.
    """

    z: jax.Array
    indices: jax.Array
    loss: jax.Array


class VectorQuantizer(nn.Module):
    """The nearest vector of a codebook that follows the means of what comes to it.

    A. van den Oord et al., https://arxiv.org/abs/1711.00937: the straight-through gradient
    (section 3.1), the commitment loss (the third term of equation 3; here a mean over positions and
    channels), and moving averages of the counts and sums of each code, in place of the second term
    (appendix A.1, equations 6 to 8). A code that is hardly used is put on a random vector of the
    batch (P. Dhariwal et al., https://arxiv.org/abs/2005.00341, section 3.2); so are all codes
    that the first training batch does not use, which makes the beginning one of data.

    The codebook is in the collection "codebook": `counts` [size] and `sums` [size, d], whose
    quotient the vectors are, so that the mean over devices is that of their batches together.
    Rows that are not valid do not move it. A count falls to 1e-6 at the least, so that a code to
    which nothing comes stays where it is. Restarts need the stream "codebook"; with parallel="pmap"
    each device restarts what its own rows leave unused, so that a code lands between the vectors of
    several: train with parallel="jit".

    Attributes:
      size: the number of codes.
      commitment: the weight of the loss |z - sg(code)|^2.
      decay: of the moving averages, for each training pass.
      restart_below: a code used less than this share of the mean code is restarted; 0 is never.
    """

    size: int = 64
    commitment: float = 0.25
    decay: float = 0.99
    restart_below: float = 0.02

    def __post_init__(self):
        check_at_least(self, size=1, commitment=0, restart_below=0)
        check_fractions(self, "decay")
        if self.decay == 1:
            raise InputError(f"VectorQuantizer: decay is {self.decay}; it must be in [0, 1)")
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, valid: jax.Array, *, train: bool = False) -> Quantized:
        """Quantizes z with the codebook as it is; in training the codebook then moves."""
        d = z.shape[-1]
        counts = self.variable("codebook", "counts", jnp.full, (self.size,), _NOTHING)
        sums = self.variable(
            "codebook", "sums",
            lambda: _NOTHING * jax.random.normal(self.make_rng("params"), (self.size, d)),
        )  # fmt: skip
        flat = z.reshape(-1, d).astype(jnp.float32)
        index = nearest(flat, _quotient(sums.value, counts.value))
        code = _quotient(sums.value, counts.value)[index].reshape(z.shape)
        if train and not self.is_initializing():
            data = jax.lax.stop_gradient(flat)
            is_valid = jnp.repeat(valid, len(flat) // len(valid))
            moved = self._moved(counts.value, sums.value, data, index, is_valid)
            counts.value, sums.value = moved
        distance = (z - jax.lax.stop_gradient(code)) ** 2
        loss = self.commitment * jnp.mean(distance.reshape(len(z), -1), axis=-1)
        straight = z + jax.lax.stop_gradient(code - z)
        return Quantized(straight, index.reshape(z.shape[:-1]), loss)

    @nn.nowrap
    def vectors(self, variables: dict, indices: jax.Array) -> jax.Array:
        """Looks up codes [..., d] by indices [...] in this module's variables."""
        book = variables["codebook"]
        return _quotient(book["sums"], book["counts"])[indices]

    def _moved(
        self, counts: jax.Array, sums: jax.Array, z: jax.Array, index: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Counts and sums after a batch z [n, d]; as they were if nothing of it is valid."""
        chosen = jax.nn.one_hot(index, self.size) * valid[:, None]
        data = jnp.where(valid[:, None], z, 0.0)
        # A count of next to nothing stays: the quotient of two zeros would be another vector.
        kept = jnp.clip(_NOTHING / counts, self.decay, 1.0)
        new_counts = kept * counts + (1 - self.decay) * chosen.sum(0)
        new_sums = kept[:, None] * sums + (1 - self.decay) * chosen.T @ data
        if self.restart_below:
            mean = new_counts.mean()
            dead = new_counts < self.restart_below * mean
            # Valid rows first, in random order, each at most once as long as there are enough.
            order = jax.random.uniform(self.make_rng("codebook"), (len(z),)) + 2 * ~valid
            row = (jnp.cumsum(dead) - 1) % jnp.maximum(valid.sum(), 1)
            fresh = mean * data[jnp.argsort(order)[row]]
            new_counts = jnp.where(dead, mean, new_counts)
            new_sums = jnp.where(dead[:, None], fresh, new_sums)
        some = valid.any()
        return jnp.where(some, new_counts, counts), jnp.where(some, new_sums, sums)


class FiniteScalarQuantizer(nn.Module):
    """Each channel is bounded and rounded to one of a few levels; there is nothing to learn.

    F. Mentzer et al., https://arxiv.org/abs/2309.15505, section 3.1 and appendix A.1: where the
    number of levels is even, a shift keeps 0 about where it is. Codes are in [-1, 1]; index 0 has
    all channels at their lowest, and the first channel counts fastest.

    Attributes:
      levels: of each channel, 2 to 1000; the paper's (8, 5, 5, 5) are 1,000 codes.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self):
        if not isinstance(self.levels, Sequence) or isinstance(self.levels, str):
            raise InputError(
                f"FiniteScalarQuantizer: levels is {self.levels!r}; it must be a number for each "
                "channel, such as (8, 5, 5, 5)"
            )
        object.__setattr__(self, "levels", tuple(self.levels))
        check_at_least(self, levels=2)
        if max(self.levels) > 1000:  # the outermost would be beyond what the bound leaves
            raise InputError(
                f"FiniteScalarQuantizer: levels is {self.levels}; each can be at most 1000"
            )
        if self.size > 2**31:
            raise InputError(
                f"FiniteScalarQuantizer: levels {self.levels} make {self.size} codes; an index has "
                "31 bits"
            )
        super().__post_init__()

    @property
    def size(self) -> int:
        """The number of codes."""
        return math.prod(self.levels)

    @nn.compact
    def __call__(self, z: jax.Array, valid: jax.Array, *, train: bool = False) -> Quantized:
        """Quantizes z [b, ..., len(levels)]; the loss is 0."""
        if z.shape[-1] != len(self.levels):
            raise InputError(
                f"FiniteScalarQuantizer: levels {self.levels} are {len(self.levels)} channels, but "
                f"the encoder gives {z.shape[-1]}"
            )
        levels = jnp.array(self.levels)
        # Bounded so that rounding gives the levels -(L // 2) .. (L - 1) // 2 and no others.
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = jnp.where(levels % 2, 0.0, 0.5)
        bounded = jnp.tanh(z + jnp.tan(offset / half)) * half - offset
        level = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        digits = jnp.round(bounded).astype(jnp.int32) + levels // 2
        index = jnp.sum(digits * self._place_values, axis=-1)
        return Quantized(level / (levels // 2), index, jnp.zeros(len(z)))

    @nn.nowrap
    def vectors(self, variables: dict, indices: jax.Array) -> jax.Array:
        """The codes [..., len(levels)] of indices [...]; `variables` are none."""
        levels = jnp.array(self.levels)
        digits = indices[..., None] // self._place_values % levels
        return (digits - levels // 2) / (levels // 2)

    @property
    def _place_values(self) -> jax.Array:
        return jnp.array([math.prod(self.levels[:i]) for i in range(len(self.levels))])


Quantizer = VectorQuantizer | FiniteScalarQuantizer


def nearest(z: jax.Array, vectors: jax.Array) -> jax.Array:
    """The index, int32 [n], of the vector [k, d] nearest to each z [n, d]; of equals the first."""
    # Their distances are those from anywhere; far from 0 the squares would leave none of them.
    middle = vectors.mean(axis=0)
    z, vectors = z - middle, vectors - middle
    product = jnp.matmul(z, vectors.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(vectors**2, axis=-1) - 2 * product, axis=-1)


def perplexity(indices: jax.Array, valid: jax.Array, size: int) -> jax.Array:
    """exp(entropy) of how often each of `size` codes occurs in the valid rows of indices [b, ...].

    Between 1 and `size`: as many codes, equally often used, are worth as much. Without any it is 1.
    """
    rows = valid.reshape(len(valid), *[1] * (indices.ndim - 1))
    flat = jnp.where(rows, indices, size).reshape(-1)
    count = jnp.bincount(flat, length=size + 1)[:size]
    share = count / jnp.maximum(count.sum(), 1)
    return jnp.exp(jax.scipy.special.entr(share).sum())


def _quotient(sums: jax.Array, counts: jax.Array) -> jax.Array:
    return sums / jnp.maximum(counts, jnp.finfo(jnp.float32).tiny)[:, None]
