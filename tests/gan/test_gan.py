"""Losses and penalties against slow references, spectral norms, padding, sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.gan.augment import diff_augment
from cvjax.gan.losses import (
    Hinge,
    LeastSquares,
    NonSaturating,
    Wasserstein,
    gradient_penalty,
    r1_penalty,
)
from cvjax.gan.model import Discriminator, Generator
from cvjax.gan.task import GAN
from cvjax.train.state import TrainState
from cvjax.train.task import Task

SHAPE = (8, 8, 1)
LOGITS = np.array([-300.0, -1.5, -0.5, 0.0, 0.25, 3.0, 300.0], np.float32)


def test_losses_are_their_formulas():
    x = LOGITS.astype(np.float64)
    log_d, log_not_d = -np.logaddexp(0, -x), -np.logaddexp(0, x)
    for loss, expected in (
        (NonSaturating(), (-log_d, -log_not_d, -log_d)),
        (Hinge(), (np.maximum(0, 1 - x), np.maximum(0, 1 + x), -x)),
        (LeastSquares(), ((x - 1) ** 2 / 2, x**2 / 2, (x - 1) ** 2 / 2)),
        (Wasserstein(), (-x, x, -x)),
    ):
        found = loss.real(LOGITS), loss.fake(LOGITS), loss.generator(LOGITS)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def critic(x):
    return jnp.sum(jnp.sin(x) * jnp.arange(1.0, 5.0).reshape(1, 2, 2, 1), axis=(1, 2, 3))


def test_penalties_against_finite_differences():
    real, fake = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
    rng = jax.random.key(4)
    mix = np.asarray(jax.random.uniform(rng, (3, 1, 1, 1)), np.float64)

    def norm(point):
        square, step = np.zeros(3), 1e-6
        weight = np.arange(1.0, 5.0).reshape(1, 2, 2, 1)
        value = lambda x: (np.sin(x) * weight).sum((1, 2, 3))  # noqa: E731
        for i in range(2):
            for j in range(2):
                move = np.zeros((1, 2, 2, 1))
                move[0, i, j] = step
                square += ((value(point + move) - value(point - move)) / (2 * step)) ** 2
        return np.sqrt(square)

    between = mix * real + (1 - mix) * fake
    found = jax.jit(lambda: gradient_penalty(critic, real, fake, rng))()
    np.testing.assert_allclose(found, (norm(between) - 1) ** 2, rtol=1e-4)
    np.testing.assert_allclose(r1_penalty(critic, real), norm(real) ** 2, rtol=1e-4)


def test_a_critic_without_slope_has_a_finite_penalty():
    x = jnp.ones((2, 2, 2, 1))

    def penalty(slope):
        flat = lambda image: slope * image.sum((1, 2, 3))  # noqa: E731
        return gradient_penalty(flat, x, 2 * x, jax.random.key(0)).sum()

    assert penalty(0.0) == 2.0  # (0 - 1)^2, twice
    assert jax.grad(penalty)(0.0) == 0.0
    # |grad| is 2 slope: (2 s - 1)^2 has the derivative 4 (2 s - 1), twice.
    np.testing.assert_allclose(jax.grad(penalty)(1.0), 8.0, rtol=1e-6)


def test_every_layer_of_the_discriminator_has_norm_one():
    model = Discriminator((4, 8), num_classes=3)
    image, label = jax.random.uniform(jax.random.key(0), (2, *SHAPE)), jnp.array([0, 2])
    variables = model.init(jax.random.key(1), image, label)
    update = jax.jit(lambda v: model.apply(v, image, label, train=True, mutable="batch_stats")[1])
    for _ in range(200):  # the power iteration converges
        variables = {**variables, **update(variables)}

    kernels = {
        "/".join(key.key for key in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel"
    }
    assert len(kernels) == 4
    sigmas = [
        value
        for path, value in jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
        if "sigma" in jax.tree_util.keystr(path)
    ]
    expected = [
        np.linalg.svd(np.reshape(k, (-1, k.shape[-1])), compute_uv=False)[0]
        for k in kernels.values()
    ]
    np.testing.assert_allclose(sorted(map(float, sigmas)), sorted(expected), rtol=1e-3)
    # It is really divided: a discriminator of weights ten times as large says the same, but for
    # the biases, which are 0.
    larger = {**variables, "params": jax.tree.map(lambda x: 10 * x, variables["params"])}
    one, two = (model.apply(v, image, label) for v in (variables, larger))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    plain = model.clone(spectral_norm=False)
    assert "batch_stats" not in plain.init(jax.random.key(1), image, label)


def test_diff_augment():
    image = jnp.broadcast_to(jnp.arange(1.0, 65.0).reshape(1, 8, 8, 1), (50, 8, 8, 1))
    rng = jax.random.key(0)
    moved = np.asarray(diff_augment(image, rng, translation=0.25))
    shifts = set()
    for one in moved[..., 0]:
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if np.array_equal(one, shifted(np.asarray(image[0, ..., 0]), dy, dx))
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 15 and {-2, 2} <= {dy for dy, _ in shifts}
    cut = diff_augment(image, rng, translation=0.0, cutout=0.5)
    assert (np.sum(np.asarray(cut) == 0, axis=(1, 2, 3)) == 16).all()
    lit = np.asarray(diff_augment(image, rng, translation=0.0, brightness=0.3) - image)
    assert np.ptp(lit, axis=(1, 2, 3)).max() < 1e-4 and 0.2 < np.abs(lit).max() <= 0.3001
    same = diff_augment(image[:7], rng, translation=0.25)
    np.testing.assert_array_equal(same, moved[:7])  # rows do not depend on their number
    gradient = jax.grad(lambda x: diff_augment(x, rng, translation=0.25).sum())(image)
    assert set(np.unique(gradient)) == {0.0, 1.0}


def shifted(image, dy, dx):
    canvas = np.zeros((12, 12))
    canvas[2 + dy : 10 + dy, 2 + dx : 10 + dx] = image
    return canvas[2:10, 2:10]


def small(**fields):
    classes = fields.get("num_classes", 3)
    return GAN(
        Generator(SHAPE, (4, 4), classes),
        Discriminator((4, 4), classes, spectral_norm=fields.pop("spectral_norm", True)),
        **{"latents": 5, "num_classes": 3, "statistics_batch": 12} | fields,
    )


def batch_of(size=6):
    return {
        "image": jax.random.uniform(jax.random.key(5), (size, *SHAPE)),
        "label": jnp.arange(size) % 3,
        "valid": jnp.ones(size, bool),
    }


def start(task, batch):
    params, model_state = task.init(jax.random.key(0), batch)
    return params, TrainState(jnp.int32(0), jax.random.key(0), params, {}, model_state, {})


def test_padding_changes_nothing():
    task = small(gradient_penalty=2.0, r1=3.0, augment=diff_augment)
    assert isinstance(task, Task)
    batch = batch_of()
    params, state = start(task, batch)
    hide = {"valid": batch["valid"].at[4:].set(False), "label": batch["label"].at[4:].set(99)}
    padded = batch | hide | {"image": batch["image"].at[4:].set(jnp.nan)}
    other = batch | {"valid": hide["valid"], "image": batch["image"].at[4:].set(0.3)}

    @jax.jit
    def results(batch):
        def run(loss):
            take = jax.value_and_grad(lambda p: loss(p, state, batch, jax.random.key(1))[0])
            return take(params)

        found = task.evaluate(params, state.model_state, batch, jax.random.key(2))
        losses = run(task.discriminator_loss), run(task.generator_loss)
        return losses, {name: metric.compute() for name, metric in found.items()}

    one, two = results(padded), results(other)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    assert not np.allclose(one[0][0][0], results(batch)[0][0][0])
    nothing = results(padded | {"valid": jnp.zeros(6, bool)})[0][0]
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(nothing))


def test_objectives_and_the_state_they_change():
    task, batch = small(critic_steps=3), batch_of()
    groups = [objective.group for objective in task.objectives]
    assert groups == ["discriminator"] * 3 + ["generator"]
    params, state = start(task, batch)
    _, (after, _) = task.discriminator_loss(params, state, batch, jax.random.key(1))
    changed = lambda name: jax.tree.leaves(  # noqa: E731
        jax.tree.map(lambda a, b: bool((a != b).any()), after[name], state.model_state[name])
    )
    assert any(changed("discriminator")) and not any(changed("generator"))
    _, (after, _) = task.generator_loss(params, state, batch, jax.random.key(1))
    assert not any(changed("discriminator")) and all(changed("generator"))


@pytest.mark.parametrize("classes", [0, 3])
def test_samples_do_not_depend_on_the_batch(classes):
    task, batch = small(num_classes=classes), batch_of()
    params, _ = start(task, batch)
    label, key = jnp.arange(7) % 3, jax.random.key(3)
    whole = task.sample(params, label, key)
    parts = [task.sample(params, label[i : i + 2], key, first=i) for i in range(0, 7, 2)]
    # Convolutions of another batch size may round otherwise.
    np.testing.assert_allclose(whole, jnp.concatenate(parts), atol=1e-5)
    assert whole.shape == (7, *SHAPE) and 0 <= whole.min() <= whole.max() <= 1
    picture = task.visualize(params, {}, batch, key)["samples"]
    assert 0 <= picture.min() <= picture.max() <= 1


def test_the_class_reaches_both_players():
    task, batch = small(), batch_of()
    params, state = start(task, batch)
    label = jnp.zeros(6, jnp.int32)
    scales = jax.tree.map(jnp.copy, params)
    for name in ("ConditionalBatchNorm_0", "ConditionalBatchNorm_2"):
        scales["generator"][name]["scale"] = scales["generator"][name]["scale"].at[1].set(3.0)
    one, two = (task.sample(scales, label + c, jax.random.key(1)) for c in (0, 1))
    assert not np.allclose(one, two, atol=1e-3)
    logits = [
        task.discriminator.apply(
            {"params": params["discriminator"], **state.model_state["discriminator"]},
            batch["image"], label + c,
        ) for c in (0, 1)
    ]  # fmt: skip
    assert not np.allclose(*logits, atol=1e-3)


def test_what_cannot_be_is_said():
    for field in ("latents", "critic_steps", "r1", "gradient_penalty", "statistics_batch"):
        with pytest.raises(InputError, match=f"{field} is -1; it must be"):
            dataclasses.replace(small(), **{field: -1})
    with pytest.raises(InputError, match="that of the generator is 10; they must be equal"):
        GAN(Generator(), Discriminator(num_classes=3), num_classes=3)
    with pytest.raises(InputError, match="need multiples of 4"):
        Generator((6, 8, 1)).init(jax.random.key(0), jnp.zeros((1, 5)), jnp.zeros(1, int))
