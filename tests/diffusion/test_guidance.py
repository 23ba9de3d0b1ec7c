"""Guidance of the exact denoisers of a mixture: the score is that of the closed form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.diffusion.guidance import autoguidance, classifier, classifier_free
from cvjax.diffusion.process import (
    EDM,
    PARAMETERIZATIONS,
    FlowMatching,
    SubVariancePreserving,
    VariancePreserving,
    convert,
)
from cvjax.diffusion.samplers import example_keys, heun
from tests.diffusion.mixture import COVARIANCES, MEANS, exact, log_density, log_joint

T = np.array([0.02, 0.1, 0.3, 0.5, 0.8, 0.98], np.float32)
X = np.random.default_rng(0).normal(size=(len(T), 2)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])
PROCESSES = [VariancePreserving("linear"), SubVariancePreserving(), FlowMatching(), EDM()]


@functools.partial(jax.jit, static_argnums=0)
def scores(process):
    """By differentiating log densities: of all, and of the component that each row asks for."""
    alpha, sigma = process.alpha(T), process.sigma(T)
    whole = jax.grad(lambda x: jnp.sum(log_density(x, alpha, sigma)))(X)
    one = lambda x: jnp.sum(log_joint(x, alpha, sigma)[jnp.arange(len(T)), LABELS])  # noqa: E731
    return whole, jax.grad(one)(X)


def of_label(process):
    """A network that is told the component; 3 means none."""
    parts = [exact(process, component) for component in (0, 1, 2, None)]

    def predict(x, t, label):
        return jnp.stack([part(x, t) for part in parts])[label, jnp.arange(len(x))]

    return predict


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_guided_scores(process):
    whole, one = map(np.asarray, scores(process))

    @jax.jit
    def log_probability(x, t):
        joint = log_joint(x, process.alpha(t), process.sigma(t))
        return jax.nn.log_softmax(joint)[jnp.arange(len(x)), LABELS]

    for name in PARAMETERIZATIONS:
        process = dataclasses.replace(process, prediction=name)
        predict, full = jax.jit(of_label(process)), exact(process)
        score = jax.jit(functools.partial(convert, process, name, "score"))
        part = lambda x, t, predict=predict: predict(x, t, LABELS)  # noqa: E731
        for weight in (0.0, 1.0, 2.5):
            expected = whole + weight * (one - whole)
            scale = np.abs(expected).max()
            null = np.full_like(LABELS, 3)
            for guided in (
                classifier_free(predict, LABELS, null, weight),
                autoguidance(part, full, weight),
                # p(x) p(y given x)^w, by Bayes the same.
                classifier(full, process, log_probability, weight),
            ):
                found = score(guided(X, T), X, T)
                # float32: x_0 of 7 digits over sigma^2 of 4e-4 (its scale taken out).
                np.testing.assert_allclose(found / scale, expected / scale, atol=1e-3)


def test_a_weight_of_one_asks_once():
    sizes = []

    def predict(x, t, label):
        sizes.append(len(x))
        return x

    for weight in (1, 2.0):
        classifier_free(predict, LABELS, np.full_like(LABELS, 3), weight)(X, T)
    assert sizes == [6, 12]


def test_a_condition_may_be_of_several_arrays():
    condition = {"label": LABELS, "low": X}
    null = {"label": np.full_like(LABELS, 3), "low": X}

    def predict(x, t, condition):
        return x * condition["label"][:, None] + condition["low"]

    found = classifier_free(predict, condition, null, 2.5)(X, T)
    expected = X * (3 + 2.5 * (LABELS - 3))[:, None] + X
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_samples_of_a_guided_sampler_are_of_the_component():
    process = FlowMatching()
    label = np.ones(5000, np.int32)
    denoise = classifier_free(of_label(process), label, np.full_like(label, 3), 1.0)
    keys = example_keys(jax.random.key(0), 5000)
    x = jax.jit(lambda keys: heun(denoise, process, keys, (2,), 24))(keys)
    # 4 standard errors: sqrt(0.06 / 5000) of a mean, 0.06 sqrt(2 / 5000) of a covariance.
    x = np.asarray(x)
    np.testing.assert_allclose(np.mean(x, axis=0), MEANS[1], atol=0.014 + 0.005)
    np.testing.assert_allclose(np.cov(x, rowvar=False), COVARIANCES[1], atol=0.005 + 0.003)
