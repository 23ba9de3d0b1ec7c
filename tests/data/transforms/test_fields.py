"""Image, boxes, masks and points move together: every geometric transform, to half a pixel."""

from functools import partial

import numpy as np
import pytest

from cvjax.data.transforms import defaults, fields, geometry, in_order, policies
from cvjax.errors import InputError

MOVES = [
    name
    for name in policies._space(31, 0.3, (9, 9), 30, 0.9, bits=(8, 4))
    if name in policies._MOVES
]


def move(name):
    def transform(example, rng):
        strength = policies._space(31, 0.3, (9, 9), 30, 0.9, bits=(8, 4))[name][rng.integers(31)]
        return policies._apply(example, rng, name, strength, 0, "bilinear")

    return transform


# Those that enlarge or keep the size: a single painted pixel does not fall between samples.
GEOMETRIC = {
    "flip": partial(geometry.random_flip, p=1.0),
    "vertical flip": partial(geometry.random_vertical_flip, p=1.0),
    "quarter turn": geometry.random_quarter_turn,
    "center crop": partial(geometry.center_crop, size=(30, 21)),
    "center crop beyond": partial(geometry.center_crop, size=60),
    "crop": partial(geometry.random_crop, size=(30, 20)),
    "crop with padding": partial(geometry.random_crop, padding=5, fill=9),
    "crop beyond": partial(geometry.random_crop, size=(50, 60)),
    "resize": partial(geometry.resize, size=(67, 80)),
    "resize cubic": partial(geometry.resize, size=(67, 80), interpolation="bicubic"),
    "resize nearest": partial(geometry.resize, size=(67, 80), interpolation="nearest"),
    "resize plain": partial(geometry.resize, size=(47, 61), antialias=False),
    "resize smaller": partial(geometry.resize, size=(29, 23)),
    "resize shorter": partial(geometry.resize_shorter, size=50),
    "resize and pad": partial(geometry.resize_and_pad, size=(70, 50)),
    "scale crop": partial(geometry.random_scale_crop, size=(50, 40), scale=(0.7, 2.0)),
    "resized crop": partial(geometry.random_resized_crop, size=48),
    "rotation": partial(geometry.random_rotation, degrees=180),
    "affine": partial(
        geometry.random_affine, degrees=30, scale=(0.9, 1.5), pixels=4, shear=15,
    ),
    "affine nearest": partial(
        geometry.random_affine, degrees=30, scale=(1.2, 1.5), interpolation="nearest"
    ),
    "perspective": partial(geometry.random_perspective, distortion=0.3, p=1.0),
    "detection": partial(defaults.detection, size=90),
    "in order": partial(
        in_order,
        a=partial(geometry.random_affine, degrees=20),
        b=partial(geometry.random_resized_crop, size=(60, 50), scale=(0.5, 1.0)),
        c=geometry.random_flip,
    ),
    **{name: move(name) for name in MOVES},
}  # fmt: skip


def painted(row, column, height=41, width=33, channels=3):
    """A black image with one white pixel, the middle of an object of 3x3 pixels, and its point."""
    image = np.zeros((height, width, channels), np.uint8)
    image[row, column] = 255
    is_object = np.zeros((height, width), bool)
    is_object[row - 1 : row + 2, column - 1 : column + 2] = True
    example = {
        "image": image,
        "mask": is_object.astype(np.uint8),
        "masks": is_object[None],
        "boxes": np.float32([[column - 1, row - 1, column + 2, row + 2]]),
        "box_labels": np.int32([5]),
        "crowd": np.bool_([True]),
        "ignore": np.bool_([False]),
        "area": np.float32([9]),
        "scale": np.float32(1),
        "keypoints": np.float32([[[column + 0.5, row + 0.5, 2]]]),
        "label": np.int32(3),
    }
    for value in example.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return example


def middle(weights):
    """The centroid, x and y."""
    weights = weights.astype(float)
    rows, columns = np.indices(weights.shape) + 0.5
    return np.array([(columns * weights).sum(), (rows * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_painted_pixel_lands_on_its_point(name):
    seen = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        given = painted(rng.integers(4, 37), rng.integers(4, 29))
        result = GEOMETRIC[name](given, rng)
        height, width = result["image"].shape[:2]
        assert result["mask"].shape == (height, width)
        objects = len(result["boxes"])
        assert len(result["masks"]) == len(result["box_labels"]) == len(result["keypoints"])
        assert len(result["keypoints"]) == objects and result["masks"].shape[1:] == (height, width)
        assert len(result["crowd"]) == len(result["ignore"]) == len(result["area"]) == objects
        assert result["label"] == 3
        if not objects:
            if name != "detection":  # it also drops what is left of an object, if that is small
                assert result["image"].max() <= 9 and not (result["mask"] == 1).any()
            continue
        point, (x1, y1, x2, y2) = result["keypoints"][0, 0, :2], result["boxes"][0]
        if min(*point, width - point[0], height - point[1]) < 5:  # its picture may be cut
            continue
        seen += 1
        assert result["keypoints"][0, 0, 2] == 2 and result["box_labels"].tolist() == [5]
        assert result["crowd"].tolist() == [True] and result["ignore"].tolist() == [False]
        if name not in ("perspective", "in order"):  # no one scale; a box around a box around it
            assert result["area"][0] == pytest.approx(9 * result["scale"] ** 2, rel=1e-4)
        assert x1 <= point[0] <= x2 and y1 <= point[1] <= y2
        image = np.where(result["image"][..., 0] > 9, result["image"][..., 0], 0)
        # What takes the nearest pixel twice may be off by half a pixel each time.
        twice = name == "in order"
        assert np.abs(middle(image) - point).max() <= 0.5, (seed, point)
        for weights in (result["mask"] == 1, result["masks"][0]):
            assert np.abs(middle(weights) - point).max() <= (1 if twice else 0.5), (seed, point)
        # The middle of each pixel of it is in its box, or on the edge but for rounding.
        slack = 1 if twice else 0.001
        rows, columns = (index + 0.5 for index in np.nonzero(result["masks"][0]))
        assert x1 <= columns.min() + slack and columns.max() - slack <= x2
        assert y1 <= rows.min() + slack and rows.max() - slack <= y2
    assert seen >= 5


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_padded_example_keeps_its_rows_and_is_else_the_same(name):
    """Whatever is in the rows of padding, those that are left come first and zeros after them."""
    given = scene(41, 33, objects=6, seed=4)
    plain = {**given, "box_valid": np.ones(6, bool)}
    valid = np.array([True, False, True, True, False, False])
    garbage = {**given, "box_valid": valid}
    real = {k: v[valid] if k in OBJECTS else v for k, v in given.items()}
    seen = 0
    for seed in range(8):
        expected = GEOMETRIC[name](real, np.random.default_rng(seed))
        result = GEOMETRIC[name](garbage, np.random.default_rng(seed))
        count = len(expected["boxes"])
        seen += count
        assert result["box_valid"].tolist() == [k < count for k in range(6)]
        for field, value in expected.items():
            if field in OBJECTS:
                np.testing.assert_array_equal(result[field][:count], value, err_msg=field)
                assert len(result[field]) == 6
                assert not np.any(result[field][count:].astype(bool)), field
            else:
                np.testing.assert_array_equal(result[field], value, err_msg=field)
    assert seen
    assert len(GEOMETRIC[name](plain, np.random.default_rng(0))["boxes"]) == 6


def test_the_area_is_that_of_the_part_of_the_box_that_is_left():
    given = {
        "image": np.zeros((20, 40, 3), np.uint8), "boxes": np.float32([[10, 5, 30, 15]]),
        "area": np.float32([80]), "scale": np.float32(0.5),
    }  # fmt: skip
    half = fields.crop(given, 0, 20, 20, 20)
    assert half["area"].tolist() == [40] and half["scale"] == 0.5
    double = fields.resize(given, (40, 80))
    assert double["area"].tolist() == [320] and double["scale"] == 1
    stretched = fields.resize(given, (20, 80))
    assert stretched["area"].tolist() == [160]
    assert stretched["scale"] == pytest.approx(0.5 * 2**0.5)
    for one in (half, double, stretched):
        assert one["area"].dtype == one["scale"].dtype == np.float32
    assert fields.quarter_turn(given, 1)["area"].tolist() == [80]
    # A perspective enlarges what is near: the areas of small boxes are those of their corners.
    matrix = geometry.perspective_matrix(
        [[0, 0], [40, 0], [40, 20], [0, 20]], [[2, 1], [39, 3], [36, 19], [1, 15]]
    )
    boxes = np.float32([[5, 5, 5.5, 5.5], [30, 12, 30.5, 12.5]])
    small = {"image": given["image"], "boxes": boxes, "area": np.float32([0.25, 0.25])}
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    x, y = np.moveaxis(fields.moved_points(matrix, corners), -1, 0)
    expected = abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(axis=1)) / 2
    np.testing.assert_allclose(fields.warp(small, matrix)["area"], expected, rtol=1e-3)
    assert expected[0] != pytest.approx(expected[1], rel=0.05)


def test_an_example_knows_what_its_points_become_in_a_mirror():
    given = {**scene(), "keypoint_swap": np.int32([1, 0, 2, 3])}
    expected = fields.flip(scene(), swap=(1, 0, 2, 3))
    np.testing.assert_array_equal(fields.flip(given)["keypoints"], expected["keypoints"])
    other = fields.flip(given, swap=(0, 1, 3, 2))
    np.testing.assert_array_equal(
        other["keypoints"], fields.flip(scene(), swap=(0, 1, 3, 2))["keypoints"]
    )
    with pytest.raises(InputError, match="must name each of the 4 keypoints once"):
        fields.flip({**scene(), "keypoint_swap": np.int32([0, 0, 2, 3])})


OBJECTS = (
    "boxes", "box_labels", "box_names", "box_valid", "masks", "keypoints", "crowd", "ignore",
    "area",
)  # fmt: skip


def scene(height=9, width=12, channels=3, objects=3, seed=0):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (objects, 2, 2)), axis=1) * [width, height]
    example = {
        "image": rng.integers(0, 256, (height, width, channels), dtype=np.uint8),
        "mask": rng.integers(0, 5, (height, width)).astype(np.uint8),
        "masks": rng.random((objects, height, width)) < 0.5,
        "boxes": corners.reshape(objects, 4).astype(np.float32),
        "box_labels": np.arange(objects, dtype=np.int32),
        "box_names": np.array([f"object {i}" for i in range(objects)]),
        "crowd": np.arange(objects) % 2 == 1,
        "ignore": np.arange(objects) % 3 == 1,
        "area": np.arange(1, objects + 1, dtype=np.float32),
        "keypoints": np.concatenate(
            [rng.uniform(0, 9, (objects, 4, 2)), rng.integers(0, 3, (objects, 4, 1))], axis=-1
        ).astype(np.float32),
        "label": np.int32(1),
    }
    for value in example.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return example


def assert_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("shape", [(9, 12, 3), (1, 1, 1), (8, 1, 2), (5, 5, 5)])
def test_two_flips_and_four_quarter_turns_are_the_identity(shape):
    given = scene(*shape, objects=3)
    given = fields.visible(given)
    for vertical in (False, True):
        once = fields.flip(given, vertical=vertical)
        assert_same(fields.flip(once, vertical=vertical), given, 1e-6)
        always = partial(geometry.random_flip, rng=np.random.default_rng(0), p=1.0)
        assert_same(always(always(given)), given, 1e-6)
    turned = given
    for quarters in range(1, 5):
        turned = fields.quarter_turn(turned, 1)
        assert_same(turned, fields.quarter_turn(given, quarters), 2e-6)
    assert_same(turned, given, 2e-6)
    # Half a turn is both mirrors.
    both = fields.flip(fields.flip(given), vertical=True)
    assert_same(fields.quarter_turn(given, 2), both, 2e-6)


def test_flips_and_turns_are_those_of_numpy():
    given = scene()
    image, mask, masks = given["image"], given["mask"], given["masks"]
    flipped, turned = fields.flip(given), fields.quarter_turn(given, 1)
    np.testing.assert_array_equal(flipped["image"], image[:, ::-1])
    np.testing.assert_array_equal(flipped["masks"], masks[..., ::-1])
    np.testing.assert_array_equal(turned["image"], np.rot90(image))
    np.testing.assert_array_equal(turned["mask"], np.rot90(mask))
    x1, y1, x2, y2 = given["boxes"].T
    np.testing.assert_allclose(flipped["boxes"], np.stack([12 - x2, y1, 12 - x1, y2], 1), rtol=1e-6)
    np.testing.assert_allclose(turned["boxes"], np.stack([y1, 12 - x2, y2, 12 - x1], 1), rtol=1e-6)


def test_a_quarter_turn_by_warping_is_the_exact_one():
    for size in (7, 8):
        given = scene(size, size)
        matrix = geometry.affine_matrix((size, size), degrees=-90)
        for interpolation in ("nearest", "bilinear", "bicubic"):
            warped = fields.warp(given, matrix, interpolation=interpolation)
            assert_same(warped, fields.quarter_turn(given, 1), 1e-5)


def test_points_swap_their_names_in_the_mirror():
    given = scene()
    flipped = fields.flip(given, swap=(0, 2, 1, 3))["keypoints"]
    plain = fields.flip(given)["keypoints"]
    np.testing.assert_array_equal(flipped, plain[:, [0, 2, 1, 3]])
    with pytest.raises(InputError, match="each of the 4 keypoints"):
        fields.flip(given, swap=(0, 1))


def test_what_leaves_the_image_goes_with_all_that_is_known_of_it():
    given = scene(20, 20)
    boxes = np.float32([[0, 0, 4, 4], [6, 6, 14, 12], [15, 2, 25, 8]])
    points = np.float32(
        [[[1, 1, 2], [3, 3, 1]], [[7, 7, 2], [13, 11, 2]], [[16, 3, 2], [10, 10, 0]]]
    )
    given = {**given, "boxes": boxes, "keypoints": points}
    result = fields.crop(given, 5, 5, 10, 7)
    np.testing.assert_array_equal(result["boxes"], [[1, 1, 7, 7]])
    assert result["box_labels"].tolist() == [1] and result["box_names"].tolist() == ["object 1"]
    np.testing.assert_array_equal(result["keypoints"], [[[2, 2, 2], [8, 6, 0]]])
    np.testing.assert_array_equal(result["masks"], given["masks"][1:2, 5:15, 5:12])
    np.testing.assert_array_equal(result["mask"], given["mask"][5:15, 5:12])


@pytest.mark.parametrize("is_padded", [False, True])
def test_of_an_object_with_a_mask_a_pixel_must_be_left(is_padded):
    """The box of a diagonal has corners with nothing in them."""
    masks = np.zeros((4, 8, 8), bool)
    masks[0] = np.eye(8, dtype=bool)
    masks[1, 2, 5], masks[2, 3, 7] = True, True  # the second is whole, the last has no mask
    given = {
        "image": np.zeros((8, 8, 1), np.uint8),
        "boxes": np.float32([[0, 0, 8, 8], [5, 2, 6, 3], [3, 3, 8, 4], [4, 0, 8, 4]]),
        "masks": masks,
        "box_labels": np.arange(4),
    }
    if is_padded:
        given["box_valid"] = np.ones(4, bool)
    result = fields.crop(given, 0, 5, 4, 2)  # columns 5 and 6 of rows 0 to 3
    assert result["box_labels"].tolist() == ([1, 3, 0, 0] if is_padded else [1, 3])
    if is_padded:
        assert result["box_valid"].tolist() == [True, True, False, False]
    # By becoming smaller alone no object is lost, even if no pixel samples its mask.
    small = fields.resize(given, 3)
    assert not small["masks"][1].any() and small["box_labels"].tolist() == [0, 1, 2, 3]


def test_a_box_that_touches_the_image_from_outside_is_gone_and_a_point_in_it_stays():
    boxes = np.float32(
        [[-3, 0, 0, 5], [9, 0, 12, 3], [8.99, 0, 12, 3], [4, 4, 4, 4], [-9, -9, -1, -1]]
    )
    given = {"image": np.zeros((9, 9, 3), np.uint8), "boxes": boxes, "box_id": np.arange(5)}
    for transform in (fields.visible, fields.flip, partial(fields.resize, size=9)):
        assert transform(given)["box_id"].tolist() == [2, 3]
    for seed in range(6):  # Whether or not the coin says flip.
        assert len(geometry.random_flip(given, np.random.default_rng(seed))["boxes"]) == 2


def test_a_window_beside_the_image_shows_nothing_of_it():
    for top, left in ((20, 0), (-20, 0), (0, 30), (0, -30), (9, 12)):
        result = fields.crop(scene(), top, left, 8, 5, fill=7)
        assert (result["image"] == 7).all() and (result["mask"] == 255).all()
        assert len(result["boxes"]) == len(result["masks"]) == len(result["keypoints"]) == 0


def test_masks_alone_and_points_alone():
    masks = np.zeros((2, 6, 6), bool)
    masks[0, :2], masks[1, 3:] = True, True
    given = {"image": np.zeros((6, 6, 1), np.uint8), "masks": masks, "box_labels": np.int32([1, 2])}
    result = fields.crop(given, 3, 0, 3, 6)
    assert result["box_labels"].tolist() == [2] and result["masks"].shape == (1, 3, 6)
    points = {"image": given["image"], "keypoints": np.float32([[[0, 0, 2]], [[6, 6, 1]]])}
    result = fields.crop(points, 3, 0, 3, 6)
    np.testing.assert_array_equal(result["keypoints"], [[[0, -3, 0]], [[6, 3, 1]]])


def test_empty_boxes_stay_empty():
    for name, transform in GEOMETRIC.items():
        result = transform(scene(30, 31, objects=0), np.random.default_rng(1))
        height, width = result["image"].shape[:2]
        shapes = {"boxes": (0, 4), "masks": (0, height, width), "keypoints": (0, 4, 3)}
        for field, shape in {**shapes, "box_labels": (0,)}.items():
            assert result[field].shape == shape, (name, field)
        assert result["boxes"].dtype == np.float32 and result["masks"].dtype == bool


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 3), (1, 7, 3), (7, 1, 1), (5, 4, 2), (6, 7, 5)]
)
def test_odd_shapes_keep_their_types_and_nothing_is_written_into(shape):
    given = scene(*shape)
    before = {name: np.array(value) for name, value in given.items()}
    for name, transform in GEOMETRIC.items():
        result = transform(given, np.random.default_rng(3))
        assert result.keys() == given.keys(), name
        for field in given:
            assert np.asarray(result[field]).dtype == before[field].dtype, (name, field)
            np.testing.assert_array_equal(given[field], before[field])
        assert result["image"].ndim == 3 and result["image"].shape[-1] == shape[-1], name
        again = transform(given, np.random.default_rng(3))
        assert_same(result, again)
        others = [transform(given, np.random.default_rng(s))["image"] for s in range(2)]
        assert all(other.shape[-1] == shape[-1] for other in others)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64, np.uint32])
def test_masks_of_any_integer_are_ignored_outside(dtype):
    mask = np.full((6, 8), 200, dtype)
    given = {"image": np.full((6, 8, 3), 50, np.uint8), "mask": mask}
    for result in (
        fields.crop(given, -2, -3, 12, 12, fill=(1, 2, 3)),
        fields.warp(given, geometry.affine_matrix((6, 8), degrees=45), fill=(1, 2, 3)),
    ):
        assert result["mask"].dtype == dtype
        assert set(np.unique(result["mask"])) == {200, 255}
        assert (result["image"][result["mask"] == 255] == [1, 2, 3]).all(axis=-1).mean() > 0.5


def test_reflection_continues_the_picture_and_its_classes_but_no_object():
    given = scene(5, 4, objects=1)
    result = fields.crop(given, -3, -2, 11, 9, fill="reflect")
    padded = np.pad(given["image"], ((3, 3), (2, 3), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(result["image"], padded)
    np.testing.assert_array_equal(
        result["mask"], np.pad(given["mask"], ((3, 3), (2, 3)), mode="reflect")
    )
    if len(result["masks"]):
        assert result["masks"].sum() == given["masks"].sum()
    tiny = fields.crop({"image": np.full((1, 1, 3), 7, np.uint8)}, -4, -4, 9, 9, fill="reflect")
    assert (tiny["image"] == 7).all()


def bilinear(image, matrix, height, width, fill):
    """Slowly: the value at each pixel's centre, from four neighbours in float64."""
    inverse = np.linalg.inv(matrix)
    result = np.empty((height, width))

    def at(r, c):
        is_inside = 0 <= r < image.shape[0] and 0 <= c < image.shape[1]
        return float(image[r, c]) if is_inside else fill

    for row in range(height):
        for column in range(width):
            x, y, w = inverse @ (column + 0.5, row + 0.5, 1)
            x, y = x / w - 0.5, y / w - 0.5
            left, top = int(np.floor(x)), int(np.floor(y))
            right, down = x - left, y - top
            result[row, column] = (
                at(top, left) * (1 - right) * (1 - down) + at(top, left + 1) * right * (1 - down)
                + at(top + 1, left) * (1 - right) * down + at(top + 1, left + 1) * right * down
            )  # fmt: skip
    return result


@pytest.mark.parametrize(
    "matrix",
    [
        geometry.affine_matrix((13, 17), degrees=33, scale=1.3, shear=(5, -20), pixels=(2.3, -1.1)),
        geometry.affine_matrix((13, 17), degrees=-160, scale=0.6),
        geometry.perspective_matrix(
            [[0, 0], [17, 0], [17, 13], [0, 13]], [[2, 1], [16, 3], [14, 12], [1, 10]]
        ),
    ],
)
def test_warping_is_bilinear_interpolation(matrix):
    image = scene(13, 17, 1)["image"]
    warped = fields.warp({"image": image}, matrix, size=(15, 19), fill=40)["image"]
    # Half a level of rounding, and what float32 adds to the coordinates: 1e-4 pixels of 255.
    expected = bilinear(image[..., 0], matrix, 15, 19, 40)
    np.testing.assert_allclose(warped[..., 0], expected, rtol=0, atol=0.55)
    # Whatever the number of channels: OpenCV interpolates two by another way.
    noise = np.random.default_rng(0).integers(0, 256, (13, 17, 6), np.uint8)
    fills = np.arange(40, 46)
    for count in (2, 3, 5, 6):
        image = {"image": noise[..., :count]}
        found = fields.warp(image, matrix, size=(15, 19), fill=fills[:count].tolist())["image"]
        for channel in range(count):
            expected = bilinear(noise[..., channel], matrix, 15, 19, fills[channel])
            np.testing.assert_allclose(found[..., channel], expected, rtol=0, atol=0.55)


def test_a_matrix_for_four_points_takes_them_there():
    start = np.array([[0, 0], [9, 0], [9, 7], [0, 7]])
    end = np.array([[1, 2], [8, 1], [9, 6], [0, 5]])
    matrix = geometry.perspective_matrix(start, end)
    np.testing.assert_allclose(fields.moved_points(matrix, start), end, atol=1e-12)


def test_affine_moves_right_down_and_turns_clockwise():
    image = scene(7, 7)["image"]
    moved = fields.warp({"image": image}, geometry.affine_matrix((7, 7), pixels=(2, 1)))["image"]
    np.testing.assert_array_equal(moved[1:, 2:], image[:-1, :-2])
    assert not moved[0].any() and not moved[:, :2].any()
    turned = fields.warp({"image": image}, geometry.affine_matrix((7, 7), degrees=90))["image"]
    np.testing.assert_array_equal(turned, np.rot90(image, k=-1))
    corner = geometry.affine_matrix((7, 7), degrees=20, scale=2, center=(0, 0))
    np.testing.assert_allclose(fields.moved_points(corner, np.zeros(2)), 0)


def test_nothing_asked_for_is_nothing_done():
    given = fields.visible(scene())
    rng = np.random.default_rng(0)
    for transform in (
        geometry.random_affine,
        partial(geometry.random_rotation, degrees=0),
        partial(geometry.random_perspective, distortion=0, p=1.0),
        partial(geometry.random_flip, p=0.0),
        partial(geometry.random_crop, padding=0),
        partial(geometry.resize, size=(9, 12)),
        partial(geometry.random_resized_crop, size=(9, 12), scale=(1, 1), ratio=(4 / 3, 4 / 3)),
        partial(policies.rand_augment, operations=0),
    ):
        assert_same(transform(given, rng), given, 1e-5)


def test_a_random_crop_reaches_every_place_equally_often():
    image = np.zeros((5, 5, 1), np.uint8)
    image[2, 2] = 1
    rng = np.random.default_rng(0)
    moved = [geometry.random_crop({"image": image}, rng, padding=2)["image"] for _ in range(2500)]
    assert np.sum(moved, axis=0, dtype=int).min() > 60


def test_a_resized_crop_has_the_area_and_the_shape_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, height, width = geometry._window(200, 150, rng, (0.2, 0.6), (0.5, 2.0))
        assert 0 <= top <= 200 - height and 0 <= left <= 150 - width
        assert 0.19 < height * width / (200 * 150) < 0.61 and 0.49 < width / height < 2.04
    # No part of it is so wide: the middle, as wide as can be.
    assert geometry._window(100, 10, rng, (0.9, 1.0), (2.0, 3.0)) == (47, 0, 5, 10)
    assert geometry._window(10, 100, rng, (0.9, 1.0), (0.5, 0.5)) == (0, 47, 10, 5)
    assert geometry._window(1, 1, rng, (0.0, 0.0), (1.0, 1.0)) == (0, 0, 1, 1)


def test_small_boxes_are_dropped_where_asked():
    given = {**scene(), "boxes": np.float32([[0, 0, 0.5, 3], [1, 1, 2, 2], [0, 0, 5, 0.9]])}
    result = geometry.drop_small_boxes(given, None, pixels=1)
    assert result["box_labels"].tolist() == [1] and len(result["masks"]) == 1


def test_resizing_is_antialiased_or_not():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    small = fields.resize({"image": board}, 8)["image"]
    assert abs(small[1:-1, 1:-1].astype(int) - 127).max() < 5
    rough = fields.resize({"image": board.repeat(2, 0).repeat(2, 1)}, 61, antialias=False)["image"]
    assert rough.max() == 255 and rough.min() == 0


@pytest.mark.parametrize(
    "transform, message",
    [
        (partial(geometry.random_flip, p=1.5), r"p is 1.5; it must be in \[0, 1\]"),
        (partial(geometry.random_affine, degrees=-3), "degrees is -3"),
        (partial(geometry.random_affine, scale=(2, 1)), "smaller number"),
        (partial(geometry.random_affine, scale=(0.0, 1)), r"scale\[0\] is 0.0"),
        (partial(geometry.random_affine, scale=1.5), "two numbers"),
        (partial(geometry.random_affine, interpolation="linear"), "it can be .*'bilinear'"),
        (partial(geometry.random_affine, fill=300), r"fill is 300; it must be in \[0, 255\]"),
        (partial(geometry.random_affine, fill=(1, 2)), "or 3 such values"),
        (partial(geometry.random_rotation, degrees="x"), "must be a number"),
        (partial(geometry.random_perspective, distortion=0.9), "distortion is 0.9"),
        (partial(geometry.random_crop, padding=1.5), "whole number"),
        (partial(geometry.random_crop, fill="mirror"), "fill is 'mirror'"),
        (partial(geometry.center_crop, size=0), "size is 0; it must be"),
        (partial(geometry.resize, size=(3, 4, 5)), "size is "),
        (partial(geometry.random_resized_crop, size=8, scale=(0.5, 1.5)), r"scale\[1\] is 1.5"),
        (partial(policies.rand_augment, magnitude=31), r"magnitude is 31; it must be in \[0, 30\]"),
        (partial(policies.rand_augment, operations=-1), "operations is -1"),
        (partial(policies.rand_augment, operations=0, interpolation="x"), "interpolation is 'x'"),
        (partial(policies.trivial_augment, fill=(1, 2)), "or 3 such values"),
        (partial(policies.augmix, fill=300), "fill is 300"),
        (partial(geometry.random_perspective, p=0, fill=300), "fill is 300"),
        (partial(geometry.drop_small_boxes, pixels=np.nan), "pixels is nan"),
        (partial(policies.augmix), "augmix cannot move boxes"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_the_first_example(transform, message):
    with pytest.raises(InputError, match=message):
        transform(scene(), np.random.default_rng(0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": np.zeros((9, 12, 3))}, "uint8"),
        ({"image": np.zeros((9, 12), np.uint8)}, "height, width, channels"),
        ({"image": np.zeros((0, 12, 3), np.uint8)}, "no pixels"),
        ({"mask": np.zeros((9, 11), np.uint8)}, "mask must be integers"),
        ({"mask": np.zeros((9, 12), bool)}, "mask must be integers"),
        ({"masks": np.zeros((3, 9, 12), np.uint8)}, "masks must be bool"),
        ({"boxes": np.zeros((3, 5), np.float32)}, r"boxes must be \[n, 4\]"),
        ({"boxes": [[1, 1, 2, 2]] * 3}, "boxes must be an array of NumPy, not a list"),
        ({"boxes": np.full((3, 4), np.nan, np.float32)}, "a box is .nan.*must be finite"),
        ({"box_labels": np.zeros(2, np.int32)}, "box_labels 2"),
        ({"keypoints": np.zeros((3, 4), np.float32)}, "keypoints must be"),
    ],
)
def test_fields_that_do_not_fit_are_named(change, message):
    with pytest.raises(InputError, match=message):
        fields.flip({**scene(), **change})


def test_a_homography_has_no_scale():
    matrix = np.array([[0.9, 0.1, 40_000.0], [0.0, 1.0, 0.0], [0.001, 0.0, 1.0]])
    for move in (matrix, np.eye(3)):
        expected = fields.warp(scene(), move)
        for scale in (1e-5, 1e5, -1e-3):
            found = fields.warp(scene(), scale * move)
            np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=1e-6)
            # The inverse may differ by a rounding, and so a pixel by one level.
            np.testing.assert_allclose(np.int32(found["image"]), expected["image"], atol=1)


def test_a_matrix_that_folds_the_image_is_refused():
    folding = np.array([[1.0, 0, 0], [0, 1, 0], [-0.2, 0, 1]])
    for matrix in (folding, np.zeros((3, 3)), np.full((3, 3), np.nan)):
        with pytest.raises(InputError, match="one to one"):
            fields.warp(scene(), matrix)
    with pytest.raises(InputError, match=r"the matrix is \[2, 3\]; it must be \[3, 3\]"):
        fields.warp(scene(), np.eye(3)[:2])
    with pytest.raises(InputError, match="no pixels"):
        fields.crop(scene(), 0, 0, 0, 5)
