"""The losses against slow references in float64 that share no formula with them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.segmentation.losses import IGNORE, cross_entropy, dice, focal, lovasz_softmax

LOSSES = {
    "cross_entropy": cross_entropy,
    "weighted": functools.partial(cross_entropy, class_weights=(0.5, 2.0, 0.0, 3.0)),
    "focal": focal,
    "focal 0.5": functools.partial(focal, gamma=0.5),
    "focal weighted": functools.partial(focal, gamma=1.5, class_weights=(0.5, 2.0, 0.0, 3.0)),
    "dice": dice,
    "lovasz": lovasz_softmax,
}


# References: pixel by pixel, in float64.


def softmax(row):
    row = [value - max(row) for value in row]
    total = sum(np.exp(value) for value in row)
    return [np.exp(value) / total for value in row]


def pixels(logits, mask):
    """(probabilities, class) of each pixel that counts."""
    rows, labels = logits.reshape(-1, logits.shape[-1]), mask.reshape(-1)
    return [(softmax(row), k) for row, k in zip(rows, labels, strict=True) if k != IGNORE]


def slow_focal(gamma, weights, by_weight):
    def loss(logits, mask):
        found = pixels(logits, mask)
        total = sum(weights[k] * (1 - p[k]) ** gamma * -np.log(p[k]) for p, k in found)
        return total / (sum(weights[k] for _, k in found) if by_weight else len(found))

    return loss


def slow_dice(logits, mask):
    found = pixels(logits, mask)
    losses = []
    for c in {k for _, k in found}:
        overlap = sum(p[c] for p, k in found if k == c)
        both = sum(p[c] for p, k in found) + sum(k == c for _, k in found)
        losses.append(1 - 2 * overlap / both)
    return sum(losses) / len(losses)


def slow_lovasz(logits, mask):
    """The integral over t in [0, 1] of 1 - IoU when the pixels with an error above t are wrong.

    This is another definition of the Lovasz extension (F. Bach, https://arxiv.org/abs/1111.6453,
    proposition 3.1): it sorts nothing and does not depend on the order of ties.
    """
    found = pixels(logits, mask)
    losses = []
    for c in sorted({k for _, k in found}):
        errors = [1 - p[c] if k == c else p[c] for p, k in found]
        levels = sorted({0.0, *errors})
        total = 0.0
        for low, high in itertools.pairwise(levels):
            wrong = [error > low for error in errors]
            true = [k == c for _, k in found]
            right = sum(t and not w for t, w in zip(true, wrong, strict=True))
            union = sum(t or w for t, w in zip(true, wrong, strict=True))
            total += (high - low) * (1 - right / union)
        losses.append(total)
    return sum(losses) / len(losses)


ONES = (1.0,) * 4
WEIGHTS = (0.5, 2.0, 0.0, 3.0)
SLOW = {
    "cross_entropy": slow_focal(0.0, ONES, False),
    "weighted": slow_focal(0.0, WEIGHTS, True),
    "focal": slow_focal(2.0, ONES, False),
    "focal 0.5": slow_focal(0.5, ONES, False),
    "focal weighted": slow_focal(1.5, WEIGHTS, False),
    "dice": slow_dice,
    "lovasz": slow_lovasz,
}


def slow_gradient(loss, logits, mask):
    """Central differences; in float64 their error is some 1e-9."""
    gradient = np.zeros_like(logits)
    for at in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[at] = 1e-5
        gradient[at] = (loss(logits + step, mask) - loss(logits - step, mask)) / 2e-5
    return gradient


def case(classes=(0, 1, 2, 3), scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([*classes, IGNORE], np.uint8), size=(2, 3, 4))
    mask[0, 0, : len(classes)] = classes  # Each of them really is there.
    return rng.normal(0, scale, (2, 3, 4, 4)), mask


CASES = {
    "all classes": case(),
    "absent classes": case(classes=(1, 3)),
    "one class": case(classes=(3,)),
    "steep": case(scale=8.0),
}


@functools.cache
def jitted(name):
    return jax.jit(jax.value_and_grad(LOSSES[name]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("data", CASES)
def test_value_and_gradient_are_those_of_the_reference(name, data):
    logits, mask = CASES[data]
    value, gradient = jitted(name)(np.float32(logits), mask)
    # float32: the softmax is off by a few 1e-7 of itself, a mean of 24 pixels by no more.
    np.testing.assert_allclose(value, SLOW[name](logits, mask), rtol=2e-6, atol=1e-6)
    expected = slow_gradient(SLOW[name], logits, mask)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)
    assert not np.asarray(gradient)[mask == IGNORE].any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_count_changes_nothing(name):
    logits, mask = CASES["all classes"]
    one = jitted(name)(np.float32(logits), mask)
    for anything in (1e4, np.inf, np.nan):
        other = np.where((mask == IGNORE)[..., None], anything, logits)
        two = jitted(name)(np.float32(other), mask)
        jax.tree.map(np.testing.assert_array_equal, one, two)
    # And it is the loss of the pixels that do, alone.
    counts = mask != IGNORE
    short, _ = jitted(name)(np.float32(logits[counts]), mask[counts])
    np.testing.assert_allclose(one[0], short, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_counts(name):
    logits, mask = CASES["all classes"]
    value, gradient = jitted(name)(np.float32(logits), np.full_like(mask, IGNORE))
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pixels_at_all(name):
    value, gradient = jitted(name)(np.zeros((2, 0, 3, 4), np.float32), np.zeros((2, 0, 3), int))
    assert value == 0 and gradient.shape == (2, 0, 3, 4)


def test_only_classes_without_weight():
    logits, mask = case(classes=(2,))
    value, gradient = jitted("weighted")(np.float32(logits), mask)
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(name, size):
    logits, mask = CASES["all classes"]
    logits = np.float32(np.sign(logits) * size)
    value, gradient = jitted(name)(logits, mask)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    right = np.float32(np.where(mask == IGNORE, 0, mask)[..., None] == np.arange(4)) * size
    value, gradient = jitted(name)(right, mask)
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_a_label_that_is_no_class_is_not_passed_over(name):
    logits, mask = CASES["all classes"]
    for label in (4, 254, -1):
        wrong = mask.astype(np.int32)
        wrong[1, 2, 3] = label
        assert np.isnan(jitted(name)(np.float32(logits), wrong)[0])


def test_masks_of_eight_bits_name_more_than_256_classes():
    mask = jnp.array([3, 250], jnp.uint8)
    assert cross_entropy(jnp.zeros((2, 300)), mask) == pytest.approx(np.log(300))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    logits, mask = CASES["all classes"]
    half = logits.astype(jnp.bfloat16)
    value, gradient = jitted(name)(half, mask)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, jitted(name)(np.float32(half), mask)[0])


def test_another_label_to_ignore():
    logits, mask = CASES["all classes"]
    moved = np.where(mask == IGNORE, -1, mask.astype(np.int32))
    for loss in (cross_entropy, focal, dice, lovasz_softmax):
        run = jax.jit(loss, static_argnames="ignore")
        one, two = run(np.float32(logits), mask), run(np.float32(logits), moved, ignore=-1)
        np.testing.assert_array_equal(one, two)


def test_focal_without_gamma_is_the_cross_entropy():
    logits, mask = CASES["steep"]
    focused = jax.jit(jax.value_and_grad(functools.partial(focal, gamma=0.0)))
    one, two = (of(np.float32(logits), mask) for of in (focused, jitted("cross_entropy")))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), one, two)


def test_lovasz_of_certain_predictions_is_one_minus_iou():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, (2, 50))
    logits = 1e4 * (found[:, None] == np.arange(3))
    iou = [
        ((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in range(3)
    ]
    loss, _ = jitted("lovasz")(np.float32(logits), truth)
    np.testing.assert_allclose(loss, 1 - np.mean(iou), rtol=1e-6)


def test_lovasz_with_ties_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    logits = rng.integers(-1, 2, (40, 3)).astype(np.float32)  # Few values: many equal errors.
    mask = rng.integers(0, 3, 40)
    expected = slow_lovasz(np.float64(logits), mask)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(40)
        value, gradient = jax.device_get(jitted("lovasz")(logits[order], mask[order]))
        np.testing.assert_allclose(value, expected, rtol=2e-6)
        # As a function of p it is convex: in no direction does it fall faster than a subgradient
        # says, here by one-sided differences of the reference.
        for direction in rng.normal(size=(20, 40, 3)):
            moved = slow_lovasz(np.float64(logits[order]) + 1e-6 * direction, mask[order])
            assert (moved - expected) / 1e-6 >= np.sum(gradient * direction) - 1e-4
    uniform, gradient = jitted("lovasz")(np.zeros((6, 2), np.float32), np.array([0, 1] * 3))
    np.testing.assert_allclose(uniform, 0.5, rtol=1e-6)  # All errors are 1/2 of 1 - IoU = 1.
    assert np.isfinite(gradient).all()


def test_lovasz_of_very_many_pixels():
    """Where 1 - IoU grows by less than float32 can tell from 1 (a megapixel and more)."""
    n = 2**20
    rng = np.random.default_rng(0)
    truth = rng.random(n) < 0.3
    logits = rng.normal(0, 2, n).astype(np.float32)
    p = 1 / (1 + np.exp(-np.float64(logits)))

    # Of two classes with p and 1 - p the errors are the same; sorted and summed in float64.
    errors, order = np.abs(truth - p), np.argsort(-np.abs(truth - p))
    expected, slope = 0.0, np.zeros(n)
    for true in (truth, ~truth):
        seen, outside = np.cumsum(true[order]), np.cumsum(~true[order])
        jaccard = 1 - (true.sum() - seen) / (true.sum() + outside)
        added = np.diff(jaccard, prepend=0.0)
        expected += np.sum(errors[order] * added) / 2
        slope[order] += np.where(truth[order], -1, 1) * added / 2
    two = np.stack([np.zeros(n, np.float32), logits], axis=-1)
    value, gradient = jax.device_get(jitted("lovasz")(two, truth.astype(np.uint8)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Equal errors in float32 may be sorted otherwise: their slopes differ by a few parts in 1e6.
    np.testing.assert_allclose(gradient[:, 1], slope * p * (1 - p), rtol=1e-3, atol=1e-10)


def test_what_does_not_fit():
    logits, mask = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), int)
    for loss in (cross_entropy, focal, dice, lovasz_softmax):
        with pytest.raises(InputError, match=r"the mask is \[2, 3, 1\]; .* must be \[2, 3\]"):
            loss(logits, mask[..., None])
    for loss in (cross_entropy, focal):
        with pytest.raises(InputError, match="3 numbers, but there are 4 classes"):
            loss(logits, mask, class_weights=(1.0, 2.0, 3.0))
        for weights in (3.0, "abcd", ("a", "b", "c", "d"), (1.0, 2.0, -1.0, 0.0)):
            with pytest.raises(InputError, match="class_weights is"):
                loss(logits, mask, class_weights=weights)
    with pytest.raises(InputError, match="gamma is -1.0"):
        focal(logits, mask, gamma=-1.0)
