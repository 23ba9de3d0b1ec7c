from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.nn.bilinear import resize_bilinear

SIZES = {  # before and after
    "four times": ((3, 4), (12, 16)),
    "one pixel": ((1, 1), (5, 3)),
    "no whole number": ((5, 7), (9, 8)),
    "one axis": ((2, 3), (2, 7)),
    "smaller": ((7, 9), (3, 4)),
    "twice": ((5, 6), (10, 12)),
    "three times and once": ((4, 5), (12, 5)),
    "one whole number": ((4, 5), (9, 10)),
    "one row": ((1, 6), (2, 24)),
    "the same": ((4, 5), (4, 5)),
}


def slow_resize(image, height, width):
    """Each pixel from its four neighbours; beyond the border the edge goes on."""
    h, w = image.shape[:2]
    result = np.zeros((height, width, image.shape[2]))
    for y, x in np.ndindex(height, width):
        v = min(max((y + 0.5) * h / height - 0.5, 0), h - 1)
        u = min(max((x + 0.5) * w / width - 0.5, 0), w - 1)
        top, left = int(v), int(u)
        bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
        a, b = v - top, u - left
        result[y, x] = (1 - a) * ((1 - b) * image[top, left] + b * image[top, right]) + a * (
            (1 - b) * image[bottom, left] + b * image[bottom, right]
        )
    return result


@pytest.mark.parametrize("name", SIZES)
def test_half_pixel_centres(name):
    before, after = SIZES[name]
    image = np.random.default_rng(0).normal(size=(2, *before, 3)).astype(np.float32)
    found = jax.jit(partial(resize_bilinear, height=after[0], width=after[1]))(image)
    expected = np.stack([slow_resize(one.astype(np.float64), *after) for one in image])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert resize_bilinear(jnp.bfloat16(image), *after).dtype == jnp.bfloat16


def test_the_numbers_of_torch():
    # torch.nn.functional.interpolate(x, size=(3, 5), mode="bilinear", align_corners=False)
    image = np.array([[0.0, 1.0], [10.0, 20.0]], np.float32)[None, ..., None]
    expected = [[0.0, 0.1, 0.5, 0.9, 1.0], [5.0, 5.55, 7.75, 9.95, 10.5], [10, 11, 15, 19, 20]]
    np.testing.assert_allclose(resize_bilinear(image, 3, 5)[0, ..., 0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["twice", "three times and once", "one pixel", "one row"])
def test_derivatives_are_those_of_the_matrix(name):
    """The map is linear: its matrix is known from the slow one, column by column."""
    before, after = SIZES[name]
    resize = partial(resize_bilinear, height=after[0], width=after[1])
    size = before[0] * before[1]
    columns = np.eye(size).reshape(size, *before, 1)
    matrix = np.stack([slow_resize(one, *after).ravel() for one in columns], 1)
    rng = np.random.default_rng(0)
    x, dx, dy = (rng.normal(size=(2, *s, 3)).astype(np.float32) for s in (before, before, after))

    @jax.jit
    def all_of(x, dx, dy):
        y, pull = jax.vjp(resize, x)
        energy = lambda x: jnp.sum(resize(x) ** 2)  # noqa: E731
        mapped = jax.vmap(resize, in_axes=1, out_axes=1)(jnp.stack([x, dx], 1))
        along = jax.jvp(resize, (x,), (dx,))[1]
        return y, pull(dy)[0], along, mapped, jax.jvp(jax.grad(energy), (x,), (dx,))[1]

    def flat(x):
        return x.reshape(2, -1, 3)

    y, gradient, along, mapped, second = jax.device_get(all_of(x, dx, dy))
    # Sums of at most 16 float32 of order one.
    close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    close(flat(y), matrix @ flat(x))
    close(flat(gradient), matrix.T @ flat(dy))
    close(flat(along), matrix @ flat(dx))
    close(mapped, np.stack([y, along], 1))
    close(flat(second), 2 * matrix.T @ (matrix @ flat(dx)))


def test_what_is_not_finite_stays_where_it_is():
    image = np.zeros((1, 8, 8, 1), np.float32)
    image[0, 3, 3] = np.inf
    found = np.asarray(resize_bilinear(image, 16, 16))
    assert np.isfinite(found).sum() == 16 * 16 - 16 and not np.isnan(found).any()
