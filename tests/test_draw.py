"""Pictures: where each pixel goes, what is refused, and that no half a file is ever seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cvjax import draw


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns", "rows"), [(7, 3, 3), (2, 10, 1), (4, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("padding", [0, 2])
def test_grid_puts_each_image_in_its_place(n, columns, rows, padding, channels):
    images = np.random.default_rng(0).uniform(0.1, 1.0, (n, 4, 5, channels)).astype(np.float32)
    picture = draw.grid(images, columns=columns, padding=padding)
    traced = jax.jit(lambda x: draw.grid(x, columns=columns, padding=padding))(images)
    columns = min(columns, n)
    expected = np.zeros(
        (rows * (4 + padding) + padding, columns * (5 + padding) + padding, channels), np.float32
    )
    for index, image in enumerate(images):
        top = padding + (index // columns) * (4 + padding)
        left = padding + (index % columns) * (5 + padding)
        expected[top : top + 4, left : left + 5] = image
    assert isinstance(picture, np.ndarray)
    np.testing.assert_array_equal(picture, expected)
    np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4)), "(2, 4, 4)"),
        (np.zeros((2, 4, 4, 2)), "(2, 4, 4, 2)"),
        (np.zeros((0, 4, 4, 3)), "(0, 4, 4, 3)"),
        (np.full((1, 4, 4, 3), 255.0), "from 255 to 255"),
        (np.full((1, 4, 4, 3), -1.0), "from -1 to -1"),
        (np.full((1, 4, 4, 3), np.nan), "nan"),
        (np.zeros((1, 4, 4, 3), np.uint8), "uint8"),
    ],
)
def test_grid_and_save_png_refuse_what_is_no_image(images, message, tmp_path):
    with pytest.raises(ValueError) as error:
        draw.grid(images)
    assert message in str(error.value)
    if images.ndim == 4 and len(images):
        with pytest.raises(ValueError):
            draw.save_png(tmp_path / "x.png", images[0])
        assert not list(tmp_path.iterdir())


def test_grid_has_columns():
    with pytest.raises(ValueError, match="columns is 0; it must be"):
        draw.grid(np.zeros((2, 4, 4, 1), np.float32), columns=0)


def test_grid_checks_shapes_inside_jit():
    with pytest.raises(ValueError, match="must be"):
        jax.jit(draw.grid)(np.zeros((2, 4, 4), np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, channels))
    path = tmp_path / "new" / "picture.png"
    draw.save_png(path, pixels / 255)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    draw.save_png(path, np.zeros((2, 2, 3)))
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        draw.save_png(path, np.ones((2, 2, 3)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "series",
    [
        {"train/loss": (np.arange(100), np.geomspace(10, 0.01, 100)), "eval/loss": ([50], [0.3])},
        {"loss": ([0, 1], [np.nan, np.inf])},
        {"loss": ([], [])},
        {f"train/{i}_loss": ([1, 2], [-1.0, 1.0]) for i in range(5)},
        {"eval/$x^$y$": ([1, 2], [3.0, 4.0]), "$\\nothing$/$x^$y$": ([1, 2], [3.0, 4.0])},
        {},
    ],
)
def test_curves_draw_whatever_a_run_can_give(series, tmp_path):
    path = tmp_path / "curves.png"
    draw.curves(path, series, title="a run of $5 and $\\nothing")
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 100
    assert list(tmp_path.iterdir()) == [path]


def test_curves_refuse_steps_without_values(tmp_path):
    with pytest.raises(ValueError, match="eval/loss: steps have shape"):
        draw.curves(tmp_path / "curves.png", {"eval/loss": ([1, 2], [0.5])})


def test_the_moving_average_keeps_a_constant_and_skips_what_is_not_finite():
    values = np.full(200, 3.0)
    values[[0, 50, 199]] = np.nan
    np.testing.assert_allclose(draw._moving_average(values), 3.0)


def test_boxes_are_framed_inside_and_cut_at_the_edge():
    image = np.zeros((8, 10, 1), np.float32)
    drawn = draw.boxes(image, [[0, 0, 10, 8], [2, 2, 5, 6], [7, -3, 30, 3]], labels=[1, 2, 2])
    assert drawn.shape == (8, 10, 3) and not image.any()
    expected = np.zeros((8, 10), int)
    expected[[0, -1]] = expected[:, [0, -1]] = 1
    expected[2:6, 2:5] = 2
    expected[3:5, 3:4] = 0
    expected[:3, 7] = expected[2, 7:] = 2
    colors = np.concatenate([[[0, 0, 0]], draw.PALETTE[1:3]]).astype(np.float32)
    np.testing.assert_allclose(drawn, colors[expected])
    np.testing.assert_array_equal(draw.boxes(image, np.zeros((0, 4))), np.zeros((8, 10, 3)))
    thick = draw.boxes(image, [[1, 1, 7, 7]], width=2)[..., 0] > 0
    assert thick.sum() == 32 and not thick[3:5, 3:5].any()
    assert (draw.boxes(image, [[3, 3, 3, 3]])[3, 3] > 0).any()  # no size is still a dot


def test_masks_are_blended_and_points_are_squares():
    image = np.full((6, 7, 3), 0.4, np.float32)
    mask = np.zeros((2, 6, 7), bool)
    mask[0, :3], mask[1, 2:, 1:] = True, True
    drawn = draw.masks(image, mask[:1], opacity=0.25)
    np.testing.assert_allclose(drawn[:3], np.broadcast_to(0.3 + 0.25 * draw.PALETTE[0], (3, 7, 3)))
    np.testing.assert_array_equal(drawn[3:], image[3:])
    both = draw.masks(image, mask, opacity=1.0)
    np.testing.assert_allclose(both[2, 1], draw.PALETTE[1])
    np.testing.assert_array_equal(draw.masks(image, np.zeros((0, 6, 7), bool)), image)
    dots = draw.points(image, [[2.5, 1.5], [-9, -9]], labels=[3, 0])
    is_dot = (dots == draw.PALETTE[3]).all(axis=-1)
    np.testing.assert_array_equal(
        np.argwhere(is_dot), [(r, c) for r in range(3) for c in (1, 2, 3)]
    )
    with pytest.raises(ValueError, match="values from"):
        draw.boxes(image * 255, [[0, 0, 1, 1]])


def test_class_colors_are_those_of_pascal_voc():
    colors = draw.class_colors()
    assert colors.shape == (256, 3) and colors.dtype == np.uint8
    expected = {
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128),
        8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
    }  # fmt: skip
    for label, color in expected.items():
        assert tuple(colors[label]) == color
    assert len({tuple(color) for color in colors}) == 256
    np.testing.assert_array_equal(draw.class_colors(21), colors[:21])


def test_painted_classes_let_the_image_through():
    image = np.full((1, 3, 3), 0.5, np.float32)
    painted = draw.paint_classes(image, np.array([[0, 1, 255]], np.uint8), opacity=0.5)
    expected = 0.25 + np.array([[[0.5, 0.5, 0.5], [128, 0, 0], [224, 224, 192]]]) / 510
    expected[0, 0] = 0.5
    np.testing.assert_allclose(painted, expected, rtol=1e-6)
    batch = draw.paint_classes(image[None], np.array([[[0, 1, 255]]]), opacity=0.5)
    np.testing.assert_array_equal(batch[0], painted)


def test_boxes_painted_inside_jit_are_those_drawn_outside():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 9, 12, 1)).astype(np.float32)
    boxes = rng.uniform(-3, 13, size=(2, 4, 4)).astype(np.float32)
    boxes[1, 0] = 0, 0, 12, 9
    boxes[1, 1] = 5, 5, 5, 5
    labels = np.array([[0, 3, 9, 12], [1, 1, 2, 0]])
    shown = np.array([[True, True, False, True], [True, True, True, False]])
    found = jax.jit(draw.paint_boxes)(images, boxes, labels, shown)
    for i in range(2):
        rows = np.flatnonzero(shown[i])[::-1]  # The first lie on top: they are drawn last.
        expected = draw.boxes(images[i], boxes[i, rows], labels[i, rows])
        np.testing.assert_allclose(found[i], expected, rtol=1e-6)
    for half in (jnp.float16(images), jnp.bfloat16(images)):  # As a model in half precision has.
        found = jax.jit(draw.paint_boxes)(half, boxes, labels, shown)
        np.testing.assert_array_equal(
            found, draw.paint_boxes(jnp.float32(half), boxes, labels, shown)
        )


def test_a_table_has_a_line_for_each_row():
    columns = {"class": ["cat", "dog"], "AP": [0.5, float("nan")]}
    picture = draw.table(columns)
    higher = draw.table({name: [*values, values[0]] for name, values in columns.items()})
    wider = draw.table({**columns, "AR": [1.0, -1.0]})
    assert picture.dtype == np.float32 and picture.min() >= 0 and picture.max() == 1
    assert higher.shape[0] - picture.shape[0] == 18 and higher.shape[1] == picture.shape[1]
    assert wider.shape[1] > picture.shape[1]
    np.testing.assert_array_equal(higher[: len(picture) - 6], picture[:-6])
    # The number is written, and what is undefined is a dash: less ink.
    lines = [(1 - higher[22 + 18 * row : 40 + 18 * row, 40:]).sum() for row in range(3)]
    assert lines[0] == lines[2] > 2 * lines[1] > 0
    assert draw.table({"class": []}).shape[0] < picture.shape[0]


@pytest.mark.parametrize("place", [4, 5, 4.5, 5.49, 5.5])
@pytest.mark.parametrize("width", [2, 3])
def test_a_point_is_a_square_of_that_width_wherever_it_is(place, width):
    picture = draw.points(np.zeros((12, 12, 1), np.float32), [[place, place]], width=width)
    rows, columns = np.nonzero(picture.any(-1))
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == width
    assert abs(rows.mean() + 0.5 - place) <= 0.5


def test_masks_of_another_size_are_refused():
    for shape in ((2, 12, 10), (1, 5, 24), (10, 12)):
        with pytest.raises(ValueError, match=r"they must be \[n, 10, 12\], as the image"):
            draw.masks(np.zeros((10, 12, 1), np.float32), np.zeros(shape, bool))


def test_painted_masks_are_those_of_masks_with_the_first_on_top():
    rng = np.random.default_rng(0)
    images = rng.random((2, 9, 11, 1), np.float32)
    masks, labels = rng.random((2, 4, 9, 11)) < 0.4, rng.integers(0, 25, (2, 4))
    shown = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
    found = jax.jit(draw.paint_masks)(images, masks, labels, shown)
    for i in range(2):
        rows = np.flatnonzero(shown[i])[::-1]
        expected = draw.masks(images[i], masks[i, rows], labels[i, rows])
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)
    half = draw.paint_masks(jnp.bfloat16(images), masks, labels, shown)
    np.testing.assert_allclose(half, jax.jit(draw.paint_masks)(images, masks, labels, shown), 0.01)
    none = draw.paint_masks(images, masks[:, :0], labels[:, :0], shown[:, :0])
    np.testing.assert_array_equal(none, np.broadcast_to(images, (2, 9, 11, 3)))
