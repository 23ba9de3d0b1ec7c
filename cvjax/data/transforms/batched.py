"""Augmentation of a whole batch on the device, inside jit: `transform(images, rng) -> images`.

Images are float [b, h, w, c], in any range; each is changed by numbers of its own. These are the
functions of the same names for one example on the processor, but for what is tied to pixels: they
are for labels of whole images. Settings are static.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cvjax.checks import check_between, check_count, check_range
from cvjax.data.transforms.fields import mirror_index
from cvjax.errors import InputError


def in_order(
    images: jax.Array, rng: jax.Array, **transforms: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Applies several transforms, one after the other, each with a key of its own."""
    for number, transform in enumerate(transforms.values()):
        images = transform(images, jax.random.fold_in(rng, number))
    return images


def random_flip(images: jax.Array, rng: jax.Array, *, p: float = 0.5) -> jax.Array:
    """Mirrors left and right, each image with probability p."""
    check_between(0, 1, p=p)
    is_flipped = jax.random.bernoulli(rng, p, (len(images), 1, 1, 1))
    return jnp.where(is_flipped, images[:, :, ::-1], images)


def random_vertical_flip(images: jax.Array, rng: jax.Array, *, p: float = 0.5) -> jax.Array:
    """Mirrors top and bottom, each image with probability p."""
    check_between(0, 1, p=p)
    is_flipped = jax.random.bernoulli(rng, p, (len(images), 1, 1, 1))
    return jnp.where(is_flipped, images[:, ::-1], images)


def random_crop(
    images: jax.Array, rng: jax.Array, *, padding: int = 4, fill: float | str = "reflect"
) -> jax.Array:
    """Moves each image by up to `padding` pixels along each axis.

    What comes into view is its mirror image, or, where `fill` is a number, that.
    """
    check_count(0, padding=padding)
    if isinstance(fill, str) and fill != "reflect":
        raise InputError(f"fill is {fill!r}; it must be a number or 'reflect'")
    images = jnp.asarray(images)
    batch, height, width, _ = images.shape
    move = jax.random.randint(rng, (2, batch, 1), -padding, padding + 1)
    rows, columns = jnp.arange(height) + move[0], jnp.arange(width) + move[1]
    moved = jax.vmap(lambda image, row, column: image[row][:, column])(
        images, mirror_index(rows, height), mirror_index(columns, width)
    )
    if fill == "reflect":
        return moved
    is_row, is_column = ((0 <= i) & (i < n) for i, n in ((rows, height), (columns, width)))
    return jnp.where((is_row[:, :, None] & is_column[:, None, :])[..., None], moved, fill)


def cutout(images: jax.Array, rng: jax.Array, *, size: int = 16, fill: float = 0.0) -> jax.Array:
    """Covers a square of each image; its middle is any pixel, its parts outside are lost."""
    check_count(1, size=size)
    batch, height, width, _ = images.shape
    row, column = jax.random.split(rng)
    top = jax.random.randint(row, (batch,), 0, height) - size // 2
    left = jax.random.randint(column, (batch,), 0, width) - size // 2
    is_covered = rectangles(height, width, top, left, top + size, left + size)
    return jnp.where(is_covered[..., None], fill, images)


def random_erasing(
    images: jax.Array,
    rng: jax.Array,
    *,
    p: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    fill: float | str = 0.0,
) -> jax.Array:
    """Covers a rectangle inside each image with probability p.

    The distribution is that of `erasing.random_erasing`. `fill` is a number, or "noise": normal
    with mean 0 and standard deviation 1, for images that are normalized.
    """
    check_between(0, 1, p=p)
    check_range(0, 1, scale=scale)
    check_range(1e-3, 1e3, ratio=ratio)
    if isinstance(fill, str) and fill != "noise":
        raise InputError(f"fill is {fill!r}; it must be a number or 'noise'")
    batch, height, width, _ = images.shape
    keys = jax.random.split(rng, 6)
    attempts = (10, batch)
    area = height * width * jax.random.uniform(keys[0], attempts, minval=scale[0], maxval=scale[1])
    low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
    aspect = jnp.exp(jax.random.uniform(keys[1], attempts, minval=low, maxval=high))
    tall = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (0 < tall) & (tall < height) & (0 < wide) & (wide < width)
    first = jnp.argmax(fits, axis=0)[None]
    tall, wide = (jnp.take_along_axis(size, first, axis=0)[0] for size in (tall, wide))
    top = jax.random.randint(keys[2], (batch,), 0, jnp.maximum(height - tall, 0) + 1)
    left = jax.random.randint(keys[3], (batch,), 0, jnp.maximum(width - wide, 0) + 1)
    is_covered = rectangles(height, width, top, left, top + tall, left + wide)
    is_chosen = jax.random.bernoulli(keys[4], p, (batch,)) & fits.any(axis=0)
    cover = jax.random.normal(keys[5], images.shape, images.dtype) if fill == "noise" else fill
    return jnp.where((is_covered & is_chosen[:, None, None])[..., None], cover, images)


def rectangles(
    height: int, width: int, top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array
) -> jax.Array:
    """Returns bool [b, height, width]: True from top and left to before bottom and right, [b]."""
    rows, columns = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
    top, left, bottom, right = (x[:, None, None] for x in (top, left, bottom, right))
    return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
