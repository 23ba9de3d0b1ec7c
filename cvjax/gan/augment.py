"""DiffAugment: the discriminator sees real and generated images through the same random changes.

S. Zhao et al., https://arxiv.org/abs/2006.10738. All are differentiable in the image.
"""

import jax
import jax.numpy as jnp

from cvjax.errors import InputError


def diff_augment(
    image: jax.Array,
    rng: jax.Array,
    *,
    translation: float = 0.125,
    cutout: float = 0.0,
    brightness: float = 0.0,
    saturation: float = 0.0,
    contrast: float = 0.0,
) -> jax.Array:
    """Moves, cuts and tints images [b, h, w, c], each its own way.

    Args:
      image: any range; what comes in from outside is 0.
      rng: the row i depends on `fold_in(rng, i)` alone.
      translation: the largest shift, as a part of height and width.
      cutout: the side of the square that is set to 0, as a part of height and width.
      brightness: the largest amount that is added to or taken from the whole image.
      saturation, contrast: the distances of a pixel's channels from their mean, and of all pixels
        from the mean of the image, are multiplied by a number up to so far from 1.
    """
    settings = dict(translation=translation, cutout=cutout, brightness=brightness,
                    saturation=saturation, contrast=contrast)  # fmt: skip
    for name, value in settings.items():
        most = 1.0 if name in ("translation", "cutout") else float("inf")
        if not 0 <= value <= most:
            raise InputError(f"diff_augment: {name} is {value}; it must be in [0, {most:g}]")
    height, width = image.shape[1:3]

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        light, move, hole = jax.random.split(key, 3)
        amount = jax.random.uniform(light, (3,), minval=-1.0)
        image = image + brightness * amount[0]
        for change, axis in ((saturation * amount[1], -1), (contrast * amount[2], None)):
            middle = image.mean(axis, keepdims=True)
            image = middle + (1 + change) * (image - middle)
        reach = jnp.array([round(height * translation), round(width * translation)])
        shift = jax.random.randint(move, (2,), -reach, reach + 1)
        rows, columns = jnp.arange(height) - shift[0], jnp.arange(width) - shift[1]
        inside = _between(rows, 0, height)[:, None] & _between(columns, 0, width)
        image = image[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
        image = jnp.where(inside[..., None], image, 0.0)
        side = jnp.array([round(height * cutout), round(width * cutout)])
        corner = jax.random.randint(hole, (2,), 0, jnp.array([height, width]) - side + 1)
        rows = _between(jnp.arange(height), corner[0], corner[0] + side[0])
        columns = _between(jnp.arange(width), corner[1], corner[1] + side[1])
        return jnp.where((rows[:, None] & columns)[..., None], 0.0, image)

    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(len(image)))
    return jax.vmap(one)(image, keys)


def _between(x: jax.Array, low: jax.Array | int, high: jax.Array | int) -> jax.Array:
    return (x >= low) & (x < high)
