"""Losses and penalties against slow references, spectral norms, padding, sampling."""

import ast
import dataclasses
import functools
import textwrap
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvjax.build import build
from cvjax.config import buildable, read
from cvjax.errors import InputError
from cvjax.gan import augment
from cvjax.gan.augment import diff_augment
from cvjax.gan.clipping import clipped
from cvjax.gan.losses import (
    Hinge,
    LeastSquares,
    NonSaturating,
    Wasserstein,
    gradient_penalty,
    r1_penalty,
)
from cvjax.gan.model import Discriminator, Generator, PatchDiscriminator
from cvjax.gan.task import GAN
from cvjax.train.optimizer import Optimizer, optimizers_by_group
from cvjax.train.state import TrainState
from cvjax.train.step import initial_state, make_train_step
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
    found = jax.jit(lambda: r1_penalty(critic, real))()
    np.testing.assert_allclose(found, norm(real) ** 2, rtol=1e-4)


def test_a_critic_without_slope_has_a_finite_penalty():
    x = np.ones((2, 2, 2, 1), np.float32)

    @jax.jit
    @jax.value_and_grad
    def penalty(slope):
        flat = lambda image: slope * image.sum((1, 2, 3))  # noqa: E731
        return gradient_penalty(flat, x, 2 * x, jax.random.key(0)).sum()

    assert penalty(0.0) == (2.0, 0.0)  # (0 - 1)^2, twice
    # |grad| is 2 slope: (2 s - 1)^2 has the derivative 4 (2 s - 1), twice.
    np.testing.assert_allclose(penalty(1.0)[1], 8.0, rtol=1e-6)


def test_penalties_of_a_linear_critic_are_exact():
    x, y = np.random.default_rng(1).normal(size=(2, 5, 3, 2, 1)).astype(np.float32)
    weight = np.random.default_rng(2).normal(size=(3, 2, 1)).astype(np.float32)
    linear = lambda w: lambda image: jnp.sum(w * image, axis=(1, 2, 3))  # noqa: E731
    size = np.linalg.norm(weight)
    rng = jax.random.key(3)

    @jax.jit
    def both(w):
        penalties = (
            lambda w: gradient_penalty(linear(w), x, y, rng),
            lambda w: r1_penalty(linear(w), x),
        )
        return [(of(w), jax.grad(lambda w, of=of: of(w).mean())(w)) for of in penalties]

    (found, slope), (found_r1, slope_r1) = both(weight)
    np.testing.assert_allclose(found, np.full(5, (size - 1) ** 2), rtol=1e-5)
    np.testing.assert_allclose(found_r1, np.full(5, size**2), rtol=1e-5)
    np.testing.assert_allclose(slope, 2 * (size - 1) * weight / size, rtol=1e-5)
    np.testing.assert_allclose(slope_r1, 2 * weight, rtol=1e-5)


def test_clipped_weights_stay_in_their_box():
    params = {"w": jnp.array([0.5, -0.2, 0.05, 0.0]), "b": jnp.array(-0.09)}
    slope = {"w": jnp.array([0.1, -3.0, -2.0, 0.01]), "b": jnp.array(0.0)}
    plain = functools.partial(clipped, optax.sgd, limit=0.1)
    # By hand: w - 0.02 g, clipped; the bias, which is in the box, stays.
    once = {"w": np.clip([0.498, -0.14, 0.09, -0.0002], -0.1, 0.1), "b": -0.09}
    optimizer = plain(learning_rate=0.02)

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    params_now, state = update(params, optimizer.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), params_now, once)
    for _ in range(50):
        params_now, state = update(params_now, state)
    # 51 steps in all: the first weight began them at 0.1, its border.
    ends = {"w": [0.0, 0.1, 0.1, -0.0102], "b": -0.09}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params_now, ends)
    # In the engine's optimizer the box is kept too, and only when an update is really made.
    whole = Optimizer(transform=plain, learning_rate=0.02, accumulate=2).build(params, 10)
    state = whole.init(params)
    first, state = whole.update(slope, state, params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(first))
    second, _ = whole.update(slope, state, params)
    jax.tree.map(
        lambda p, u, b: np.testing.assert_allclose(p + u, b, atol=1e-7), params, second, once
    )
    with pytest.raises(InputError, match="limit is 0; it must be above 0"):
        clipped(optax.sgd, 0.1, limit=0)


def test_the_lines_in_the_docstring_of_wgan_gp_clip_the_critic_alone():
    recipe = Path(__file__).parents[2] / "configs/wgan_gp.py"
    config = read(f"{recipe}:tiny")
    docstring = ast.get_docstring(ast.parse(recipe.read_text()))
    exec(textwrap.dedent(docstring.rpartition(":\n\n")[2]), {"config": config})
    built = build(buildable(config))
    task = dataclasses.replace(built["task"], critic_steps=1)  # less to compile
    batch = {"image": np.ones((2, 28, 28, 1)), "valid": np.ones(2, bool)}
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
    optimizers = optimizers_by_group(built["optimizer"], shapes, list(shapes), steps=3)

    @jax.jit
    def train():
        state = initial_state(task, batch, jax.random.key(0), optimizers, {})
        step = make_train_step(task, optimizers)
        return jax.lax.fori_loop(0, 3, lambda _, state: step(state, batch)[0], state).params

    largest = {
        group: max(np.abs(leaf).max() for leaf in jax.tree.leaves(params))
        for group, params in train().items()
    }
    assert largest["discriminator"] <= 0.010001 and largest["generator"] > 0.1


@pytest.mark.parametrize(
    "model",
    [
        Discriminator((4, 8), num_classes=3),
        Discriminator((4,), num_classes=3, conditioning="auxiliary"),
        PatchDiscriminator((4, 8)),
    ],
    ids=["projection", "auxiliary", "patch"],
)
def test_every_layer_of_a_discriminator_has_norm_one(model):
    image, label = batch_of(2)["image"], np.array([0, 2])
    variables = jax.jit(model.init)(jax.random.key(1), image, label)

    @jax.jit
    def update(variables):  # the power iteration converges
        take = lambda _, v: (  # noqa: E731
            v | model.apply(v, image, label, train=True, mutable="batch_stats")[1]
        )
        return jax.lax.fori_loop(0, 300, take, dict(variables))

    variables = update(variables)

    kernels = {
        "/".join(key.key for key in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel"
    }
    # As many as there are layers, the heads too.
    assert len(kernels) == len(model.widths) + (1 if isinstance(model, PatchDiscriminator) else 2)
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
    larger = {
        **variables,
        "params": jax.tree.map(lambda x: 10 * np.asarray(x), variables["params"]),
    }
    apply = jax.jit(lambda v: model.apply(v, image, label))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        apply(variables), apply(larger),
    )  # fmt: skip
    plain = model.clone(spectral_norm=False)
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(1), image, label))
    assert "batch_stats" not in shapes


def test_a_logit_of_four_widths_sees_70_pixels():
    model = PatchDiscriminator((2, 2, 2, 2), spectral_norm=False)
    image = np.full((1, 96, 96, 1), 0.3, np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    variables = jax.tree.map(np.abs, variables)  # nothing cancels

    @jax.jit
    def seen(image):
        logits = model.apply(variables, image)
        centre = lambda x: model.apply(variables, x)[0, 6, 6]  # noqa: E731
        return logits, jax.grad(centre)(image)[0, ..., 0] != 0

    logits, pixels = seen(image)
    assert logits.shape == (1, 12, 12)
    assert pixels.any(0).sum() == pixels.any(1).sum() == 70


def test_diff_augment():
    settings = "translation", "cutout", "brightness", "saturation", "contrast"
    diff_augment = jax.jit(augment.diff_augment, static_argnames=settings)
    image = np.tile(np.arange(1, 65, dtype=np.float32).reshape(1, 8, 8, 1), (50, 1, 1, 1))
    rng = jax.random.key(0)
    moved = np.asarray(diff_augment(image, rng, translation=0.25))
    shifts = set()
    for one in moved[..., 0]:
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if np.array_equal(one, shifted(image[0, ..., 0], dy, dx))
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 15 and {-2, 2} <= {dy for dy, _ in shifts}
    cut = diff_augment(image, rng, translation=0.0, cutout=0.5)
    assert (np.sum(np.asarray(cut) == 0, axis=(1, 2, 3)) == 16).all()
    lit = np.asarray(diff_augment(image, rng, translation=0.0, brightness=0.3)) - image
    assert np.ptp(lit, axis=(1, 2, 3)).max() < 1e-4 and 0.2 < np.abs(lit).max() <= 0.3001
    same = diff_augment(image[:7], rng, translation=0.25)
    np.testing.assert_array_equal(same, moved[:7])  # rows do not depend on their number
    colour = np.random.default_rng(0).uniform(size=(4, 3, 2, 3)).astype(np.float32)
    grey = np.asarray(diff_augment(colour, rng, translation=0.0, saturation=0.9))
    np.testing.assert_allclose(grey.mean(-1), colour.mean(-1), rtol=1e-5)
    factor = (grey - grey.mean(-1, keepdims=True)) / (colour - colour.mean(-1, keepdims=True))
    assert np.ptp(factor, axis=(1, 2, 3)).max() < 1e-3 and np.ptp(factor) > 0.1
    assert 0.1 <= factor.min() and factor.max() <= 1.9001
    flat = np.asarray(diff_augment(colour, rng, translation=0.0, contrast=0.5))
    middle = colour.mean((1, 2, 3), keepdims=True)
    factor = (flat - middle) / (colour - middle)
    assert np.ptp(factor, axis=(1, 2, 3)).max() < 1e-3 and np.ptp(factor) > 0.05
    gradient = jax.jit(jax.grad(lambda x: diff_augment(x, rng, translation=0.25).sum()))(image)
    assert set(np.unique(gradient)) == {0.0, 1.0}


def shifted(image, dy, dx):
    canvas = np.zeros((12, 12))
    canvas[2 + dy : 10 + dy, 2 + dx : 10 + dx] = image
    return canvas[2:10, 2:10]


def small(**fields):
    classes = fields.get("num_classes", 3)
    head = "auxiliary" if fields.get("auxiliary") else "projection"
    return GAN(
        Generator(SHAPE, (4, 4), classes),
        Discriminator((4, 4), classes, conditioning=head),
        **{"latents": 5, "num_classes": 3, "statistics_batch": 12} | fields,
    )


def batch_of(size=6):
    return {
        "image": np.random.default_rng(5).uniform(size=(size, *SHAPE)).astype(np.float32),
        "label": np.arange(size, dtype=np.int32) % 3,
        "valid": np.ones(size, bool),
    }


@functools.cache
def start(task):
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch_of())
    return params, TrainState(np.int32(0), jax.random.key(0), params, {}, model_state, {})


def test_padding_changes_nothing():
    task = small(gradient_penalty=2.0, r1=3.0, augment=diff_augment)
    assert isinstance(task, Task)
    batch, padded, other = batch_of(), batch_of(), batch_of()
    params, state = start(small())
    padded["valid"][4:] = other["valid"][4:] = False
    padded["label"][4:], padded["image"][4:], other["image"][4:] = 99, np.nan, 0.3

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
    nothing = results(padded | {"valid": np.zeros(6, bool)})[0]
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(nothing))


def test_what_the_penalties_cost():
    batch = batch_of()
    params, state = start(small())

    @jax.jit
    def costs(params):
        critic = lambda x: small()._logit(params, state.model_state, x, batch["label"])  # noqa: E731
        found = [
            small(**f).discriminator_loss(params, state, batch, jax.random.key(1))[0]
            for f in ({}, {"r1": 3.0, "gradient_penalty": 1.0}, {"gradient_penalty": 2.0})
        ]
        return found, r1_penalty(critic, small()._clean(batch)[0]).mean()

    (plain, both, twice), penalty = costs(params)
    np.testing.assert_allclose(twice - plain, 2 * (both - plain - 1.5 * penalty), rtol=1e-3)


def test_objectives_and_the_state_they_change():
    task, batch = small(critic_steps=3), batch_of()
    objectives = task.objectives
    assert [group for group, _ in objectives] == ["discriminator"] * 3 + ["generator"]
    params, state = start(task)

    @jax.jit
    def losses(images):
        """For each objective: its gradient by image, and the model state after it."""
        found = []
        for _, loss in objectives:
            take = lambda image, loss=loss: loss(  # noqa: E731
                params, state, batch | {"image": image}, jax.random.key(1)
            )
            gradient, (after, _) = jax.grad(take, has_aux=True)(images)
            found.append((jnp.abs(gradient).sum((1, 2, 3)), after))
        return found

    def changed(after, name):
        return jax.tree.leaves(
            jax.tree.map(
                lambda a, b: np.any(np.asarray(a) != np.asarray(b)),
                after[name],
                state.model_state[name],
            )
        )

    *critics, (rows, after) = jax.device_get(losses(batch["image"]))
    assert not rows.any() and not any(changed(after, "discriminator"))
    assert all(changed(after, "generator"))
    for turn, (rows, after) in enumerate(critics):  # each looks at rows of its own
        assert (rows != 0).tolist() == [i % 3 == turn for i in range(6)]
        assert any(changed(after, "discriminator")) and not any(changed(after, "generator"))
    with pytest.raises(InputError, match="a batch of 5 cannot be divided among critic_steps=3"):
        task.discriminator_loss(params, state, batch_of(5), jax.random.key(1))


def test_an_auxiliary_head_is_paid_by_both():
    batch = batch_of()
    task = small(auxiliary=2.0)
    params, state = start(task)

    @jax.jit
    def losses(params, label):
        """What both pay, and the generator's logits and labels."""
        rng = jax.random.key(1)
        image, drawn, _ = task._fake(params, state.model_state, 6, jax.random.split(rng)[0])
        logit = task._logit(params, state.model_state, image, drawn)
        given = batch | {"label": label}
        critic, generator = (
            loss(params, state, given, rng)[0]
            for loss in (task.discriminator_loss, task.generator_loss)
        )
        return critic, generator, logit, drawn

    def with_a_head(probabilities):
        """One that names a class whatever it sees."""
        head = {
            "kernel": np.zeros((16, 3), np.float32),
            "bias": np.log(probabilities).astype(np.float32),
        }
        return params | {"discriminator": params["discriminator"] | {"Dense_1": head}}

    label, some = np.array([0, 0, 0, 1, 1, 2]), np.array([0.5, 0.3, 0.2])
    critic, generator, logit, drawn = losses(with_a_head(some), label)
    named = -np.log(some[np.asarray(drawn)]).mean()
    plain = np.logaddexp(0, -np.asarray(logit, np.float64)).mean()
    np.testing.assert_allclose(generator, plain + 2 * named, rtol=1e-5)
    # The critic pays for real images and fakes, whose labels are others: it can only be compared.
    other_critic, *_ = losses(with_a_head(some), np.full(6, 2))
    expected = 2 * (-np.log(some[np.asarray(label)]).mean() + np.log(0.2))
    np.testing.assert_allclose(critic - other_critic, expected, rtol=1e-4)
    fair, *_ = losses(with_a_head([1 / 3] * 3), label)
    shouted, *_ = losses(with_a_head([1e-4, 1e-4, 1 - 2e-4]), label)
    assert shouted - fair > 2 * (np.log(1e4) * 5 / 6 - np.log(3))  # more than real ones alone cost
    for bad in (
        lambda: dataclasses.replace(task, auxiliary=0.0),
        lambda: dataclasses.replace(small(), auxiliary=1.0),
    ):
        with pytest.raises(InputError, match="auxiliary head; set both or neither"):
            bad()
    with pytest.raises(InputError, match="has no auxiliary head"):  # without classes
        GAN(Generator(num_classes=0), Discriminator((4,), 0, conditioning="auxiliary"),
            num_classes=0, auxiliary=1.0)  # fmt: skip
    with pytest.raises(InputError, match="conditioning is 'embedding'"):
        Discriminator(conditioning="embedding")


def test_patches_are_judged_one_by_one():
    batch = batch_of()
    task = dataclasses.replace(
        small(), loss=LeastSquares(), discriminator=PatchDiscriminator((4, 4)), r1=2.0
    )
    params, state = start(task)
    variables = {"params": params["discriminator"], **state.model_state["discriminator"]}

    @jax.jit
    def found(key):
        fake = task._fake(params, state.model_state, 6, jax.random.split(key)[0])[0]
        losses = [
            loss(params, state, batch, key)[0]
            for loss in (task.generator_loss, task.discriminator_loss)
        ]
        return task.discriminator.apply(variables, fake), losses

    logits, (loss, other) = found(jax.random.key(1))
    assert logits.shape == (6, 4, 4) and np.isfinite(other)
    # The mean of the patches' losses, which is not the loss of their mean.
    np.testing.assert_allclose(loss, np.mean((logits - 1) ** 2) / 2, rtol=1e-4)


def test_samples_have_statistics_of_their_own_parameters():
    task = small()
    params, _ = start(task)
    sample = jax.jit(task.sample)
    label, key = np.arange(6) % 3, jax.random.key(3)
    dense = params["generator"]["Dense_0"]
    larger = params | {
        "generator": params["generator"]
        | {"Dense_0": jax.tree.map(lambda x: 9 * np.asarray(x), dense)}
    }
    # A norm follows the layer: with the statistics of the other parameters this would saturate.
    np.testing.assert_allclose(sample(params, label, key), sample(larger, label, key), atol=2e-3)


class Recorder(nn.Module):
    """Keeps the classes of which the statistics are taken."""

    @nn.compact
    def __call__(self, z, label, *, train=False):
        kept = self.variable("batch_stats", "label", lambda: label)
        if train:
            kept.value = label
        image = jnp.broadcast_to(kept.value.max() / 100.0, (len(z), *SHAPE))
        return image + nn.Dense(1)(z)[:, :, None, None] * 0


@pytest.mark.parametrize("count, most", [(10, 36), (40, 39), (80, 39)])
def test_statistics_are_of_all_classes_or_spread_over_them(count, most):
    """Of 40 classes the first ten are not all."""
    task = dataclasses.replace(
        small(), generator=Recorder(), num_classes=40, statistics_batch=count,
        discriminator=Discriminator((4, 4), 40, conditioning="projection"),
    )  # fmt: skip
    z = jnp.zeros((1, 5))
    params = {"generator": task.generator.init(jax.random.key(0), z, jnp.zeros(1, int))["params"]}
    image = jax.jit(task.sample)(params, np.zeros(2, int), jax.random.key(0))
    np.testing.assert_allclose(image, most / 100, rtol=1e-6)


class WithoutNorm(nn.Module):
    @nn.compact
    def __call__(self, z, label, *, train=False):
        return nn.sigmoid(nn.Dense(64)(z)).reshape(-1, *SHAPE)


def test_a_generator_without_batchnorm_pays_for_no_statistics():
    """XLA leaves out the pass of which nothing is used."""
    task = dataclasses.replace(small(num_classes=0), generator=WithoutNorm())
    params, _ = jax.eval_shape(task.init, jax.random.key(0), batch_of())

    def operations(task):
        program = jax.jit(task.sample).lower(params, np.zeros(6, int), jax.random.key(0))
        return program.compile().cost_analysis()["flops"]

    assert operations(task) == operations(dataclasses.replace(task, statistics_batch=10_000))


@pytest.mark.parametrize("classes", [0, 3])
def test_samples_do_not_depend_on_the_batch(classes):
    task, batch = small(num_classes=classes), batch_of()
    params, _ = start(task)
    label, key = np.arange(6) % 3, jax.random.key(3)
    sample = jax.jit(task.sample)
    whole = np.asarray(sample(params, label, key))
    parts = [sample(params, label[i : i + 3], key, first=i) for i in (0, 3)]
    # Convolutions of another batch size may round otherwise.
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)
    assert whole.shape == (6, *SHAPE) and 0 <= whole.min() <= whole.max() <= 1
    told = jax.eval_shape(task.predict, params, {}, batch, key)
    assert set(told) == ({"sample", "label"} if classes else {"sample"})


def test_the_class_reaches_both_players():
    task, batch = small(), batch_of()
    params, state = start(task)
    scales = jax.tree.map(np.array, params)
    for name in ("ConditionalBatchNorm_0", "ConditionalBatchNorm_2"):
        scales["generator"][name]["scale"][1] = 3.0

    @jax.jit
    def both(scales, label):
        variables = {"params": params["discriminator"], **state.model_state["discriminator"]}
        logit = task.discriminator.apply(variables, batch["image"], label)
        return task.sample(scales, label, jax.random.key(1)), logit

    label = np.zeros(6, np.int32)
    for one, two in zip(both(scales, label), both(scales, label + 1), strict=True):
        assert not np.allclose(one, two, atol=1e-3)


def test_what_cannot_be_is_said():
    for field in ("latents", "critic_steps", "r1", "gradient_penalty", "statistics_batch"):
        with pytest.raises(InputError, match=f"{field} is -1; it must be"):
            dataclasses.replace(small(), **{field: -1})
    with pytest.raises(InputError, match="that of the generator is 10; they must be equal"):
        GAN(Generator(), Discriminator(num_classes=3), num_classes=3)
    larger = dataclasses.replace(small(), generator=Generator((8, 8, 3), (4, 4), 3))
    with pytest.raises(InputError, match=r"gives \[6, 8, 8, 3\], but the images are"):
        jax.eval_shape(larger.init, jax.random.key(0), batch_of())
    with pytest.raises(InputError, match="values from 255 to 255"):
        small().check({"image": np.full((1, *SHAPE), 255.0), "valid": np.ones(1, bool)})
    with pytest.raises(InputError, match="label is 3, but num_classes is 3"):
        small().check(batch_of() | {"label": np.array([0, 1, 2, 3, 0, 1])})
    with pytest.raises(InputError, match="label is 3, but num_classes is 3"):
        small().sample({}, np.array([0, 3]), jax.random.key(0))
    unlabelled = {name: batch_of()[name] for name in ("image", "valid")}
    with pytest.raises(InputError, match="num_classes is 3, but the data has no field label"):
        small().check(unlabelled)
    with pytest.raises(InputError, match="num_classes is 3, but there are no labels"):
        Discriminator((4,), 3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(InputError, match="translation is 2; it must be in"):
        augmented = small(augment=functools.partial(diff_augment, translation=2))
        augmented.discriminator_loss(*start(augmented), batch_of(), jax.random.key(1))
    with pytest.raises(InputError, match="it must be .height, width, channels."):
        Generator((8, 8))
    for wrong in (Generator, Discriminator, PatchDiscriminator):
        with pytest.raises(InputError, match=r"widths\[1\] is 2.5; it must be a whole number"):
            wrong(widths=(4, 2.5))
    for setting in (dict(translation=-0.1), dict(cutout=1.5), dict(contrast=-1.0)):
        with pytest.raises(InputError, match=f"{next(iter(setting))} is .* it must be in"):
            diff_augment(batch_of()["image"], jax.random.key(0), **setting)
    with pytest.raises(InputError, match="need multiples of 4"):
        Generator((6, 8, 1)).init(jax.random.key(0), jnp.zeros((1, 5)), jnp.zeros(1, int))
