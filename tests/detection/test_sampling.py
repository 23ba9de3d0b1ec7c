"""Samples of a fixed number: what they are, how many, how often, and whose lot matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection.assigners import Assignment
from cvjax.detection.sampling import foreground_rows, sample
from cvjax.errors import InputError

# Of ten candidates three have an object, two count nowhere.
FOREGROUND = np.array([0, 1, 0, 0, 1, 0, 1, 0, 0, 0], bool)
WEIGHT = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1], np.float32)
INDEX = np.array([0, 2, 0, 0, 1, 0, 2, 0, 0, 0], np.int32)
BOXES = np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.fixture(scope="module")
def draw():
    @functools.partial(jax.jit, static_argnames=("count", "fraction"))
    def draw(keys, foreground, weight, count, fraction):
        index = jnp.where(foreground, jnp.asarray(INDEX)[: len(foreground)], 0)
        assignment, boxes = Assignment(index, foreground, weight), BOXES[: len(foreground)]
        return jax.vmap(lambda key: sample(key, boxes, assignment, count=count, fraction=fraction))(
            keys
        )

    return draw


@pytest.mark.parametrize("count, fraction, objects, background", [
    (4, 0.5, 2, 2), (4, 0.25, 1, 3), (4, 1.0, 3, 1), (4, 0.0, 0, 4), (6, 0.5, 3, 3),
    (10, 0.5, 3, 5), (50, 1.0, 3, 5),
])  # fmt: skip
def test_the_number_of_each_kind_and_that_all_are_drawn_alike(
    draw, count, fraction, objects, background
):
    keys = jax.random.split(jax.random.key(0), 2000)
    found = jax.tree.map(np.asarray, draw(keys, FOREGROUND, WEIGHT, count=count, fraction=fraction))
    size = min(count, 10)
    assert found.rows.shape == (2000, size) and found.boxes.shape == (2000, size, 4)
    expected = np.arange(size)[None] < [[objects]]
    np.testing.assert_array_equal(found.foreground, np.broadcast_to(expected, (2000, size)))
    expected = np.arange(size)[None] < [[objects + background]]
    np.testing.assert_array_equal(found.valid, np.broadcast_to(expected, (2000, size)))
    np.testing.assert_array_equal(found.boxes, BOXES[found.rows])
    np.testing.assert_array_equal(found.index, np.where(found.foreground, INDEX[found.rows], 0))
    np.testing.assert_array_equal(found.rows[~found.valid], 0)
    drawn = np.where(found.valid, found.rows, 10)
    often = np.zeros(11)
    np.add.at(often, drawn, 1)
    assert all(len(set(row[valid])) == valid.sum() for row, valid in zip(drawn, found.valid))  # noqa: B905
    kinds = {"object": FOREGROUND, "background": ~FOREGROUND & (WEIGHT > 0)}
    for kind, number in zip(kinds.values(), (objects, background), strict=True):
        share = number / kind.sum()
        # Five standard deviations of 2000 draws.
        np.testing.assert_allclose(
            often[:10][kind] / 2000, share, atol=5 * np.sqrt(share * (1 - share) / 2000) + 1e-9
        )
    assert often[:10][WEIGHT == 0].sum() == 0


def test_the_same_key_draws_the_same_whatever_rows_of_padding_follow(draw):
    keys = jax.random.split(jax.random.key(7), 3)
    padded = [np.append(x[:8], np.zeros(2, x.dtype)) for x in (FOREGROUND, WEIGHT)]
    long = draw(keys, *padded, count=4, fraction=0.5)
    short = draw(keys, FOREGROUND[:8], WEIGHT[:8], count=4, fraction=0.5)
    jax.tree.map(np.testing.assert_array_equal, long, short)
    again = draw(keys, FOREGROUND[:8], WEIGHT[:8], count=4, fraction=0.5)
    jax.tree.map(np.testing.assert_array_equal, again, short)
    assert len({tuple(rows) for rows in np.asarray(short.rows)}) > 1


def test_nobody_to_draw(draw):
    keys = jax.random.split(jax.random.key(0), 2)
    found = draw(keys, FOREGROUND, np.zeros(10, np.float32), count=4, fraction=0.5)
    assert not found.valid.any() and not found.foreground.any() and not found.rows.any()


def test_impossible_settings():
    assignment = Assignment(INDEX, FOREGROUND, WEIGHT)
    for count, fraction, name in ((0, 0.5, "count"), (4, 1.5, "fraction"), (4, -0.1, "fraction")):
        with pytest.raises(InputError, match=f"{name} is"):
            sample(jax.random.key(0), BOXES, assignment, count=count, fraction=fraction)


def test_at_most_the_fraction_has_an_object():
    assert [foreground_rows(count, 0.5) for count in (4, 5, 6, 7)] == [2, 2, 3, 3]
