"""Against plain float64 formulas, with values and gradients, and at the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr

from cvjax.build import build
from cvjax.classification import losses
from cvjax.errors import InputError

rng = np.random.default_rng(0)
LOGITS = rng.normal(0, 3, (6, 4))
F32 = np.float32
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
    "sigmoid focal weighted": (
        losses.sigmoid_focal, {"gamma": 2.0, "class_weights": WEIGHTS}, MULTI,
        lambda z, y: np.mean([
            w * focal(z[:, i : i + 1], y[:, i : i + 1], 2.0, None) for i, w in enumerate(WEIGHTS)
        ], 0)),
    "sigmoid focal plain": (
        losses.sigmoid_focal, {"gamma": 1.0}, MULTI, lambda z, y: focal(z, y, 1.0, None)),
    "distillation": (
        losses.distillation, {"temperature": 3.0}, LOGITS[::-1],
        lambda z, y: 9 * np.sum(
            p_softmax(y / 3) * (np.log(p_softmax(y / 3)) - np.log(p_softmax(z / 3))), -1)),
}  # fmt: skip


@functools.cache
def compiled(function, **options):
    def run(z, y):
        values = function(z, y, **options)
        return jnp.sum(values), values

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def value_and_slope(loss, logits, targets, **options):
    """[b], and the gradient of their sum; the loss may be the name of a case."""
    if isinstance(loss, str):
        loss, options, *_ = CASES[loss]
    (_, values), gradient = compiled(loss, **options)(F32(logits), F32(targets))
    return np.asarray(values), np.asarray(gradient)


def value_of(*given, **options):
    return value_and_slope(*given, **options)[0]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    """rtol 1e-5: float32 against float64, and central differences with h = 1e-5 in float64."""
    _, _, targets, reference = CASES[name]
    values, gradient = value_and_slope(name, LOGITS, targets)
    assert values.shape == (6,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference(LOGITS, targets), rtol=1e-5, atol=1e-6)
    slopes, h = np.zeros_like(LOGITS), 1e-5
    for place in np.ndindex(*LOGITS.shape):
        step = np.zeros_like(LOGITS)
        step[place] = h
        ends = (reference(LOGITS + s, targets).sum() for s in (step, -step))
        slopes[place] = (next(ends) - next(ends)) / (2 * h)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_huge_logits_stay_finite(name):
    huge = F32([[1e4, -1e4, 0, 0]] * 6)
    one_hot = F32([[1, 0, 0, 0]] * 6) if name != "distillation" else huge
    for y in (one_hot, CASES[name][2]):
        values, gradient = value_and_slope(name, huge, y)
        assert np.isfinite(values).all() and np.isfinite(gradient).all()
    values = value_of(name, huge, one_hot)
    assert abs(values.sum()) < 1e-3 or "sigmoid" in name  # logits of 0 are unsure


@pytest.mark.parametrize("name", [name for name in CASES if name != "distillation"])
def test_infinite_logits_that_are_right_cost_nothing(name):
    # As many rows as above: the program is the same.
    z, y = [[9.0, -np.inf, -9.0, -9.0]] * 6, [[1, 0, 0, 0]] * 6
    values, gradient = value_and_slope(name, z, y)
    assert (values < 1e-3).all()
    assert np.isfinite(gradient).all() and (gradient[:, 1] == 0).all()


def test_bfloat16_logits_are_summed_in_float32():
    logits = LOGITS.astype(jnp.bfloat16)
    assert jax.eval_shape(losses.softmax_cross_entropy, logits, F32(SOFT)).dtype == jnp.float32


def test_the_focal_loss_without_focus_is_the_cross_entropy():
    np.testing.assert_allclose(
        value_of(losses.softmax_focal, LOGITS, SOFT, gamma=0.0),
        value_of(losses.softmax_cross_entropy, LOGITS, SOFT),
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_loss_of_a_sure_and_right_answer_has_a_finite_gradient(gamma):
    sure = [[200.0, -200.0]], [[1, 0]]
    assert np.isfinite(value_and_slope(losses.softmax_focal, *sure, gamma=gamma)[1]).all()
    traced = jax.jit(losses.softmax_focal)(F32(LOGITS), F32(SOFT), gamma=gamma)
    np.testing.assert_allclose(
        traced, value_of(losses.softmax_focal, LOGITS, SOFT, gamma=gamma), rtol=1e-5
    )


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    values, gradient = value_and_slope(losses.distillation, LOGITS, LOGITS, temperature=2.0)
    assert abs(values.sum()) < 1e-5 and np.abs(gradient).max() < 1e-5


def test_class_balanced_weights():
    weights = losses.class_balanced_weights((1, 10, 100, 0), beta=0.9)
    raw = [0.1 / (1 - 0.9**n) for n in (1, 10, 100)]
    np.testing.assert_allclose(weights[:3], 3 * np.array(raw) / sum(raw))
    assert weights[3] == 0
    np.testing.assert_allclose(losses.class_balanced_weights((5, 50), beta=0.0), (1, 1))
    np.testing.assert_allclose(
        losses.class_balanced_weights((1, 3), beta=1 - 1e-9), (1.5, 0.5), rtol=1e-5
    )


@pytest.mark.parametrize(
    "counts, beta", [((1, 2), 1.0), ((1, 2), -0.1), ((0, 0), 0.9), ((3, -1), 0.9), ((), 0.9)]
)
def test_weights_that_make_no_sense(counts, beta):
    with pytest.raises(InputError, match="beta is|counts"):
        losses.class_balanced_weights(counts, beta)


@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy, losses.softmax_focal])
def test_a_class_that_is_ruled_out_costs_nothing(loss):
    """A logit of minus infinity, with a target of 0, is as if the class were not there."""
    logits, targets = F32([[0.3, -np.inf, -1.0]]), F32([[0.75, 0.0, 0.25]])
    value, gradient = value_and_slope(loss, logits, targets)
    few = np.array([0, 2])
    same = value_and_slope(loss, logits[:, few], targets[:, few])
    np.testing.assert_allclose(value, same[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, few], same[1], rtol=1e-6)
    assert gradient[0, 1] == 0
    assert value_of(loss, logits, [[0.5, 0.5, 0.0]])[0] == np.inf


def test_a_teacher_may_rule_a_class_out():
    taught, logits = [[0.5, -np.inf]], [[0.0, 1.0]]
    # KL of (1, 0) from (p, 1 - p) is -log p.
    found = value_of(losses.distillation, logits, taught)[0]
    np.testing.assert_allclose(found, np.log1p(np.e), rtol=1e-6)


def test_distillation_of_labels_that_do_not_exclude_each_other():
    """A shift of all logits is no change of a softmax, but of these."""
    logits, taught = np.array([[3.0, 0.5, -90.0]]), np.array([[-3.0, 1.5, 90.0]])
    p, q = (1 / (1 + np.exp(-x / 2)) for x in (logits, taught))
    expected = 4 * np.mean(rel_entr(q, p) + rel_entr(1 - q, 1 - p))
    found = value_of(losses.sigmoid_distillation, logits, taught, temperature=2.0)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    value, gradient = value_and_slope(losses.sigmoid_distillation, taught, taught)
    assert abs(value[0]) < 1e-6 and np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("weights", [(2.0,), (1.0, 2.0, 3.0)])
def test_another_number_of_weights_than_of_classes_is_refused(weights):
    """One weight would be taken for all classes."""
    logits, y = F32(LOGITS), F32(SOFT)
    for loss in (losses.softmax_cross_entropy, losses.softmax_focal, losses.sigmoid_cross_entropy):
        with pytest.raises(InputError, match=f"class_weights has {len(weights)} numbers"):
            loss(logits, y, class_weights=weights)
    with pytest.raises(InputError, match="positive_weights has"):
        losses.sigmoid_cross_entropy(logits, y, positive_weights=weights)


def test_settings_that_make_no_sense():
    logits, y = F32(LOGITS), F32(SOFT)
    for function, fields in (
        (losses.sigmoid_focal, dict(alpha=5.0)),
        (losses.sigmoid_focal, dict(gamma=-1.0)),
        (losses.softmax_focal, dict(gamma="a")),
        (losses.softmax_cross_entropy, dict(class_weights=5)),
        (losses.softmax_cross_entropy, dict(class_weights=(-1.0, 1.0, 1.0, 1.0))),
        (losses.softmax_cross_entropy, dict(class_weights=("a", "b", "c", "d"))),
        (losses.distillation, dict(temperature=0.0)),
        (losses.distillation, dict(temperature=-1.0)),
    ):
        (name,) = fields
        with pytest.raises(InputError, match=f"{name} is"):
            function(logits, y, **fields)
    with pytest.raises(InputError, match=r"counts\[0\] is 1.5; it must be a whole number"):
        losses.class_balanced_weights((1.5, 2))


def test_a_config_names_the_class_balanced_loss():
    counts, name = (1, 10, 100, 3), "classification.losses."
    config = {"type": f"{name}class_balanced", "counts": list(counts), "beta": 0.9}
    weights = losses.class_balanced_weights(counts, 0.9)
    for other in (
        "softmax_cross_entropy",
        "softmax_focal",
        "sigmoid_cross_entropy",
        "sigmoid_focal",
    ):
        loss = build(config | {"loss_function": {"type": name + other}})
        expected = value_of(getattr(losses, other), LOGITS, SOFT, class_weights=weights)
        np.testing.assert_array_equal(value_of(loss, LOGITS, SOFT), expected)
        if other == "softmax_cross_entropy":  # The default.
            np.testing.assert_array_equal(value_of(build(config), LOGITS, SOFT), expected)
