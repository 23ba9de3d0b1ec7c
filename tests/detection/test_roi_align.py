"""ROIAlign against a loop over samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.detection.roi_align import fpn_levels, roi_align


def value(image, y, x):
    height, width = image.shape[:2]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(image.shape[-1])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    v, u = y - y0, x - x0
    top = image[y0, x0] * (1 - u) + image[y0, x1] * u
    return top * (1 - v) + (image[y1, x0] * (1 - u) + image[y1, x1] * u) * v


def slow(image, box, stride, size, samples, aligned):
    x1, y1, x2, y2 = np.float64(box) / stride - (0.5 if aligned else 0)
    high, wide = y2 - y1, x2 - x1
    if not aligned:
        high, wide = max(high, 1), max(wide, 1)
    high, wide = high / size[0], wide / size[1]
    rows, columns = samples or int(np.ceil(high)), samples or int(np.ceil(wide))
    out = np.zeros((*size, image.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            for a in range(rows):
                for b in range(columns):
                    y, x = y1 + (i + (a + 0.5) / rows) * high, x1 + (j + (b + 0.5) / columns) * wide
                    out[i, j] += value(image, y, x)
    return out / max(rows * columns, 1)


BOXES = np.array(
    [[3, 5, 21, 30], [-30, -9, 14, 13], [10, 12, 200, 150], [4, 4, 4, 4], [500, 9, 600, 90],
     [7.5, 2.25, 8.5, 40], [3, 5, 400, 300], [30, 20, 5, 6]], np.float32
)  # fmt: skip


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [2, None])
def test_samples_one_by_one(aligned, samples):
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 11, 13, 3)), rng.normal(size=(2, 6, 7, 3))]
    maps = [m.astype(np.float32) for m in maps]
    levels = rng.integers(0, 2, (2, len(BOXES)))
    boxes = np.stack([BOXES, BOXES + 1.5])
    call = jax.jit(
        lambda m, b, v: roi_align(
            m, b, v, strides=(4, 8), output_size=(3, 2), samples=samples, aligned=aligned
        )
    )
    out = call(maps, boxes, levels)
    for image in range(2):
        for row, level in enumerate(levels[image]):
            expected = slow(
                maps[level][image], boxes[image, row], (4, 8)[level], (3, 2), samples, aligned
            )
            # float32 against float64; ceil of a whole number of cells does not occur in BOXES
            np.testing.assert_allclose(out[image, row], expected, atol=2e-5)
    weight = rng.normal(size=out.shape).astype(np.float32)
    gradient, to_boxes = jax.jit(
        jax.grad(lambda m, b: jnp.sum(call(m, b, levels) * weight), argnums=(0, 1))
    )(maps, boxes)
    # Linear in the maps: <gradient, any maps> is <what the loop gives of these, weight>.
    for _ in range(2):
        others = [rng.normal(size=m.shape) for m in maps]
        expected = sum(
            np.vdot(
                slow(others[level][i], boxes[i, row], (4, 8)[level], (3, 2), samples, aligned),
                weight[i, row],
            )
            for i in range(2)
            for row, level in enumerate(levels[i])
        )
        whole = sum(np.vdot(g, m) for g, m in zip(gradient, others, strict=True))
        np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
    assert not np.any(to_boxes)


def test_garbage_chunks_and_types():
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.normal(size=(1, 20, 24, 1024)), jnp.bfloat16)
    boxes = rng.uniform(0, 60, (1, 30, 4)).astype(np.float32)  # 10 chunks of these channels
    boxes[..., 2:] += boxes[..., :2]
    call = jax.jit(lambda boxes: roi_align([features], boxes, strides=(4,), output_size=(7, 7)))
    out = call(boxes)
    assert out.dtype == jnp.bfloat16
    for row in (0, 13, 29):
        alone = call(boxes[:, row : row + 1])
        # A chunk of another size may sum in another order: float32, then rounded to bfloat16.
        here, there = (np.asarray(v, np.float32) for v in (out[:, row], alone[:, 0]))
        np.testing.assert_allclose(here, there, rtol=2**-7, atol=1e-5)
    for junk in (np.nan, np.inf, -np.inf):
        dirty = boxes.copy()
        dirty[:, 5] = junk
        again = np.asarray(call(dirty), np.float32)
        assert not again[0, 5].any()
        np.testing.assert_array_equal(np.delete(again, 5, 1), np.delete(out, 5, 1))
    assert call(boxes[:, :0]).shape == (1, 0, 7, 7, 1024)


align = jax.jit(roi_align, static_argnames=("strides", "output_size", "samples", "aligned"))


def test_levels():
    box = np.array([[0, 0, 224, 224], [0, 0, 112, 112], [0, 0, 111, 111], [0, 0, 9000, 9000],
                    [0, 0, 0, 0], [np.nan] * 4])  # fmt: skip
    found = jax.jit(fpn_levels, static_argnums=(1, 2))(box, 2, 5)
    np.testing.assert_array_equal(found, [2, 1, 0, 3, 0, 0])
    # A box of `size` is of the level, whatever the rounding of its roots is.
    size = np.arange(1, 1500, dtype=np.float32)
    box = np.stack([0 * size, 0 * size, size, size], -1)
    assert (fpn_levels(box, 2, 5, size=size) == 2).all()


@pytest.mark.parametrize("aligned", [True, False])
def test_of_a_plane_it_is_the_value_in_the_middle_of_each_bin(aligned):
    y, x = np.mgrid[:9, :12].astype(np.float32)
    plane = (5 * y + x)[None, ..., None]
    out = align(
        [plane], np.array([[[6, 8, 18, 14]]]), strides=(2,), output_size=(3, 4), aligned=aligned
    )[0, 0, ..., 0]
    # Cell i has its middle at i + 1/2, in units of the stride; the first version put it at i.
    shift = 0.5 if aligned else 0
    middles_y, middles_x = 4 + np.arange(3) + 0.5 - shift, 3 + (np.arange(4) + 0.5) * 1.5 - shift
    np.testing.assert_allclose(out, 5 * middles_y[:, None] + middles_x, rtol=1e-6)


def test_all_levels_in_one_pass_are_each_level_by_itself():
    rng = np.random.default_rng(2)
    strides = (4, 8, 16)
    maps = [rng.normal(size=(2, 64 // s, 48 // s, 5)).astype(np.float32) for s in strides]
    corner = rng.uniform(-5, 40, (2, 30, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 40, (2, 30, 2))], -1)
    levels = rng.integers(0, 3, (2, 30))
    settings = dict(output_size=(3, 3), samples=2)
    whole = align(maps, boxes, levels, strides=strides, **settings)
    for level, stride in enumerate(strides):
        alone = align([maps[level]], boxes, strides=(stride,), **settings)
        here = levels == level
        np.testing.assert_allclose(np.asarray(whole)[here], np.asarray(alone)[here], atol=1e-6)


def test_the_gradient_of_bfloat16_adds_in_float32():
    """Where many boxes overlap, a sum in bfloat16 would stop when its addends are half an ulp."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(1, 8, 8, 4)).astype(jnp.bfloat16)
    box = np.tile(np.float32([0, 0, 8, 8]), (1, 512, 1)) + rng.uniform(0, 1, (1, 512, 4))

    @jax.jit
    def gradient(x):
        bins = lambda x: roi_align([x], box, strides=(1,), output_size=(7, 7))  # noqa: E731
        return jax.grad(lambda x: bins(x).astype(jnp.float32).sum())(x).astype(jnp.float32)

    # One rounding to bfloat16 at the end: 2^-8 at most.
    expected = gradient(features.astype(jnp.float32))
    np.testing.assert_allclose(gradient(features), expected, rtol=2**-8)


def test_however_large_a_box_is():
    """A million samples a bin; the map is seen by one bin in the middle, or by none."""
    box = np.float32([[[-1e6, -2e6, 1e6, 2e6], [1e8, 0, 3e8, 9], [0, 0, 3e38, 3e38]]])
    settings = dict(strides=(1.0,), output_size=(3, 3), samples=None)
    out = np.asarray(align([jnp.ones((1, 40, 30, 1))], box, **settings))[0, ..., 0]
    # Samples are one pixel apart: 41 of 1.3 million times 31 of 0.7 million, within one of each.
    np.testing.assert_allclose(out[0, 1, 1], 41 * 31 / (4e6 / 3 * 2e6 / 3), rtol=0.06)
    assert not np.delete(out[0].ravel(), 4).any() and not out[1].any()
    assert np.all(np.isfinite(out))


def test_a_sample_on_the_border_counts():
    """At -1 and at the size of the map, to which (slot + 0.5) * (step / count) is exact here."""
    box = np.float32([[[-4, -4, 56, 72]]])
    settings = dict(strides=(4.0,), output_size=(2, 1), samples=None)
    out = roi_align([jnp.ones((1, 17, 13, 1))], box, **settings)
    expected = slow(np.ones((17, 13, 1)), box[0, 0], 4.0, (2, 1), None, True)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("samples", [1, None])
def test_one_sample_on_either_border_counts(samples):
    corner = np.float32([-1, 4])[:, None]
    box = np.concatenate([corner, corner, corner + 1, corner + 1], 1)[None]
    out = align([jnp.ones((1, 4, 4, 1))], box, strides=(1.0,), output_size=(1, 1), samples=samples)
    assert out.ravel().tolist() == [1, 1]


@pytest.mark.parametrize("samples", [2, None])
def test_a_level_too_high_is_the_last_and_a_box_without_a_place_is_nothing(samples):
    maps = [jnp.ones((1, 4, 4, 1)), jnp.full((1, 2, 2, 1), 3.0)]
    box = np.float32([[[0, 0, 2, 2], [np.nan] * 4, [np.nan, np.nan, np.inf, np.inf], [np.inf] * 4]])
    settings = dict(strides=(1, 2), output_size=(1, 1), samples=samples)
    out = align(maps, box, np.array([[7, 0, 0, 0]]), **settings)
    assert out.ravel().tolist() == [3, 0, 0, 0]


@pytest.mark.parametrize("samples", [2, None])
def test_a_thousand_boxes_fit_into_memory(samples):
    shapes = [(1, 160 // s, 200 // s, 256) for s in (1, 2, 4, 8)]
    maps = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    boxes = jax.ShapeDtypeStruct((1, 1000, 4), jnp.float32)
    levels = jax.ShapeDtypeStruct((1, 1000), jnp.int32)

    def square(maps, boxes, levels):
        out = roi_align(
            maps, boxes, levels, strides=(4, 8, 16, 32), output_size=(7, 7), samples=samples
        )
        return jnp.sum(out**2), out

    both = jax.jit(jax.value_and_grad(square, has_aux=True))
    used = both.lower(maps, boxes, levels).compile().memory_analysis()
    total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
    # All corners of all samples at once would be 0.8 GB, and the 7 rows of all boxes 1.4 GB.
    assert total < 400e6
