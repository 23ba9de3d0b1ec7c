"""Policies, views and defaults: what they draw, what they give, how a config names them."""

import collections
from functools import partial

import numpy as np
import pytest

from cvjax.build import build
from cvjax.data.loader import Loader
from cvjax.data.sources.arrays import Arrays
from cvjax.data.transforms import defaults, in_order, policies
from cvjax.data.transforms.multi_crop import multi_crop
from cvjax.errors import InputError
from tests.data.transforms.test_fields import assert_same, scene

POLICIES = (policies.rand_augment, policies.trivial_augment, policies.augmix)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(23, 31, 3), (8, 9, 1), (1, 1, 3)])
def test_policies_keep_shape_and_type_and_follow_the_seed(policy, shape):
    image = scene(*shape)["image"]
    for seed in range(15):
        one, other = (policy({"image": image}, np.random.default_rng(seed)) for _ in range(2))
        assert one["image"].shape == shape and one["image"].dtype == np.uint8
        assert_same(one, other)


def test_each_operation_is_drawn_as_often_as_the_others(monkeypatch):
    drawn = collections.Counter()

    def apply(example, rng, name, strength, fill, interpolation):
        drawn[name] += 1
        return example

    monkeypatch.setattr(policies, "_apply", apply)
    image, rng = {"image": np.zeros((4, 4, 3), np.uint8)}, np.random.default_rng(0)
    for _ in range(1400):
        policies.rand_augment(image, rng, operations=3)
    assert len(drawn) == 13 and sum(drawn.values()) < 4200  # the 14th is to do nothing
    assert min(drawn.values()) > 230 and max(drawn.values()) < 370  # 300 with deviation 17


def test_strength_zero_of_moves_and_colours_is_the_identity():
    given = scene(20, 20)
    for name in (*policies._MOVES, *policies._FACTORS):
        for interpolation in ("nearest", "bilinear"):
            result = policies._apply(given, np.random.default_rng(0), name, 0.0, 0, interpolation)
            np.testing.assert_array_equal(result["image"], given["image"])
            np.testing.assert_array_equal(result["mask"], given["mask"])


def test_augmix_is_a_convex_blend(monkeypatch):
    """Each pixel lies between the least and the greatest of what is blended."""
    apply = policies._apply

    def remember(*given):
        result = apply(*given)
        parts.append(result["image"])
        return result

    monkeypatch.setattr(policies, "_apply", remember)
    image, changed = scene(16, 16)["image"], 0
    for seed in range(8):
        parts = [image]
        mixed = policies.augmix({"image": image}, np.random.default_rng(seed), depth=1)["image"]
        assert len(parts) == 4
        assert (np.min(parts, 0) <= mixed).all() and (mixed <= np.max(parts, 0)).all()
        changed += (mixed != image).any()
    assert changed > 4


def test_the_weights_of_augmix_sum_to_one(monkeypatch):
    monkeypatch.setattr(policies, "_apply", lambda example, *_: example)
    for seed in range(20):
        given = scene(5, 6)
        image = {"image": given["image"]}
        for width in (1, 3):
            same = policies.augmix(image, np.random.default_rng(seed), width=width)
            np.testing.assert_array_equal(same["image"], given["image"])


def test_multi_crop_makes_views_of_the_sizes_asked_for():
    given = scene(60, 50)
    views = {
        "large": partial(defaults.view, size=32, scale=(0.4, 1.0)),
        "small": partial(defaults.view, size=12, scale=(0.05, 0.4)),
    }
    result = multi_crop(given, np.random.default_rng(0), views=views, counts={"small": 6})
    assert result.keys() == {"label", "image_large", "image_small"}
    assert result["image_large"].shape == (1, 32, 32, 3)
    assert result["image_small"].shape == (6, 12, 12, 3)
    assert len({view.tobytes() for view in result["image_small"]}) == 6
    for wrong, message in (
        (dict(views={}), "views is empty"),
        (dict(views=views, counts={"smal": 2}), "did you mean small"),
        (dict(views=views, counts={"small": 0}), "counts.small is 0"),
        (dict(views={"a": sometimes_a_view}, counts={"a": 20}), "views.a must give"),
    ):
        with pytest.raises(InputError, match=message):
            multi_crop(given, np.random.default_rng(0), **wrong)


def sometimes_a_view(example, rng):
    return defaults.view(example, rng, size=9) if rng.random() < 0.5 else example


@pytest.mark.parametrize("processes", [0, 1])
def test_views_come_out_of_the_loader_as_float_images(processes):
    source = Arrays({"image": scene(20, 20)["image"][None].repeat(4, 0), "label": np.arange(4)})
    transform = partial(defaults.contrastive, size=16)
    loader = Loader(source, 4, transforms=(transform,), processes=processes)
    batch = next(loader.iterate())
    for name in ("image_first", "image_second"):
        assert batch[name].shape == (4, 1, 16, 16, 3) and batch[name].dtype == np.float32
        assert 0.2 < batch[name].max() <= 1
    assert batch["label"].shape == (4,)


@pytest.mark.parametrize(
    "default, size",
    [
        (defaults.classification, 32),
        (defaults.classification_eval, 32),
        (defaults.segmentation, (40, 32)),
        (defaults.segmentation_eval, (40, 32)),
        (defaults.detection, (40, 32)),
        (defaults.detection_eval, (40, 32)),
        (defaults.diffusion, 16),
        (defaults.view, 20),
    ],
)
def test_defaults_give_the_size_asked_for_whatever_comes_in(default, size):
    expected = (size, size) if isinstance(size, int) else size
    for shape in ((50, 70, 3), (9, 31, 1), (1, 1, 3)):
        for seed in range(4):
            given = scene(*shape)
            result = default(given, np.random.default_rng(seed), size=size)
            assert result["image"].shape == (*expected, shape[2])
            assert result["image"].dtype == np.uint8 and result["mask"].shape == expected
            x1, _, x2, y2 = result["boxes"].T
            assert (x1 >= 0).all() and (x2 <= expected[1]).all() and (y2 <= expected[0]).all()
            assert len(result["box_labels"]) == len(result["boxes"])
            if "eval" in default.__name__:
                assert_same(result, default(given, None, size=size))
    if default in (defaults.detection_eval, defaults.segmentation_eval):
        assert len(default(scene(50, 70), None, size=size)["boxes"]) == 3


def test_a_config_names_transforms_and_their_settings():
    config = dict(
        affine=dict(type="data.transforms.geometry.random_affine", degrees=10.0),
        both=dict(
            type="data.transforms.in_order",
            jitter=dict(type="data.transforms.colour.random_jitter", hue=0.1),
            erase=dict(type="data.transforms.erasing.random_erasing", p=1.0),
        ),
        views=dict(
            type="data.transforms.multi_crop.multi_crop",
            views=dict(large=dict(type="data.transforms.defaults.view", size=20)),
            counts=dict(large=2),
        ),
    )
    transforms = build(config)
    result = in_order(scene(30, 30), np.random.default_rng(0), **transforms)
    assert result["image_large"].shape == (2, 20, 20, 3)
    config["affine"]["degreess"] = 3
    with pytest.raises(InputError, match=r"config.affine.degreess: .*did you mean degrees"):
        build(config)
    wrong = build(dict(type="data.transforms.geometry.random_affine", degrees=-1))
    source = Arrays({"image": np.zeros((2, 4, 4, 3), np.uint8)})
    with pytest.raises(InputError, match="degrees is -1; it must be"):
        next(Loader(source, 2, transforms=(wrong,)).iterate())
