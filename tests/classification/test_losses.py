"""Against plain float64 formulas, with values and gradients, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.build import build
from cvjax.classification import losses
from cvjax.errors import InputError

rng = np.random.default_rng(0)
LOGITS = rng.normal(0, 3, (6, 4))
SOFT = rng.dirichlet(np.ones(4), 6)
MULTI = (rng.random((6, 4)) < 0.4).astype(float)
WEIGHTS = (0.5, 1.0, 2.0, 0.0)


def p_softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def p_sigmoid(z):
    return 1 / (1 + np.exp(-z))


def bce(z, y, w=1.0, v=1.0):
    p = p_sigmoid(z)
    return -np.mean(w * (v * y * np.log(p) + (1 - y) * np.log(1 - p)), -1)


def focal(z, y, gamma, alpha):
    p = p_sigmoid(z)
    right = y * p + (1 - y) * (1 - p)
    weight = 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    return np.mean(weight * (1 - right) ** gamma * entropy, -1)


CASES = {
    "softmax": (
        losses.softmax_cross_entropy, {}, SOFT, lambda z, y: -np.sum(y * np.log(p_softmax(z)), -1)),
    "softmax weighted": (
        losses.softmax_cross_entropy, {"class_weights": WEIGHTS}, SOFT,
        lambda z, y: -np.sum(np.array(WEIGHTS) * y * np.log(p_softmax(z)), -1)),
    "softmax focal": (
        losses.softmax_focal, {"gamma": 1.5}, SOFT,
        lambda z, y: -np.sum(y * (1 - p_softmax(z)) ** 1.5 * np.log(p_softmax(z)), -1)),
    "sigmoid": (losses.sigmoid_cross_entropy, {}, MULTI, bce),
    "sigmoid weighted": (
        losses.sigmoid_cross_entropy,
        {"class_weights": WEIGHTS, "positive_weights": (3.0, 1.0, 0.5, 2.0)}, MULTI,
        lambda z, y: bce(z, y, np.array(WEIGHTS), np.array((3.0, 1.0, 0.5, 2.0)))),
    "sigmoid focal": (
        losses.sigmoid_focal, {"gamma": 2.0, "alpha": 0.25}, MULTI,
        lambda z, y: focal(z, y, 2.0, 0.25)),
    "sigmoid focal plain": (
        losses.sigmoid_focal, {"gamma": 1.0}, MULTI, lambda z, y: focal(z, y, 1.0, None)),
    "distillation": (
        losses.distillation, {"temperature": 3.0}, LOGITS[::-1],
        lambda z, y: 9 * np.sum(
            p_softmax(y / 3) * (np.log(p_softmax(y / 3)) - np.log(p_softmax(z / 3))), -1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    """rtol 1e-5: float32 against float64, and central differences with h = 1e-5 in float64."""
    function, options, targets, reference = CASES[name]

    def total(z):
        return jnp.sum(function(z, jnp.float32(targets), **options))

    values = jax.jit(lambda z: function(z, jnp.float32(targets), **options))(jnp.float32(LOGITS))
    assert values.shape == (6,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference(LOGITS, targets), rtol=1e-5, atol=1e-6)
    gradient, h = jax.grad(total)(jnp.float32(LOGITS)), 1e-5
    slopes = np.zeros_like(LOGITS)
    for place in np.ndindex(*LOGITS.shape):
        step = np.zeros_like(LOGITS)
        step[place] = h
        ends = (reference(LOGITS + s, targets).sum() for s in (step, -step))
        slopes[place] = (next(ends) - next(ends)) / (2 * h)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_huge_logits_stay_finite(name):
    function, options, targets, _ = CASES[name]
    huge = jnp.float32([[1e4, -1e4, 0, 0]] * 6)
    one_hot = jnp.float32([[1, 0, 0, 0]] * 6) if name != "distillation" else huge

    def total(z, y):
        return jnp.sum(function(z, y, **options))

    for y in (one_hot, jnp.float32(targets)):
        value, gradient = jax.value_and_grad(total)(huge, y)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    assert abs(total(huge, one_hot)) < 1e-3 or "sigmoid" in name  # logits of 0 are unsure


@pytest.mark.parametrize("name", [name for name in CASES if name != "distillation"])
def test_infinite_logits_that_are_right_cost_nothing(name):
    function, options, _, _ = CASES[name]
    z, y = jnp.float32([[9.0, -jnp.inf, -9.0, -9.0]]), jnp.float32([[1, 0, 0, 0]])
    value, gradient = jax.value_and_grad(lambda z: function(z, y, **options).sum())(z)
    assert value < 1e-3
    assert jnp.isfinite(gradient).all() and gradient[0, 1] == 0


def test_bfloat16_logits_are_summed_in_float32():
    value = losses.softmax_cross_entropy(jnp.bfloat16(LOGITS), jnp.float32(SOFT))
    assert value.dtype == jnp.float32


def test_the_focal_loss_without_focus_is_the_cross_entropy():
    logits, y = jnp.float32(LOGITS), jnp.float32(SOFT)
    np.testing.assert_allclose(
        losses.softmax_focal(logits, y, gamma=0.0), losses.softmax_cross_entropy(logits, y)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_loss_of_a_sure_and_right_answer_has_a_finite_gradient(gamma):
    gradient = jax.grad(
        lambda z: losses.softmax_focal(z, jnp.float32([[1, 0]]), gamma=gamma).sum()
    )(jnp.float32([[200.0, -200.0]]))
    assert jnp.isfinite(gradient).all()


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    value, gradient = jax.value_and_grad(
        lambda z: losses.distillation(z, jnp.float32(LOGITS), temperature=2.0).sum()
    )(jnp.float32(LOGITS))
    assert abs(value) < 1e-5 and jnp.abs(gradient).max() < 1e-5


def test_class_balanced_weights():
    weights = losses.class_balanced_weights((1, 10, 100, 0), beta=0.9)
    raw = [0.1 / (1 - 0.9**n) for n in (1, 10, 100)]
    np.testing.assert_allclose(weights[:3], 3 * np.array(raw) / sum(raw))
    assert weights[3] == 0
    np.testing.assert_allclose(losses.class_balanced_weights((5, 50), beta=0.0), (1, 1))
    np.testing.assert_allclose(
        losses.class_balanced_weights((1, 3), beta=1 - 1e-9), (1.5, 0.5), rtol=1e-5
    )


@pytest.mark.parametrize("counts, beta", [((1, 2), 1.0), ((1, 2), -0.1), ((0, 0), 0.9)])
def test_weights_that_make_no_sense(counts, beta):
    with pytest.raises(ValueError):
        losses.class_balanced_weights(counts, beta)


@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy, losses.softmax_focal])
def test_a_class_that_is_ruled_out_costs_nothing(loss):
    """A logit of minus infinity, with a target of 0, is as if the class were not there."""
    logits, targets = jnp.array([[0.3, -jnp.inf, -1.0]]), jnp.array([[0.75, 0.0, 0.25]])
    value, gradient = jax.value_and_grad(lambda x: loss(x, targets)[0])(logits)
    few = jnp.array([0, 2])
    same = jax.value_and_grad(lambda x: loss(x, targets[:, few])[0])(logits[:, few])
    np.testing.assert_allclose(value, same[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, few], same[1], rtol=1e-6)
    assert gradient[0, 1] == 0
    assert loss(logits, jnp.array([[0.5, 0.5, 0.0]]))[0] == jnp.inf


def test_a_teacher_may_rule_a_class_out():
    taught, logits = jnp.array([[0.5, -jnp.inf]]), jnp.array([[0.0, 1.0]])
    # KL of (1, 0) from (p, 1 - p) is -log p.
    found = losses.distillation(logits, taught)[0]
    np.testing.assert_allclose(found, np.log1p(np.e), rtol=1e-6)


@pytest.mark.parametrize("weights", [(2.0,), (1.0, 2.0, 3.0)])
def test_another_number_of_weights_than_of_classes_is_refused(weights):
    """One weight would be taken for all classes."""
    logits, y = jnp.float32(LOGITS), jnp.float32(SOFT)
    for loss in (losses.softmax_cross_entropy, losses.softmax_focal, losses.sigmoid_cross_entropy):
        with pytest.raises(InputError, match=f"class_weights has {len(weights)} numbers"):
            loss(logits, y, class_weights=weights)
    with pytest.raises(InputError, match="positive_weights has"):
        losses.sigmoid_cross_entropy(logits, y, positive_weights=weights)


def test_a_config_names_the_class_balanced_loss():
    counts, name = (1, 10, 100, 3), "classification.losses."
    config = {"type": f"{name}class_balanced", "counts": list(counts), "beta": 0.9}
    weights = losses.class_balanced_weights(counts, 0.9)
    logits, y = jnp.float32(LOGITS), jnp.float32(SOFT)
    for other in ("softmax_cross_entropy", "softmax_focal", "sigmoid_cross_entropy"):
        loss = build(config | {"loss_function": {"type": name + other}})
        expected = getattr(losses, other)(logits, y, class_weights=weights)
        np.testing.assert_array_equal(loss(logits, y), expected)
    np.testing.assert_array_equal(
        build(config)(logits, y), losses.softmax_cross_entropy(logits, y, class_weights=weights)
    )
