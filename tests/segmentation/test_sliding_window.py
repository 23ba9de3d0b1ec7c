"""Sliding windows against a sum over every pixel and window, written out."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.segmentation.sliding_window import _starts, sliding_window


def positions(images):
    """Logits that say where in its window a pixel is, and what is in it."""
    n, h, w, _ = images.shape
    rows = jnp.broadcast_to(jnp.arange(h)[None, :, None], (n, h, w))
    columns = jnp.broadcast_to(jnp.arange(w)[None, None, :], (n, h, w))
    return jnp.stack([rows, columns, images[..., 0]], axis=-1)


def slow(image, window, overlap):
    height, width = image.shape[:2]
    result = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            seen = [
                (y - top, x - left, image[y, x, 0])
                for top in _starts(max(height, window[0]), window[0], overlap)
                for left in _starts(max(width, window[1]), window[1], overlap)
                if 0 <= y - top < window[0] and 0 <= x - left < window[1]
            ]
            result[y, x] = np.mean(seen, axis=0)
    return result


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (5, 9), (13, 4), (13, 11), (3, 17), (10, 8)])
def test_every_pixel_is_the_mean_of_the_windows_that_see_it(size, overlap):
    image = np.random.default_rng(0).uniform(size=(*size, 2)).astype(np.float32)
    found = sliding_window(positions, image, window=(5, 4), overlap=overlap, batch_size=3)
    assert found.shape == (*size, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, slow(image, (5, 4), overlap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.99])
def test_windows_reach_both_ends_and_leave_no_gap(overlap):
    for window in (1, 2, 7):
        for side in range(window, 30):
            starts = _starts(side, window, overlap)
            assert starts[0] == 0 and starts[-1] == side - window
            assert starts == sorted(set(starts))
            assert all(b - a <= window for a, b in itertools.pairwise(starts))


def test_the_next_window_sees_again_as_much_as_asked_for():
    for window in (10, 500):
        for tenths in range(10):
            step = _starts(3 * window, window, tenths / 10)[1]
            assert step == max(1, window * (10 - tenths) // 10)


def test_a_small_image_goes_on_as_its_edge():
    seen = []

    def look(images):
        seen.append(images.shape)
        return images

    image = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    found = sliding_window(look, image, window=4, batch_size=1)
    np.testing.assert_array_equal(found, image)
    mean = sliding_window(
        lambda x: jnp.broadcast_to(jnp.mean(x, (1, 2), keepdims=True), x.shape), image, window=4
    )
    np.testing.assert_allclose(mean, np.pad(image, ((0, 2), (0, 1), (0, 0)), "edge").mean())


def test_one_program_serves_all_sizes():
    traced = []

    def logits(images, scale):
        traced.append(images.shape)
        return scale * images

    one = functools.partial(logits, scale=2.0)
    for size in ((3, 4), (8, 8), (20, 9), (9, 31)):
        image = np.ones((*size, 1), np.float32)
        np.testing.assert_array_equal(sliding_window(one, image, window=8, batch_size=4), 2)
    assert traced == [(4, 8, 8, 1)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window is 0; it must"),
        ({"window": (4, 4, 4)}, "window is "),
        ({"window": 4.0}, "window is 4.0; it must"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"overlap": -0.1}, "overlap is"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image": np.ones((4, 4))}, r"image is \[4, 4\]"),
        ({"image": np.ones((0, 4, 1))}, r"image is \[0, 4, 1\]"),
    ],
)
def test_what_cannot_be_done(change, message):
    arguments = {"image": np.ones((4, 4, 1)), "window": 4, **change}
    with pytest.raises(InputError, match=message):
        sliding_window(lambda x: x, **arguments)
