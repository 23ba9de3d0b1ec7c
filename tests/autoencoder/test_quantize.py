"""Quantizers against loops, their gradients, the codebook's averages and restarts, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.autoencoder.evaluate import CodeUsage
from cvjax.autoencoder.quantize import (
    FiniteScalarQuantizer,
    VectorQuantizer,
    nearest,
    perplexity,
)
from cvjax.errors import InputError

ALL = np.ones(4, bool)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def book(vectors, counts):
    counts = np.asarray(counts, np.float32)
    return {"codebook": {"counts": counts, "sums": np.float32(vectors) * counts[:, None]}}


@functools.partial(jax.jit, static_argnums=0)
def compiled(quantizer, variables, indices):
    return quantizer.vectors(variables, indices)


def vectors_of(quantizer, variables, indices):
    return np.asarray(compiled(quantizer, variables, indices))


def test_the_nearest_is_that_of_loops_and_of_equals_the_first():
    z, vectors = draw(0, 50, 3), draw(1, 7, 3)
    vectors[5] = vectors[2]
    distance = [[float(((a - b) ** 2).sum()) for b in vectors] for a in z]
    found = np.asarray(jax.jit(nearest)(z, vectors))
    np.testing.assert_array_equal(found, np.argmin(distance, axis=1))
    assert 5 not in found and 2 in found


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_the_nearest_far_from_zero(offset):
    """Where the squares of float32 have no digits left for the distances."""
    z, vectors = offset + 0.1 * draw(0, 200, 8), offset + 0.1 * draw(1, 64, 8)
    distance = ((np.float64(z)[:, None] - np.float64(vectors)) ** 2).sum(-1)
    found = np.asarray(jax.jit(nearest)(z, vectors))
    taken = distance[np.arange(200), found]
    np.testing.assert_allclose(taken, distance.min(1), rtol=1e-4)  # ties of float32 may differ


def test_gradients_pass_straight_through_and_the_commitment_pulls_to_the_code():
    quantizer, z = VectorQuantizer(5, commitment=0.5), draw(0, 4, 2, 3)
    variables = book(draw(1, 5, 3), np.ones(5))
    target = draw(2, 4, 2, 3)

    def run(z):
        found = quantizer.apply(variables, z, ALL)
        return jnp.sum(found.z * target), found

    gradient, found = jax.tree.map(np.asarray, jax.jit(jax.grad(run, has_aux=True))(z))
    np.testing.assert_array_equal(gradient, target)
    vectors = variables["codebook"]["sums"]
    np.testing.assert_allclose(found.z, vectors[found.indices], atol=1e-6)
    said = vectors_of(quantizer, variables, found.indices)
    np.testing.assert_allclose(said, found.z, atol=1e-6)
    expected = 0.5 * ((z - found.z) ** 2).mean((1, 2))
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    pull = jax.jit(jax.grad(lambda z: quantizer.apply(variables, z, ALL).loss.sum()))(z)
    np.testing.assert_allclose(pull, 0.5 * 2 / 6 * (z - found.z), rtol=1e-4, atol=1e-7)


@functools.partial(jax.jit, static_argnums=0)
def moved(quantizer, variables, z, valid=ALL, seed=0):
    return quantizer.apply(
        variables, z, valid, train=True, mutable=["codebook"],
        rngs={"codebook": jax.random.key(seed)},
    )[1]["codebook"]  # fmt: skip


def test_dead_is_a_share_of_the_mean():
    quantizer = VectorQuantizer(4, decay=0.9, restart_below=0.1)
    codes = book([[0, 0], [100, 0], [200, 0], [300, 0]], [100, 100, 100, 1])
    new = moved(quantizer, codes, draw(0, 4, 4, 2))
    np.testing.assert_allclose(new["counts"][3], (0.9 * 301 + 0.1 * 16) / 4, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def applied(quantizer, variables, z, valid):
    return quantizer.apply(variables, z, valid)


def indices_of(*given):
    return np.asarray(applied(*given).indices)


def test_the_codebook_follows_the_means_of_what_comes_to_it():
    quantizer, z = VectorQuantizer(3, decay=0.9, restart_below=0.0), draw(0, 4, 5, 2)
    variables = book(draw(1, 3, 2), [4.0, 5.0, 6.0])
    valid = np.array([True, False, True, True])
    holed = np.where(valid[:, None, None], z, np.nan)
    new = jax.tree.map(np.asarray, moved(quantizer, variables, holed, valid))
    index = indices_of(quantizer, variables, z, ALL)
    for code in range(3):
        mine = np.concatenate([z[b][index[b] == code] for b in (0, 2, 3)])
        count = 0.9 * variables["codebook"]["counts"][code] + 0.1 * len(mine)
        total = 0.9 * variables["codebook"]["sums"][code] + 0.1 * mine.sum(0)
        np.testing.assert_allclose(new["counts"][code], count, rtol=1e-5)
        np.testing.assert_allclose(new["sums"][code], total, rtol=1e-4, atol=1e-6)
    # Nothing valid, and evaluation: nothing moves.
    still = moved(quantizer, variables, z, ~ALL)
    jax.tree.map(np.testing.assert_array_equal, still, variables["codebook"])
    # With the same data the vectors end at the means of their cells (k-means).
    step = lambda variables: {"codebook": moved(quantizer, variables, z)}  # noqa: E731
    for _ in range(200):
        variables = step(variables)
    index = indices_of(quantizer, variables, z, ALL)
    vectors = vectors_of(quantizer, variables, np.arange(3))
    for code in np.unique(index):
        np.testing.assert_allclose(vectors[code], z[index == code].mean(0), atol=1e-4)


def test_an_unused_code_stays_where_it_is_without_restarts():
    codes = book([[1.0, 2], [3, 4], [5, 6]], [1, 0.5, 1e-5])
    for decay in (0.0, 0.5):
        quantizer, variables = VectorQuantizer(3, decay=decay, restart_below=0.0), codes
        for _ in range(160):  # 0.5^160 is no float32
            variables = {"codebook": moved(quantizer, variables, np.ones((4, 1, 2), np.float32))}
        vectors = vectors_of(quantizer, variables, np.arange(3))
        np.testing.assert_allclose(vectors, [[1, 1], [3, 4], [5, 6]], rtol=1e-5)


def test_dead_codes_begin_anew_on_valid_data_each_on_its_own():
    quantizer = VectorQuantizer(4, decay=0.9, restart_below=0.1)
    variables = book([[0.0, 0], [100, 0], [200, 0], [300, 0]], [10, 10, 0.01, 0.01])
    z = np.concatenate([draw(0, 3, 4, 2), np.full((1, 4, 2), 250.0, np.float32)])
    valid = np.array([True, True, True, False])
    new = jax.tree.map(np.asarray, moved(quantizer, variables, z, valid))
    vectors = vectors_of(quantizer, {"codebook": new}, np.arange(4))
    data = z[:3].reshape(-1, 2)
    rows = [np.abs(data - vectors[code]).sum(1).argmin() for code in (2, 3)]
    np.testing.assert_allclose(vectors[2:], data[rows], rtol=1e-5)
    assert rows[0] != rows[1]
    # Two dead codes, whose numbers differ by the number of vectors.
    sparse = book(100 * draw(1, 9, 2), [0.01, *[10] * 7, 0.01])
    apart = moved(quantizer.clone(size=9), sparse, z[:, :2])
    assert not np.allclose(apart["sums"][0], apart["sums"][8])
    # As many as they would have if all were used alike, before they were restarted.
    old = 0.9 * np.array([10, 10, 0.01, 0.01]) + 0.1 * np.array([12, 0, 0, 0])
    np.testing.assert_allclose(new["counts"][2:], old.mean(), rtol=1e-5)
    np.testing.assert_allclose(vectors[1], [100, 0], rtol=1e-5)
    other = {"codebook": moved(quantizer, variables, z, valid, 1)}
    other = vectors_of(quantizer, other, np.arange(4))
    assert not np.allclose(other[2:], vectors[2:])
    # Fewer valid vectors than dead codes: some are shared, none is invented.
    few = moved(quantizer, book(200 + draw(3, 4, 2), [0.0] * 4), z[:1, :1].repeat(4, 0), ALL)
    few = jax.tree.map(np.asarray, few)
    np.testing.assert_allclose(few["sums"] / few["counts"][:, None], z[0, :1].repeat(4, 0))


def test_a_new_codebook_begins_with_data():
    quantizer, z = VectorQuantizer(8), 50 + draw(0, 4, 9, 2)
    variables = jax.jit(quantizer.init)(jax.random.key(0), z, ALL)
    assert set(variables) == {"codebook"}
    new = {"codebook": moved(quantizer, variables, z)}
    vectors = vectors_of(quantizer, new, np.arange(8))
    assert np.abs(vectors - 50).max() < 5
    assert len(np.unique(indices_of(quantizer, new, z, ALL))) >= 7


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 5, 4)])
def test_indices_of_finite_scalars_are_a_round_trip(levels):
    quantizer = FiniteScalarQuantizer(levels)
    assert quantizer.size == np.prod(levels)
    every = np.arange(quantizer.size)
    codes = vectors_of(quantizer, {}, every)
    assert len(np.unique(codes, axis=0)) == quantizer.size
    assert codes.min() == -1 and codes.max() <= 1
    # What the codes are made from, put through again: any z that is bounded to this level.
    half = np.array(levels) // 2
    offset = np.array([0.0 if n % 2 else 0.5 for n in levels])
    scale = (np.array(levels) - 1) * (1 - 1e-3) / 2
    inside = np.clip((codes * half + offset) / scale, -1 + 1e-4, 1 - 1e-4)
    z = np.arctanh(inside) - np.tan(offset / scale)
    found = applied(quantizer, {}, np.float32(z), np.ones(len(z), bool))
    np.testing.assert_array_equal(found.indices, every)
    np.testing.assert_allclose(found.z, codes, atol=1e-6)
    # Huge values are the outermost levels, and 0 is 0.
    ends = np.stack([np.full(len(levels), v, np.float32) for v in (-1e4, 1e4, 0.0)])
    found = jax.tree.map(np.asarray, applied(quantizer, {}, ends, np.ones(3, bool)))
    assert list(found.indices[:2]) == [0, quantizer.size - 1]
    np.testing.assert_allclose(found.z[2], 0, atol=1e-6)


def test_the_gradient_of_finite_scalars_is_that_of_the_bound():
    quantizer, z = FiniteScalarQuantizer((5, 4)), draw(0, 4, 2)
    derive = jax.jacobian(lambda z: quantizer.apply({}, z[None], ALL[:1]).z[0])
    found = jax.jit(jax.vmap(derive))(z)
    scale, offset = np.array([4, 3]) * 0.999 / 2, np.array([0, 0.5])
    slope = scale * (1 - np.tanh(np.asarray(z) + np.tan(offset / scale)) ** 2) / 2
    np.testing.assert_allclose(found, [np.diag(row) for row in slope], rtol=1e-4, atol=1e-7)


def test_perplexity_and_usage_count_valid_rows_alone():
    indices = np.array([[0, 1], [2, 3], [3, 3]])
    valid = np.array([True, True, False])
    spread = jax.jit(perplexity, static_argnums=2)
    assert spread(indices, valid, 8) == pytest.approx(4, rel=1e-6)
    assert spread(indices, ~valid, 8) == pytest.approx(1, rel=1e-6)
    assert spread(indices, valid & ~valid, 8) == 1
    usage = CodeUsage(8)
    assert usage.result() == {"codes_used": 0, "code_perplexity": 1}
    usage.add({"indices": indices}, {"valid": valid})
    usage.add({"indices": indices}, {"valid": ~valid})
    share = np.array([1, 1, 1, 3]) / 6
    expected = np.exp(-(share * np.log(share)).sum())
    assert usage.result() == {
        "codes_used": 4, "code_perplexity": pytest.approx(expected),
    }  # fmt: skip
    bars = usage.pictures()["codes"][..., 0]
    assert bars.shape == (64, 32) and set(np.unique(bars)) == {0, 1}
    assert list(bars[:, 1::4].sum(0)) == [64, 21, 21, 21, 0, 0, 0, 0]


def test_what_cannot_be_is_said():
    for fields, message in (
        (dict(size=0), "size is 0"),
        (dict(decay=1.0), "decay is 1.0; it must be in"),
        (dict(commitment=-1.0), "commitment is -1.0"),
        (dict(restart_below=-1.0), "restart_below is -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            VectorQuantizer(**fields)
    with pytest.raises(InputError, match=r"decay is 'a'; it must be a number"):
        VectorQuantizer(decay="a")
    with pytest.raises(InputError, match=r"levels is \(3, 1001\); each can be at most 1000"):
        FiniteScalarQuantizer((3, 1001))
    with pytest.raises(InputError, match="levels is 8; it must be a number for each channel"):
        FiniteScalarQuantizer(8)
    with pytest.raises(InputError, match="; it must be at least 2"):
        FiniteScalarQuantizer((3, 1))
    with pytest.raises(InputError, match="make 4294967296 codes; an index has 31 bits"):
        FiniteScalarQuantizer((8,) * 10 + (4,))
    with pytest.raises(InputError, match="are 2 channels, but the encoder gives 3"):
        FiniteScalarQuantizer((3, 3)).apply({}, jnp.zeros((1, 3)), ALL[:1])
    with pytest.raises(InputError, match="predicts latent; prediction='indices' is not among"):
        CodeUsage(9).add({"latent": np.zeros((1, 2))}, {"valid": np.ones(1, bool)})
    with pytest.raises(InputError, match="codes from 0 to 9"):
        CodeUsage(9).add({"indices": np.array([[0, 9]])}, {"valid": np.ones(1, bool)})
    with pytest.raises(InputError, match="size is 0"):
        CodeUsage(0)
