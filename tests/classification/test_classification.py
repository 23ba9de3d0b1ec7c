"""Classification: closed forms, masks, models with and without state."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvjax.build import build
from cvjax.classification import losses, views
from cvjax.classification.task import Classification, _target
from cvjax.data.transforms import mixing
from cvjax.errors import InputError
from cvjax.nn.resnet import ResNet
from cvjax.train.task import Task

CLASSES = 4


class Linear(nn.Module):
    """The smallest model that a person could bring: no statistics, no `valid`."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(CLASSES)(x)


RESNET = ResNet(num_classes=CLASSES, stem="cifar", width=4, stage_sizes=(1, 1))


def batch_of(n: int, channels: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(size=(n, 9, 9, channels)).astype(np.float32),
        "label": rng.integers(0, CLASSES, n).astype(np.int32),
        "valid": np.ones(n, bool),
    }


def take_step(task: Classification, params, model_state, batch, seed: int = 1):
    """The loss, (model state, metrics) and gradient, jitted with the batch as an argument."""

    @jax.jit
    def step(params, model_state, batch):
        state = SimpleNamespace(model_state=model_state)
        loss = task.objectives[0].loss
        return jax.value_and_grad(loss, has_aux=True)(params, state, batch, jax.random.key(seed))

    return step(params, model_state, batch)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def is_finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("model", [RESNET, Linear(), Dropped()], ids=lambda m: type(m).__name__)
def test_what_is_not_valid_changes_nothing_bit_for_bit(model):
    task = Classification(model, label_smoothing=0.1)
    assert isinstance(task, Task)
    one, other = batch_of(6), batch_of(6)
    one["valid"][[1, 4]] = other["valid"][[1, 4]] = False
    other["image"][[1, 4]] = np.nan
    other["label"][[1, 4]] = [-1, 1000]
    params, model_state = jax.jit(task.init)(jax.random.key(0), one)

    result = take_step(task, params, model_state, one)
    assert is_finite(result)
    assert_equal(result, take_step(task, params, model_state, other))
    evaluate = jax.jit(lambda batch: task.evaluate(params, model_state, batch, jax.random.key(0)))
    assert is_finite(evaluate(one))
    assert_equal(evaluate(one), evaluate(other))
    assert int(evaluate(one)["accuracy"].count) == 4
    visualize = jax.jit(lambda batch: task.visualize(params, model_state, batch, jax.random.key(0)))
    assert_equal(visualize(one), visualize(other))


@pytest.mark.parametrize("model", [RESNET, Linear()], ids=lambda m: type(m).__name__)
def test_a_padded_batch_is_the_batch_without_its_padding(model):
    task = Classification(model)
    padded = batch_of(6)
    padded["valid"][[0, 3]] = False
    short = jax.tree.map(lambda x: x[padded["valid"]], padded)
    params, model_state = jax.jit(task.init)(jax.random.key(0), padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        take_step(task, params, model_state, padded),
        take_step(task, params, model_state, short),
    )


@pytest.mark.parametrize("model", [RESNET, Linear()], ids=lambda m: type(m).__name__)
def test_a_batch_of_nothing_teaches_nothing(model):
    task = Classification(model)
    batch = batch_of(4)
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)
    batch["valid"][:] = False
    batch["image"][:] = np.nan
    (loss, (new_state, metrics)), gradient = take_step(task, params, model_state, batch)
    assert loss == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert_equal(new_state, model_state)
    assert metrics["loss"].count == metrics["accuracy"].count == 0


def test_label_smoothing_has_its_closed_form():
    smoothing, batch = 0.2, batch_of(5)
    task = Classification(Linear(), label_smoothing=smoothing)
    params, model_state = task.init(jax.random.key(0), batch)
    (loss, (new_state, metrics)), _ = take_step(task, params, model_state, batch)

    dense = jax.tree.map(np.float64, params["model"]["Dense_0"])
    logits = (batch["image"].reshape(5, -1) * 2 - 1) @ dense["kernel"] + dense["bias"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = log_p[np.arange(5), batch["label"]]
    expected = -(1 - smoothing) * right - smoothing * log_p.mean(-1)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].compute(), expected.mean(), rtol=1e-5)
    assert new_state == {}

    held_out = task.evaluate(params, model_state, batch, jax.random.key(0))
    np.testing.assert_allclose(held_out["loss"].compute(), -right.mean(), rtol=1e-5)
    accuracy = (logits.argmax(-1) == batch["label"]).mean()
    np.testing.assert_allclose(held_out["accuracy"].compute(), accuracy, rtol=1e-6)

    outputs = task.predict(params, model_state, batch, jax.random.key(0))
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["probabilities"], np.exp(log_p), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(outputs["prediction"], logits.argmax(-1))


def test_images_are_normalized_by_channel():
    batch = batch_of(3, channels=3)
    center, spread = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    plain = Classification(Linear(), mean=0.0, std=1.0)
    params, model_state = plain.init(jax.random.key(0), batch)
    normalized = {**batch, "image": (batch["image"] - np.array(center)) / np.array(spread)}
    np.testing.assert_allclose(
        Classification(Linear(), mean=center, std=spread).predict(
            params, model_state, batch, jax.random.key(0)
        )["logits"],
        plain.predict(params, model_state, normalized, jax.random.key(0))["logits"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_dropout_draws_from_the_rng_of_the_step_and_only_in_training():
    task = Classification(Dropped())
    batch = batch_of(5)
    params, model_state = task.init(jax.random.key(0), batch)
    first, again, other = (take_step(task, params, model_state, batch, seed) for seed in (1, 1, 2))
    assert_equal(first, again)
    assert first[0][0] != other[0][0]
    one, two = (task.evaluate(params, model_state, batch, jax.random.key(k)) for k in (1, 2))
    assert_equal(one, two)


def test_a_label_that_is_no_class_is_not_passed_over():
    task = Classification(Linear())
    batch = batch_of(3)
    params, model_state = task.init(jax.random.key(0), batch)
    for label in (-1, CLASSES):
        batch["label"][0] = label
        assert np.isnan(take_step(task, params, model_state, batch)[0][0])


def test_labels_of_eight_bits_name_256_classes():
    batch = {"label": jnp.array([0, 7, 255], jnp.uint8), "valid": jnp.ones(3, bool)}
    np.testing.assert_array_equal(_target(batch, 256).argmax(1), [0, 7, 255])


def test_labels_are_looked_at_before_training():
    task, batch = Classification(RESNET), batch_of(3)
    task.check(batch)
    task.check({**batch, "label": np.eye(CLASSES)[:3]})
    channels = batch["image"].shape[-1]
    dataclasses.replace(task, mean=(0.5,) * channels, std=(0.5,)).check(batch)
    with pytest.raises(InputError, match=f"std is .*the images have {channels} channels"):
        dataclasses.replace(task, std=(0.5,) * (channels + 1)).check(batch)
    for label in (-1, CLASSES):
        labels = np.array([0, label, 1])
        with pytest.raises(InputError, match=f"label is {label}, .* num_classes is 4: .* 0..3"):
            task.check({**batch, "label": labels})
        task.check({**batch, "label": labels, "valid": labels != label})
    with pytest.raises(InputError, match=r"label is 1\.5, but num_classes is 4"):
        task.check({**batch, "label": np.array([0, 1.5, 1])})
    for value in (2.0, -1.0, np.nan):
        with pytest.raises(InputError, match=rf"label is {value}; one for each class must be in"):
            task.check({**batch, "label": np.full((3, CLASSES), value)})
    for several in (np.zeros((3, CLASSES)), np.ones((3, CLASSES))):
        with pytest.raises(InputError, match=rf"label sums to {several[0].sum():.0f}; .*exclusive"):
            task.check({**batch, "label": several})
        dataclasses.replace(task, exclusive=False).check({**batch, "label": several})
    with pytest.raises(InputError, match="needs a field label; there are: image, valid"):
        task.check({name: batch[name] for name in ("image", "valid")})


def test_labels_in_a_column_are_refused():
    """As Keras has them: [b, 1] would be taken for the probability of every class."""
    task, batch = Classification(Linear()), batch_of(3)
    params, model_state = task.init(jax.random.key(0), batch)
    batch["label"] = batch["label"][:, None]
    for call in (take_step, lambda *args: task.evaluate(*args[1:], jax.random.key(0))):
        with pytest.raises(InputError, match=r"label is \[3, 1\]; .* must be \[3\].* \[3, 4\]"):
            call(task, params, model_state, batch)


def test_training_moves_the_statistics_and_evaluation_does_not():
    task = Classification(RESNET)
    batch = batch_of(4)
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)
    assert set(params) == {"model"} and set(model_state) == {"batch_stats"}
    (_, (new_state, _)), _ = take_step(task, params, model_state, batch)
    assert jax.tree.structure(new_state) == jax.tree.structure(model_state)
    assert (new_state["batch_stats"]["stem_norm"]["mean"] != 0).all()
    # Held-out images change nothing, and are normalized by what was kept: each stands for itself.
    other = {**batch, "image": batch["image"].copy()}
    other["image"][1:] = 0.5
    predict = jax.jit(lambda batch: task.predict(params, new_state, batch, jax.random.key(0)))
    one, two = (predict(b)["logits"][0] for b in (batch, other))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_the_worst_come_first_and_are_framed(channels):
    task = Classification(Linear())
    batch = batch_of(3, channels)
    params, model_state = task.init(jax.random.key(0), batch)
    logits = np.asarray(task.predict(params, model_state, batch, jax.random.key(0))["logits"])
    batch["label"] = np.array(logits.argmax(-1), np.int32)
    batch["label"][1] = logits[1].argmin()
    batch["valid"][2] = False

    picture = jax.jit(task.visualize)(params, model_state, batch, jax.random.key(0))["worst"]
    picture = np.asarray(picture)
    # Three images of 9 pixels, framed with 1, in cells with 1 pixel of black between them.
    assert picture.shape == (13, 37, 3)
    assert picture.min() >= 0 and picture.max() <= 1
    wrong, right, invalid = (picture[1:12, 1 + 12 * i : 12 + 12 * i] for i in range(3))
    for cell, image in ((wrong, batch["image"][1]), (right, batch["image"][0])):
        shown = np.broadcast_to(image[..., : 3 if channels >= 3 else 1], (9, 9, 3))
        np.testing.assert_allclose(cell[1:-1, 1:-1], shown, rtol=1e-6)
    assert wrong[0, 0, 0] > wrong[0, 0, 1] and right[0, 0, 1] > right[0, 0, 0]
    assert not invalid.any()


def test_it_learns():
    task = Classification(Linear(), mean=0.0, std=1.0)
    batch = batch_of(16)
    params, model_state = task.init(jax.random.key(0), batch)

    @jax.jit
    def descend(params, _):
        state = SimpleNamespace(model_state=model_state)
        (loss, _), gradient = jax.value_and_grad(task.loss, has_aux=True)(
            params, state, jax.tree.map(jnp.asarray, batch), jax.random.key(0)
        )
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), loss

    _, losses = jax.lax.scan(descend, params, length=200)
    assert losses[-1] < 0.2 * losses[0]


def test_soft_labels_that_are_one_hot_are_labels():
    task = Classification(Linear(), label_smoothing=0.1)
    hard = batch_of(5)
    hard["valid"][2] = False
    soft = {**hard, "label": np.eye(CLASSES, dtype=np.float32)[hard["label"]]}
    soft["label"][2] = np.nan
    params, model_state = task.init(jax.random.key(0), hard)
    one, other = (take_step(task, params, model_state, batch) for batch in (hard, soft))
    assert is_finite(other)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), one, other)
    for method in (task.evaluate, task.visualize):
        results = [method(params, model_state, batch, jax.random.key(0)) for batch in (hard, soft)]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *results)


def test_soft_labels_have_the_closed_form_of_the_cross_entropy():
    task, batch = Classification(Linear()), batch_of(4)
    batch["label"] = np.random.default_rng(0).dirichlet(np.ones(CLASSES), 4).astype(np.float32)
    params, model_state = task.init(jax.random.key(0), batch)
    (loss, _), _ = take_step(task, params, model_state, batch)
    p = task.predict(params, model_state, batch, jax.random.key(0))["probabilities"]
    np.testing.assert_allclose(loss, -(batch["label"] * np.log(p)).sum(-1).mean(), rtol=1e-5)


@pytest.mark.parametrize("mix", [mixing.mixup, mixing.cutmix, mixing.mixup_or_cutmix])
def test_mixing_trains_on_the_mixed_images_and_targets(mix):
    batch = batch_of(6)
    batch["valid"][[1, 4]] = False
    batch["image"][[1, 4]] = np.nan
    batch["label"][[1, 4]] = -1
    seen = []

    jitted = jax.jit(mix)

    def remember(images, rng, valid):
        seen.append(jitted(images, rng, valid))
        return seen[-1]

    task = Classification(Linear(), label_smoothing=0.1, mix=remember)
    params, model_state = task.init(jax.random.key(0), batch)
    state = SimpleNamespace(model_state=model_state)
    loss, (_, metrics) = task.loss(params, state, batch, jax.random.key(5))
    mixed = seen[0]
    targets = np.eye(CLASSES)[np.maximum(batch["label"], 0)]
    share = np.asarray(mixed.share)[:, None]
    soft = share * targets + (1 - share) * targets[np.asarray(mixed.partner)]
    same = {**batch, "image": mixed.images, "label": soft.astype(np.float32)}
    plain = Classification(Linear(), label_smoothing=0.1)
    expected, (_, expected_metrics) = plain.loss(params, state, same, jax.random.key(0))
    assert np.isfinite(loss)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), metrics, expected_metrics)
    if mix is mixing.mixup_or_cutmix:
        result = take_step(task, params, model_state, batch, seed=5)
        assert is_finite(result)
        np.testing.assert_allclose(result[0][0], loss, rtol=1e-5)
    # Held-out images are not mixed.
    held_out = task.evaluate(params, model_state, batch, jax.random.key(0))
    assert_equal(held_out, plain.evaluate(params, model_state, batch, jax.random.key(0)))


def test_a_label_that_is_no_class_is_not_passed_over_when_mixed():
    task = Classification(Linear(), mix=mixing.cutmix)
    batch = batch_of(3)
    params, model_state = task.init(jax.random.key(0), batch)
    batch["label"][0] = CLASSES
    assert np.isnan(take_step(task, params, model_state, batch)[0][0])


def test_images_are_augmented_in_training_alone():
    task = Classification(Linear(), augment=lambda images, rng: 0 * images)
    batch = batch_of(3)
    params, model_state = task.init(jax.random.key(0), batch)
    black = {**batch, "image": 0 * batch["image"]}
    plain = Classification(Linear())
    assert_equal(
        take_step(task, params, model_state, batch), take_step(plain, params, model_state, black)
    )
    assert_equal(
        task.evaluate(params, model_state, batch, jax.random.key(0)),
        plain.evaluate(params, model_state, batch, jax.random.key(0)),
    )


def test_a_config_names_the_mixing():
    config = dict(
        type="classification.task.Classification",
        model=dict(type="tests.classification.test_classification.Linear"),
        augment=dict(
            type="data.transforms.batched.in_order",
            flip=dict(type="data.transforms.batched.random_flip"),
            crop=dict(type="data.transforms.batched.random_crop", padding=1),
        ),
        mix=dict(type="data.transforms.mixing.mixup_or_cutmix", p_cutmix=0.3),
    )
    task, batch = build(config), batch_of(4)
    params, model_state = task.init(jax.random.key(0), batch)
    assert is_finite(take_step(task, params, model_state, batch))


def test_labels_that_do_not_exclude_each_other():
    """Against float64 formulas; rows that are not valid hold NaN and count for nothing."""
    task = Classification(Linear(), losses.sigmoid_cross_entropy, exclusive=False)
    batch = batch_of(6)
    draws = np.random.default_rng(1)
    batch["label"] = (draws.random((6, CLASSES)) < 0.4).astype(np.float32)
    batch["valid"][2] = False
    batch["label"][2] = np.nan
    params, model_state = task.init(jax.random.key(0), batch)
    found = task.predict(params, model_state, batch, jax.random.key(0))
    z, y = np.float64(found["logits"]), batch["label"]
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(found["probabilities"], p, rtol=1e-5)
    np.testing.assert_array_equal(found["prediction"], p > 0.5)
    rows = batch["valid"]
    entropy = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p), -1)[rows].mean()
    metrics = task.evaluate(params, model_state, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"].compute(), entropy, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"].compute(), np.mean((p > 0.5) == (y > 0.5), -1)[rows].mean(), rtol=1e-6
    )
    result = take_step(task, params, model_state, batch)
    assert is_finite(result)
    np.testing.assert_allclose(result[0][0], entropy, rtol=1e-5)


def test_held_out_logits_are_the_mean_over_views():
    batch = batch_of(4)
    moves = {"rows": 1, "columns": -2, "mirror": True}
    looks = {"mirror": views.mirrored, "shift": partial(views.shifted, **moves)}
    task, plain = Classification(Linear(), views=looks), Classification(Linear())
    params, model_state = task.init(jax.random.key(0), batch)

    def logits(task, images):
        seen = {**batch, "image": images}
        return task.predict(params, model_state, seen, jax.random.key(0))["logits"]

    pictures = batch["image"], batch["image"][:, :, ::-1], views.shifted(batch["image"], **moves)
    expected = np.mean([logits(plain, x) for x in pictures], axis=0)
    np.testing.assert_allclose(logits(task, batch["image"]), expected, rtol=1e-5, atol=1e-6)
    # Views are for held-out images alone.
    assert_equal(*(take_step(t, params, model_state, batch) for t in (task, plain)))


@pytest.mark.parametrize("rows, columns", [(0, 0), (1, 0), (-2, 1), (0, -3), (3, 3)])
def test_shifted_views(rows, columns):
    image = np.arange(5 * 6).reshape(1, 5, 6, 1).astype(np.float32)
    moved = np.asarray(views.shifted(image, rows=rows, columns=columns))
    for y, x in np.ndindex(5, 6):
        source = y - rows, x - columns
        source = [abs(i) if i < n else 2 * (n - 1) - i for i, n in zip(source, (5, 6), strict=True)]
        assert moved[0, y, x, 0] == image[0, source[0], source[1], 0]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(loss_function=optax.sigmoid_binary_cross_entropy), "loss_function gives .*each"),
        (dict(loss_function=optax.adamw), "loss_function does not fit: TypeError"),
        (dict(augment=jnp.sum), "augment does not fit"),
        (dict(mix=jax.nn.relu), "mix does not fit: TypeError"),
    ],
)
def test_functions_of_another_kind_are_one_line(fields, message):
    task, batch = Classification(Linear(), **fields), batch_of(4)
    with pytest.raises(InputError, match=message):
        params, state = task.init(jax.random.key(0), batch)
        task.loss(params, SimpleNamespace(model_state=state), batch, jax.random.key(0))


def test_a_student_learns_from_a_teacher():
    """The loss is (1 - w) CE + w T^2 KL, and the teacher never changes."""
    task = Classification(
        Linear(), teacher=ResNet(stem="cifar", width=4, stage_sizes=(1,), num_classes=CLASSES),
        teacher_weight=0.3, temperature=2.0,
    )  # fmt: skip
    batch = batch_of(4)
    params, model_state = task.init(jax.random.key(0), batch)
    assert set(params) == {"model", "teacher"} and "batch_stats" in model_state["teacher"]
    student, teacher = Classification(Linear()), Classification(task.teacher)
    (value, (after, metrics)), _ = take_step(task, params, model_state, batch)
    assert_equal(after["teacher"], model_state["teacher"])
    plain = student.loss(params, SimpleNamespace(model_state={}), batch, jax.random.key(0))[0]
    logits = [
        t.predict({"model": params[group]}, state, batch, jax.random.key(0))["logits"]
        for t, group, state in (
            (student, "model", {}), (teacher, "teacher", model_state["teacher"])
        )
    ]  # fmt: skip
    distance = losses.distillation(*logits, temperature=2.0).mean()
    np.testing.assert_allclose(value, 0.7 * plain + 0.3 * distance, rtol=1e-5)
    np.testing.assert_allclose(metrics["distillation"].compute(), distance, rtol=1e-5)


def test_a_teacher_of_labels_that_do_not_exclude_each_other():
    task = Classification(
        Linear(), losses.sigmoid_cross_entropy, exclusive=False, teacher=Linear(), temperature=2.0
    )
    batch = batch_of(4)
    batch["label"] = np.eye(CLASSES, dtype=np.float32)[batch["label"]]
    params, state = task.init(jax.random.key(0), batch)
    params["teacher"] = jax.tree.map(lambda x: -2 * x, params["model"])
    (_, (_, metrics)), _ = take_step(task, params, state, batch)
    x = 2 * batch["image"] - 1
    one, two = (Linear().apply({"params": params[group]}, x) for group in ("model", "teacher"))
    expected = losses.sigmoid_distillation(one, two, temperature=2.0).mean()
    np.testing.assert_allclose(metrics["distillation"].compute(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"teacher_weight": -1}, "teacher_weight is -1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"label_smoothing": 0.1, "exclusive": False}, "without exclusive it must be 0"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(InputError, match=message):
        Classification(Linear(), **fields)


def test_a_model_of_another_width_is_told():
    class Wide(nn.Module):
        num_classes: int = 10

        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(3)(x.mean((1, 2)))

    batch = {"image": jnp.zeros((2, 4, 4, 1)), "valid": jnp.ones(2, bool)}
    with pytest.raises(InputError, match=r"gives \[2, 3\] for 2 images; it must be .* \[2, 10\]"):
        Classification(Wide()).init(jax.random.key(0), batch)
