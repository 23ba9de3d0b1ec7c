"""Muon against optax's, and the orthogonal matrix against double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvjax.errors import InputError
from cvjax.train.muon import muon, orthogonalize
from cvjax.train.optimizer import Optimizer

AOL = {"preconditioning": "aol", "ns_steps": 3}
SHAPES = {
    "conv": (3, 3, 16, 24), "few_inputs": (3, 3, 1, 32), "few_outputs": (3, 3, 32, 4),
    "wide": (8, 100), "tall": (100, 8), "square": (16, 16), "row": (1, 7), "column": (7, 1),
    "number": (1, 1), "still": (5, 6), "bias": (9,), "temperature": (),
}  # fmt: skip
PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def gradients(step):
    """Of sizes from 1 down to a thousandth; that of "still" is 0."""
    draws = np.random.default_rng(step)
    sizes = dict(zip(SHAPES, np.geomspace(1, 1e-3, len(SHAPES)), strict=True)) | {"still": 0}
    return {
        name: jnp.float32(size * draws.normal(size=SHAPES[name])) for name, size in sizes.items()
    }


@pytest.mark.parametrize(
    "options", [{"adam_b2": 0.9}, AOL, {"preconditioning": "aol", "beta": 0.8}]
)
def test_updates_are_those_of_optax(options):
    def numbers(x):
        axes = tuple(range(x.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:-1], axes[-1:]) if x.ndim > 1 else None

    schedule = optax.linear_schedule(0.1, 0.05, 4)
    theirs = optax.contrib.muon(
        schedule, muon_weight_dimension_numbers=partial(jax.tree.map, numbers), **options
    )
    ours = muon(schedule, **options)
    states = [transform.init(PARAMS) for transform in (ours, theirs)]
    steps = [jax.jit(transform.update) for transform in (ours, theirs)]
    for step in range(5):
        updates = []
        for number, update in enumerate(steps):
            made, states[number] = update(gradients(step), states[number], PARAMS)
            updates.append(made)
        for name in SHAPES:
            ours, theirs = (np.asarray(update[name]) for update in updates)
            # Roundings of 6e-8, which grow where a singular value is small; see the next test.
            np.testing.assert_allclose(ours, theirs, atol=5e-5 * np.abs(theirs).max(), rtol=0)
        assert not updates[0]["still"].any() and updates[0]["conv"].any()


@pytest.mark.parametrize("shape", [(24, 24), (72, 8), (8, 72), (1, 5), (5, 1)])
@pytest.mark.parametrize("steps, preconditioning", [(5, "frobenius"), (3, "aol"), (9, "aol")])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e9])
def test_orthogonal_as_in_double_precision(shape, steps, preconditioning, size):
    """Of singular values over three decades, at any length, and again after more steps."""
    draws = np.random.default_rng(0)
    rank = min(shape)
    left, right = (np.linalg.qr(draws.normal(size=(side, rank)))[0] for side in shape)
    x = np.float32(size * left * np.geomspace(1, 1e-3, rank) @ right.T)
    wanted = x.astype(np.float64)
    wanted = wanted.T if shape[0] > shape[1] else wanted
    if preconditioning == "aol":
        wanted /= np.sqrt(np.abs(wanted @ wanted.T).sum(axis=1, keepdims=True))
    else:
        wanted /= np.linalg.norm(wanted)
    for _ in range(steps):
        gram = wanted @ wanted.T
        wanted = 3.4445 * wanted + (-4.7750 * gram + 2.0315 * gram @ gram) @ wanted
    made = jax.jit(orthogonalize, static_argnums=(1, 2))(x, steps, preconditioning)
    made = made.T if shape[0] > shape[1] else made
    # A Gram matrix is known to 6e-8 of its largest entry, and three steps, until the next is taken,
    # let that grow up to 12 times each. Between 0.7 and 1.2, where values are in the end, further
    # steps toss them about, and a difference grows again.
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-5 if steps < 9 else 2e-4)


@pytest.mark.parametrize("options", [{}, AOL])
def test_kernels_of_convolutions_become_orthogonal(options):
    """All singular values of an update of [3, 3, 4, 8], as a matrix [36, 8], are about equal.

    Five steps leave them within about 0.7 .. 1.3 of their median, three after the main job's
    preconditioning within 0.7 .. 1.4.
    """
    params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)}}
    draws = np.random.default_rng(0)
    scales = np.geomspace(1, 30, 8)  # a gradient that is far from orthogonal
    gradient = jax.tree.map(lambda x: jnp.float32(draws.normal(size=x.shape) * scales), params)
    freeze = (("conv/bias", False), (".*", False))  # within other transformations
    transform = Optimizer(partial(muon, **options), 0.1, freeze=freeze).build(params, 10)
    update, _ = jax.jit(transform.update)(gradient, transform.init(params), params)
    values = np.linalg.svd(np.asarray(update["conv"]["kernel"]).reshape(36, 8))[1]
    assert values.max() < 2.5 * values.min()
    before = np.linalg.svd(np.asarray(gradient["conv"]["kernel"]).reshape(36, 8))[1]
    assert before.max() > 10 * before.min()
    # The bias is Adam's, with Nesterov's momentum: 0.9 * 0.1 / (1 - 0.9^2) + 1 times the rate.
    np.testing.assert_allclose(np.abs(update["conv"]["bias"]), 0.1473684, rtol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ns_steps": 0}, "ns_steps is 0; it must be"),
        ({"preconditioning": "spectral"}, "preconditioning is 'spectral'"),
        ({"beta": 1.5}, r"beta is 1\.5"),
        ({"adam_b2": -1}, "adam_b2 is -1"),
        ({"beta": 1.0}, "beta is 1; "),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(InputError, match=f"muon: {message}"):
        muon(0.1, **options)
