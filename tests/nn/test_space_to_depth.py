"""Squares of pixels as channels: a round trip, and by loops."""

import jax.numpy as jnp
import numpy as np

from cvjax.nn.space_to_depth import depth_to_space, space_to_depth


def test_depth_and_space():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = space_to_depth(x, 2)
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(y, 2), x)


def test_depth_to_space_by_loops():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    y = depth_to_space(jnp.asarray(x), 2)
    for i in range(4):
        for j in range(6):
            square = x[0, i // 2, j // 2].reshape(2, 2, 2)
            np.testing.assert_array_equal(y[0, i, j], square[i % 2, j % 2])
