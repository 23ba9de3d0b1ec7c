import functools

import numpy as np
import pytest

from cvjax.data import transforms

RANDOM = [
    transforms.random_flip,
    transforms.random_translate,
    transforms.random_crop,
    functools.partial(transforms.random_affine, degrees=30, scale=(0.8, 1.2), pixels=2),
]


def example(height=8, width=6, channels=3):
    shape = (height, width, channels)
    image = np.random.default_rng(1).integers(1, 256, size=shape, dtype=np.uint8)
    image.flags.writeable = False
    return {"image": image, "label": np.int32(3)}


class Fixed:
    """Stands for a generator: gives the numbers that a test wants drawn."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)

    def integers(self, high):
        return self.numbers.pop(0)

    def uniform(self, low, high, size=None):
        return np.array(self.numbers.pop(0))


@pytest.mark.parametrize("transform", RANDOM)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_shape_type_and_other_fields_stay_and_the_seed_decides(transform, channels):
    given = example(channels=channels)
    before = given["image"].copy()
    results = [transform(given, np.random.default_rng(seed)) for seed in (0, 0, *range(1, 20))]
    for result in results:
        assert result["image"].shape == (8, 6, channels) and result["image"].dtype == np.uint8
        assert result["label"] == 3
    np.testing.assert_array_equal(results[0]["image"], results[1]["image"])
    assert len({result["image"].tobytes() for result in results}) > 1
    np.testing.assert_array_equal(given["image"], before)


@pytest.mark.parametrize(
    "transform",
    [
        functools.partial(transforms.random_translate, pixels=0),
        functools.partial(transforms.random_crop, padding=0),
        transforms.random_affine,
        functools.partial(transforms.resize, size=6),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_asked_for_is_nothing_done(transform, channels):
    given = example(6, 6, channels)
    result = transform(given, np.random.default_rng(0))
    np.testing.assert_array_equal(result["image"], given["image"])


def test_flip_mirrors_left_and_right_half_of_the_time():
    given = example()
    flipped = transforms.random_flip(given, Fixed(0.4))["image"]
    np.testing.assert_array_equal(flipped, given["image"][:, ::-1])
    same = transforms.random_flip(given, Fixed(0.6))["image"]
    np.testing.assert_array_equal(same, given["image"])


def test_translate_uncovers_fill():
    image = example()["image"]
    moved = transforms.random_translate({"image": image}, Fixed(0, 3), pixels=2, fill=7)["image"]
    np.testing.assert_array_equal(moved[2:, :-1], image[:-2, 1:])
    assert (moved[:2] == 7).all() and (moved[:, -1] == 7).all()


def test_translate_reaches_every_place_equally_often():
    image = np.zeros((5, 5, 1), np.uint8)
    image[2, 2] = 1
    rng = np.random.default_rng(0)
    moved = [transforms.random_translate({"image": image}, rng)["image"] for _ in range(2500)]
    assert np.sum(moved, axis=0, dtype=int).min() > 60


def test_crop_shows_the_mirror_image_beyond_the_edge():
    image = example()["image"]
    cropped = transforms.random_crop({"image": image}, Fixed(0, 2), padding=2)["image"]
    np.testing.assert_array_equal(cropped[2:], image[:-2])
    np.testing.assert_array_equal(cropped[:2], image[[2, 1]])


@pytest.mark.parametrize("channels", [1, 3])
def test_affine_quarter_turn_is_exact_to_one_level(channels):
    image = example(7, 7, channels)["image"]
    turned = transforms.random_affine({"image": image}, Fixed(90, 1, (0, 0)), degrees=90)["image"]
    np.testing.assert_allclose(turned.astype(int), np.rot90(image, k=-1), atol=1)


def test_affine_moves_right_and_down_into_black():
    image = example(6, 8)["image"]
    moved = transforms.random_affine({"image": image}, Fixed(0, 1, (2, 1)), pixels=2)["image"]
    np.testing.assert_array_equal(moved[1:, 2:], image[:-1, :-2])
    assert not moved[0].any() and not moved[:, :2].any()


def test_affine_scale_above_one_enlarges_about_the_centre():
    image = np.zeros((8, 8, 1), np.uint8)
    image[3:5, 3:5] = 200
    large = transforms.random_affine({"image": image}, Fixed(0, 2, (0, 0)), scale=(1, 2))["image"]
    assert (large[3:5, 3:5] == 200).all()
    np.testing.assert_array_equal(large, large[::-1, ::-1])
    ratio = large.sum(dtype=int) / image.sum(dtype=int)
    assert 3.8 < ratio < 4.2


def test_resize_scales_the_shorter_side_and_cuts_out_the_middle():
    image = np.repeat(np.uint8([10, 20, 30]), 4)[None, :, None].repeat(4, axis=0)
    assert (transforms.resize({"image": image}, None, size=4)["image"] == 20).all()
    small = transforms.resize(example(9, 12, 2), None, size=5)["image"]
    assert small.shape == (5, 5, 2) and small.dtype == np.uint8


def test_resize_is_antialiased():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    small = transforms.resize({"image": board}, None, size=8)["image"]
    assert abs(small[1:-1, 1:-1].astype(int) - 127).max() < 5
