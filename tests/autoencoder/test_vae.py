"""Likelihoods against closed forms, the bounds against an exact model, padding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from cvjax.autoencoder.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian
from cvjax.autoencoder.model import Decoder, Encoder
from cvjax.autoencoder.task import VAE, importance_weighted_bound, kl_divergence
from cvjax.errors import InputError
from cvjax.train.state import TrainState
from cvjax.train.task import Task

SHAPE = (4, 4, 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_bernoulli_is_that_of_scipy():
    logits, image = 3 * draw(0, 2, *SHAPE), (draw(1, 2, *SHAPE) > 0).astype(np.float32)
    expected = scipy.stats.bernoulli.logpmf(image, 1 / (1 + np.exp(-logits))).sum((1, 2, 3))
    np.testing.assert_allclose(Bernoulli().log_prob(logits, image), expected, rtol=1e-5)
    # Of grey images: the expectation over binary ones, linear in the image.
    grey = Bernoulli().log_prob(logits, np.full_like(logits, 0.5))
    both = [Bernoulli().log_prob(logits, np.full_like(logits, x)) for x in (0.0, 1.0)]
    np.testing.assert_allclose(grey, (both[0] + both[1]) / 2, rtol=1e-5)
    huge = Bernoulli().log_prob(
        np.full((1, *SHAPE), np.float32(1e4)), np.ones((1, *SHAPE), np.float32)
    )
    assert huge == 0.0


def test_gaussian_is_that_of_scipy():
    mean, image = draw(0, 2, *SHAPE), draw(1, 2, *SHAPE)
    expected = scipy.stats.norm.logpdf(image, mean, 0.3).sum((1, 2, 3))
    np.testing.assert_allclose(Gaussian(0.3).log_prob(mean, image), expected, rtol=1e-5)


def test_discretized_logistic_is_that_of_scipy():
    levels = 8
    location, log_scale = 0.5 + 0.3 * draw(0, 2, *SHAPE), 0.3 * draw(1, 2, *SHAPE) - 2
    level = np.random.default_rng(2).integers(0, levels, (2, *SHAPE))
    level[0, 0, :2, 0] = 0, levels - 1
    edges = np.concatenate([[-np.inf], (np.arange(levels - 1) + 0.5) / (levels - 1), [np.inf]])
    cdf = lambda x: scipy.stats.logistic.cdf(x, location.astype(float), np.exp(log_scale))  # noqa: E731
    expected = np.log(cdf(edges[level + 1]) - cdf(edges[level])).sum((1, 2, 3))
    outputs = np.concatenate([location, log_scale], -1)
    found = DiscretizedLogistic(levels).log_prob(outputs, level / (levels - 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@jax.jit
def logistic(outputs, image):
    """log p of 256 levels, and the gradient of its sum."""
    log_prob = lambda outputs: DiscretizedLogistic(256).log_prob(outputs, image)  # noqa: E731
    return log_prob(outputs), jax.grad(lambda outputs: log_prob(outputs).sum())(outputs)


@pytest.mark.parametrize("location, log_scale", [(0.3, -1.0), (0.0, -6.0), (40.0, -7.0)])
def test_the_discretized_logistic_sums_to_one_and_has_gradients_far_away(location, log_scale):
    outputs = np.tile(np.float32([location, log_scale]), (256, 1, 1, 1))
    image = np.arange(256, dtype=np.float32).reshape(-1, 1, 1, 1) / np.float32(255)
    log_prob, gradient = logistic(outputs, image)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1.0, rtol=1e-4)
    assert np.isfinite(gradient).all()


def test_the_discretized_logistic_where_it_is_flat():
    """A level's mass is its width times the density 1 / (4 scale), however large the scale is."""
    image, scales = np.full((4, 1, 1, 1), np.float32(0.5)), np.float32([3.0, 20.0, 90.0, 300.0])
    outputs = np.stack([np.full(4, np.float32(0.4)), scales], axis=-1)[:, None, None]
    log_prob, gradient = logistic(outputs, image)
    np.testing.assert_allclose(log_prob, -np.log(4 * 255) - scales, rtol=1e-5)
    np.testing.assert_allclose(gradient[..., 1].ravel(), -1, rtol=1e-4)


def test_scales_of_the_discretized_logistic_are_held_above_a_limit():
    outputs = np.float32([[0.3, -20], [0.3, -7]])[:, None, None]
    image = np.full((2, 1, 1, 1), np.float32(0.5))
    log_prob, _ = logistic(outputs, image)
    np.testing.assert_allclose(log_prob[0], log_prob[1])


def test_the_divergence_is_the_integral():
    x = np.linspace(-12, 12, 200_001)
    q = scipy.stats.norm(0.7, np.exp(-0.4))
    expected = np.trapezoid(q.pdf(x) * (q.logpdf(x) - scipy.stats.norm.logpdf(x)), x)
    np.testing.assert_allclose(
        kl_divergence(np.float32(0.7), np.float32(-0.4)), expected, rtol=1e-5
    )
    assert kl_divergence(np.float32(0), np.float32(0)) == 0


class Linear(nn.Module):
    """x = z + noise, one pixel: log p(x) is known."""

    @nn.compact
    def __call__(self, z):
        return (z * self.param("weight", nn.initializers.ones, ()))[:, :, None, None]


class Wide(nn.Module):
    """A q(z | x) that is not the posterior."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), 1)
        return jnp.concatenate([0.3 * x, jnp.zeros_like(x)], -1) + self.param(
            "bias", nn.initializers.zeros, ()
        )


def test_the_bound_rises_with_k_to_the_exact_likelihood():
    task = VAE(Wide(), Linear(), latents=1, likelihood=Gaussian(0.5))
    image = np.full((2000, 1, 1, 1), np.float32(1.3))
    params, _ = jax.jit(task.init)(jax.random.key(0), {"image": image})
    exact = scipy.stats.norm.logpdf(1.3, 0, np.sqrt(1 + 0.25))
    draw_all = jax.jit(task.log_weights, static_argnums=3)
    log_weights, log_likelihood = draw_all(params, image, jax.random.key(1), 512)
    bounds = [float(importance_weighted_bound(log_weights[:k]).mean()) for k in (1, 8, 64, 512)]
    assert bounds[0] < bounds[1] < bounds[2] < bounds[3] < exact + 0.005
    assert bounds[3] == pytest.approx(exact, abs=0.01)  # the bias falls as 1 / K
    # One draw is the ELBO, whose divergence is known in closed form.
    divergence = float(kl_divergence(np.float32(0.39), np.float32(0)))
    assert float(log_weights.mean()) == pytest.approx(
        float(log_likelihood.mean()) - divergence, abs=0.01
    )


def test_the_nll_of_an_evaluation_is_the_importance_weighted_bound():
    task = VAE(Wide(), Linear(), latents=1, likelihood=Gaussian(0.5), importance_samples=256)
    batch = {"image": np.full((500, 1, 1, 1), np.float32(1.3)), "valid": np.ones(500, bool)}
    params, _ = task.init(jax.random.key(0), batch)
    found = jax.jit(task.evaluate)(params, {}, batch, jax.random.key(1))
    exact = scipy.stats.norm.logpdf(1.3, 0, np.sqrt(1.25))
    assert float(found["nll"].compute()) == pytest.approx(-exact, abs=0.02)
    assert float(found["elbo"].compute()) < exact - 0.05


def small(**fields):
    return VAE(Encoder(4, (4,), 8), Decoder(SHAPE, (4,), 8), latents=2, **fields)


def batch_of(size=6):
    return {
        "image": np.random.default_rng(3).uniform(size=(size, *SHAPE)).astype(np.float32),
        "valid": np.ones(size, bool),
    }


def start(task, batch, step=0):
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)
    return params, TrainState(np.int32(step), jax.random.key(0), params, {}, model_state, {})


def test_padding_changes_nothing():
    task, batch = small(), batch_of()
    assert isinstance(task, Task)
    params, state = start(task, batch)
    padded, other = batch_of(), batch_of()
    padded["valid"][4:] = other["valid"][4:] = False
    padded["image"][4:], other["image"][4:] = np.nan, 0.9

    @jax.jit
    def results(batch):
        take = jax.value_and_grad(lambda p: task.loss(p, state, batch, jax.random.key(1))[0])
        found = task.evaluate(params, {}, batch, jax.random.key(2))
        return take(params), {name: metric.compute() for name, metric in found.items()}

    one, two = results(padded), results(other)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    assert not np.allclose(one[0][0], results(batch)[0][0])
    nothing = results(padded | {"valid": np.zeros(6, bool)})
    assert nothing[0][0] == 0


def test_beta_warm_up_and_free_bits():
    batch = batch_of()
    params, state = start(small(), batch)

    def loss(step, **fields):
        at = state.replace(step=np.int32(step))
        value, (_, metrics) = jax.jit(small(**fields).loss)(params, at, batch, jax.random.key(1))
        return float(value), {name: float(m.compute()) for name, m in metrics.items()}

    plain, found = loss(0)
    assert plain == pytest.approx(-found["elbo"], rel=1e-5)
    expected = lambda weight: -found["elbo"] + (weight - 1) * found["kl"]  # noqa: E731
    assert loss(0, beta=3.0)[0] == pytest.approx(expected(3), rel=1e-5)
    for step, weight in ((0, 0.0), (5, 1.0), (10, 2.0), (99, 2.0)):
        assert loss(step, beta=2.0, warmup_steps=10)[0] == pytest.approx(expected(weight), rel=1e-5)
    free = loss(0, free_bits=5.0)[0]  # above the divergence of both latents
    assert free == pytest.approx(expected(0) + 2 * 5.0, rel=1e-5)


def test_free_bits_are_of_the_mean_over_the_batch():
    """Of two latents: below the limit in the mean or in some of the images alone."""
    batch = batch_of()
    params, state = start(small(), batch)
    params = jax.tree.map(lambda p: 3 * p, params)
    each = np.asarray(jax.jit(lambda p: kl_divergence(*small().encode(p, batch["image"])))(params))
    free = float(np.median(each))

    @jax.jit
    def losses(params):
        rng = jax.random.key(1)
        return [small(**f).loss(params, state, batch, rng)[0] for f in ({}, {"free_bits": free})]

    plain, with_free = losses(params)
    expected = np.maximum(each.mean(0), free).sum() - each.mean(0).sum()
    assert with_free - plain == pytest.approx(expected, abs=1e-3)
    assert expected < np.maximum(each, free).mean(0).sum() - each.mean(0).sum() - 0.01


def test_the_divergence_falls_as_beta_rises():
    batch = batch_of()
    ends = []
    for beta in (0.1, 1.0, 10.0):
        task = small(beta=beta, likelihood=Gaussian(0.2))
        params, state = start(task, batch)

        @jax.jit
        def train(params, task=task, state=state):
            def step(params, rng):
                gradient, (_, metrics) = jax.grad(task.loss, has_aux=True)(
                    params, state, batch, rng
                )
                params = jax.tree.map(lambda p, g: p - 3e-3 * jnp.clip(g, -1, 1), params, gradient)
                return params, metrics["kl"].compute()

            return jax.lax.scan(step, params, jax.random.split(jax.random.key(1), 600))[1]

        ends.append(float(train(params)[-50:].mean()))
    assert ends[0] > 1.2 * ends[1] > 1.2 * 1.2 * ends[2]


def test_samples_do_not_depend_on_their_number_and_pictures_are_images():
    task, batch = small(), batch_of()
    params, _ = start(task, batch)
    sample = jax.jit(task.sample, static_argnums=1)
    few, many = (np.asarray(sample(params, n, jax.random.key(1))) for n in (3, 7))
    np.testing.assert_allclose(few, many[:3], atol=1e-6)  # matrix products of other sizes
    pictures = jax.jit(task.visualize)(params, {}, batch, jax.random.key(0))
    assert set(pictures) == {"reconstructions", "samples", "traversals", "interpolations"}
    for picture in pictures.values():
        assert picture.ndim == 3 and 0 <= picture.min() <= picture.max() <= 1


def test_what_cannot_be_is_said():
    for field in ("latents", "beta", "importance_samples", "free_bits", "warmup_steps"):
        with pytest.raises(InputError, match=f"{field} is -1; it must be"):
            dataclasses.replace(small(), **{field: -1})
    wrong = VAE(Encoder(5, (4,), 8), Decoder(SHAPE, (4,), 8), latents=2)
    params, _ = jax.eval_shape(wrong.init, jax.random.key(0), batch_of())
    with pytest.raises(InputError, match="latents is 2, but the encoder has 5 outputs"):
        jax.eval_shape(wrong.encode, params, np.zeros((1, *SHAPE), np.float32))
    for wrong, message in (
        (lambda: Encoder(0), "Encoder: outputs is 0"),
        (lambda: Encoder(4, (0,)), r"Encoder: widths\[0\] is 0"),
        (lambda: Decoder(SHAPE, ()), "Decoder: widths is ()"),
        (lambda: Decoder(SHAPE[:2]), "it must be .height, width, channels."),
        (lambda: small(importance_samples=2.5), "is 2.5; it must be a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
    with pytest.raises(InputError, match="need multiples of 4"):
        Decoder((6, 6, 1)).init(jax.random.key(0), np.zeros((1, 2), np.float32))
    narrow = small(likelihood=DiscretizedLogistic())
    with pytest.raises(InputError, match=r"gives \[6, 4, 4, 1\].* it must give \[6, 4, 4, 2\]"):
        jax.eval_shape(narrow.init, jax.random.key(0), batch_of())
    with pytest.raises(InputError, match=r"values from 0 to 2; this task takes them in \[0, 1\]"):
        image = np.stack([np.zeros(SHAPE), np.full(SHAPE, 2.0)])
        small().check({"image": image, "valid": np.ones(2, bool)})
    with pytest.raises(InputError, match="std is 0"):
        Gaussian(0)
    with pytest.raises(InputError, match="levels is 1"):
        DiscretizedLogistic(1)


def test_a_traversal_moves_one_latent_of_the_first_image():
    task, batch = small(), batch_of()
    params, _ = start(task, batch)
    visualize = jax.jit(lambda *of: task.visualize(*of)["traversals"])
    picture = np.asarray(visualize(params, {}, batch, jax.random.key(0)))
    z = np.array(jax.jit(task.encode)(params, batch["image"])[0])[:1]
    z[0, 1] = 3.0
    expected = jax.jit(lambda z: task.likelihood.mean(task.decode(params, z))[0])(z)
    np.testing.assert_allclose(picture[6:10, 46:50], expected, atol=1e-6)  # row 1, column 9
