"""Super-resolution: the stages of a cascade after the first, each of which makes images larger.

J. Ho et al.: Cascaded Diffusion Models (https://arxiv.org/abs/2106.15282).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cvjax import draw
from cvjax.checks import check_at_least, check_unit
from cvjax.diffusion.task import Diffusion
from cvjax.errors import InputError
from cvjax.train.state import Params, PyTree
from cvjax.train.task import Batch, example_keys


@dataclass(frozen=True)
class SuperResolution(Diffusion):
    """Large images for small ones, and for what the stage before was asked: a class, or none.

    A batch is as of `Diffusion`; the small image is made of the large one, by the mean over squares
    of pixels. In training noise of a random strength is added to it, so that the network forgives
    the faults of the stage before it: noise conditioning augmentation (section 4.2). The network
    sees the noisy image, the small one scaled bilinearly, and the strength, as channels.

    A condition is {"asked": that of the stage before, a label [b], "low": float32 [b, h, w, c] in
    [-1, 1], "level": float32 [b]}; `condition` makes it.

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
        asked: jax.Array,
        low: jax.Array,
        level: float = 0.0,
        rng: jax.Array | None = None,
        first: int = 0,
    ) -> PyTree:
        """What `sample` takes, for small images `low`, [b, h, w, c] in [0, 1].

        `asked` are the labels [b], of which, without classes, none is looked at; of a stage after
        another kind what that one was asked.
        `level` in [0, `augmentation`] says how faulty these are: noise of so large a standard
        deviation hides it, as in training, and is drawn for row i from `fold_in(rng, first + i)`.

        Raises InputError for another level, for one above 0 without an `rng`, and for images of
        another shape, that are no floats or, outside of jit, not in [0, 1].
        """
        if not 0 <= level <= self.augmentation:
            raise InputError(f"level is {level}; it must be in [0, {self.augmentation}]")
        height, width, channels = self.image_shape
        expected = (len(asked), height // self.factor, width // self.factor, channels)
        if low.shape != expected:
            raise InputError(f"small images are {list(low.shape)}; they must be {list(expected)}")
        check_unit(low)
        low = 2 * low - 1
        if level:
            if rng is None:
                raise InputError(f"level is {level}: give an rng for its noise")
            keys = example_keys(rng, len(low), first)
            low += level * jax.vmap(lambda key: jax.random.normal(key, low.shape[1:]))(keys)
        level = jnp.full(len(asked), level, jnp.float32)
        return {"asked": jnp.asarray(asked), "low": low, "level": level}

    def bilinear(self, low: jax.Array) -> jax.Array:
        """Images [b, h, w, c], `factor` times larger: what is there without an upsampler."""
        batch, height, width, channels = low.shape
        shape = (batch, height * self.factor, width * self.factor, channels)
        return jax.image.resize(low, shape, "linear")

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns "sample" and "bilinear", both [b, h, w, c] in [0, 1], and labels, if told."""
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
        return {"samples": draw.tiled(jnp.concatenate(rows), len(few["image"]))}

    def _clean(self, batch: Batch) -> tuple[jax.Array, PyTree]:
        image, asked = super()._clean(batch)
        b, h, w, c = image.shape
        squares = image.reshape(b, h // self.factor, self.factor, w // self.factor, self.factor, c)
        return image, {
            "asked": asked,
            "low": jnp.mean(squares, axis=(2, 4)),
            "level": jnp.zeros(b),
        }

    def _null(self, condition: PyTree) -> PyTree:
        return {**condition, "asked": super()._null(condition["asked"])}

    def _checked(self, condition: PyTree) -> PyTree:
        return {**condition, "asked": super()._checked(condition["asked"])}

    def _dropped(self, condition: PyTree, rng: jax.Array) -> PyTree:
        drop_rng, level_rng, noise_rng = jax.random.split(rng, 3)
        condition, low = super()._dropped(condition, drop_rng), condition["low"]
        level = self.augmentation * jax.random.uniform(level_rng, condition["level"].shape)
        noise = level[:, None, None, None] * jax.random.normal(noise_rng, low.shape)
        return {**condition, "low": low + noise, "level": level}

    def _inputs(self, x: jax.Array, t: jax.Array, condition: PyTree) -> tuple[PyTree, ...]:
        level = jnp.broadcast_to(condition["level"][:, None, None, None], (*x.shape[:3], 1))
        seen = jnp.concatenate([x, self.bilinear(condition["low"]), level], axis=-1)
        return seen, t, condition["asked"]
