"""BatchNorm: in double precision by hand, and beside Flax's, which takes another way."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.nn.batch_norm import BatchNorm

SHAPES = {
    "maps": (6, 5, 4, 7),
    "vectors": (6, 3),
    "a pixel": (6, 1, 1, 8),
    "volumes": (6, 2, 3, 2, 5),
}
VALID = {"all": None, "some": [1, 0, 1, 1, 0, 1], "one": [0, 0, 0, 1, 0, 0]}


def given(shape, mean=3.0):
    rng = np.random.default_rng(0)
    x = mean + 2 * rng.standard_normal(shape)
    dy = rng.standard_normal(shape)
    scale, bias, start, spread = 1 + rng.random((4, shape[-1]))
    return x, dy, {"params": {"scale": scale, "bias": bias},
                   "batch_stats": {"mean": start, "var": spread}}  # fmt: skip


def in_float64(x, dy, variables, valid, momentum=0.9, epsilon=1e-5):
    """Output, running statistics, and the gradients by the paper's equations, padding aside."""
    params, running = variables["params"], variables["batch_stats"]
    axes = tuple(range(x.ndim - 1))
    real = x if valid is None else x[valid]
    mean, var = real.mean(axes), real.var(axes)
    inverse = 1 / np.sqrt(var + epsilon)
    normal = (x - mean) * inverse
    after = [momentum * running[name] + (1 - momentum) * value
             for name, value in (("mean", mean), ("var", var))]  # fmt: skip
    slope = dy * params["scale"]
    takes_part = np.ones(len(x), bool) if valid is None else valid
    weight = takes_part.reshape(-1, *[1] * (x.ndim - 1)) / (real.size / x.shape[-1])
    dx = inverse * (slope - weight * (slope.sum(axes) + normal * (slope * normal).sum(axes)))
    return normal * params["scale"] + params["bias"], after, (
        dx, (dy * normal).sum(axes), dy.sum(axes)
    )  # fmt: skip


def in_training(layer, x, dy, variables, **options):
    def apply(x, params):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"], **options)

    y, pull, after = jax.vjp(apply, x, variables["params"], has_aux=True)
    dx, params = pull(dy)
    statistics = after["batch_stats"]
    return y, [statistics["mean"], statistics["var"]], (dx, params["scale"], params["bias"])


@pytest.mark.parametrize("rows", VALID)
@pytest.mark.parametrize("name", SHAPES)
def test_output_statistics_and_gradients_are_those_of_double_precision(name, rows):
    x, dy, variables = given(SHAPES[name])
    valid = None if VALID[rows] is None else np.array(VALID[rows], bool)
    if name in ("vectors", "a pixel") and rows == "one":
        valid[0] = True  # of one number alone the variance is zero, and gradients all rounding
    single = jax.tree.map(jnp.float32, (x, dy, variables))
    found = jax.jit(lambda *given: in_training(BatchNorm(), *given, train=True, valid=valid))(
        *single
    )
    expected = in_float64(*jax.tree.map(np.float64, single), valid)
    for mine, exact in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        # A variance as a difference of means of squares loses a digit where the mean is 3 spreads;
        # of two numbers a channel it may be small, and its inverse root large.
        most = 1e-5 * np.abs(exact).max() * (10 if x.size / x.shape[-1] < 12 else 1)
        assert np.abs(mine - exact).max() <= most


def test_numbers_are_those_of_flax_in_training_and_after():
    x, dy, variables = jax.tree.map(jnp.float32, given((6, 5, 4, 7)))
    valid = np.array(VALID["some"], bool)
    ours, theirs = BatchNorm(0.8, 1e-3), nn.BatchNorm(momentum=0.8, epsilon=1e-3)
    mine = in_training(ours, x, dy, variables, train=True, valid=valid)
    mask = valid[:, None, None, None]
    flax = in_training(theirs, x, dy, variables, use_running_average=False, mask=mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, flax)
    after = ours.apply(variables, x, train=False, valid=valid)
    expected = theirs.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_what_flax_keeps():
    x = jnp.ones((2, 3, 3, 4))
    for options in ({}, {"use_scale": False}, {"use_bias": False}):
        mine = BatchNorm(**options).init(jax.random.key(0), 7 * x, train=True)
        flax = nn.BatchNorm(**options).init(jax.random.key(0), x, use_running_average=False)
        jax.tree.map(np.testing.assert_array_equal, mine, flax)
        assert {leaf.dtype for leaf in jax.tree.leaves(mine)} == {jnp.dtype("float32")}


def test_second_derivatives_and_forward_mode():
    """The stop of a gradient inside must not be seen from outside, whatever is differentiated."""
    x, dy, variables = jax.tree.map(jnp.float32, given((6, 2, 2, 3)))
    valid, rng = np.array(VALID["some"], bool), np.random.default_rng(1)

    def loss(layer, options):
        def of(x, params):
            given = {**variables, "params": params}
            return jnp.sum(dy * jnp.sin(layer.apply(given, x, mutable="batch_stats", **options)[0]))

        return of

    mine = loss(BatchNorm(), {"train": True, "valid": valid})
    mask = valid[:, None, None, None]
    flax = loss(nn.BatchNorm(), {"use_running_average": False, "mask": mask})
    point = x, variables["params"]
    along = jax.tree.map(lambda leaf: jnp.float32(rng.standard_normal(leaf.shape)), point)

    def derivatives(of):
        gradient = jax.grad(of, argnums=(0, 1))
        return jax.jvp(of, point, along)[1], jax.jvp(gradient, point, along)[1], jax.vjp(
            lambda *at: sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(*at), along)))), *point
        )[1](1.0)  # fmt: skip

    found, expected = jax.jit(lambda: (derivatives(mine), derivatives(flax)))()
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def test_padding_may_hold_anything():
    x, dy, variables = jax.tree.map(jnp.float32, given((6, 2, 2, 3)))
    valid = np.array(VALID["some"], bool)
    spoiled = x.at[~valid].set(jnp.nan)
    dy = dy.at[~valid].set(0)
    found = in_training(BatchNorm(), spoiled, dy, variables, train=True, valid=valid)
    expected = in_training(BatchNorm(), x[valid], dy[valid], variables, train=True)
    np.testing.assert_allclose(found[0][valid], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[1], expected[1])


def test_half_precision_in_and_out():
    x, _, variables = jax.tree.map(jnp.float32, given((6, 5, 4, 7)))
    x = x.astype(jnp.bfloat16)
    layer = BatchNorm(dtype=jnp.bfloat16)
    y, after = layer.apply(variables, x, train=True, mutable="batch_stats")
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    exact, statistics, _ = in_float64(*jax.tree.map(np.float64, (x, x, variables)), None)
    # Inside it is float32: one rounding to 8 bits at the end.
    np.testing.assert_allclose(np.float64(y), exact, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(after["batch_stats"]["mean"], statistics[0], rtol=1e-6)


def test_mapped_over_parameters_and_images():
    x, _, variables = jax.tree.map(jnp.float32, given((6, 5, 4, 7)))
    valid = np.array(VALID["some"], bool)

    def apply(params, x, valid):
        given = {**variables, "params": params}
        return BatchNorm().apply(given, x, train=True, valid=valid, mutable="batch_stats")[0]

    params = [variables["params"], jax.tree.map(lambda leaf: 2 * leaf, variables["params"])]
    images, rows = jnp.stack([x, x[::-1]]), jnp.stack([valid, ~valid])
    mapped = jax.vmap(apply)(jax.tree.map(lambda *leaf: jnp.stack(leaf), *params), images, rows)
    for found, *each in zip(mapped, params, images, rows, strict=True):
        np.testing.assert_allclose(found, apply(*each), rtol=1e-5, atol=1e-5)
