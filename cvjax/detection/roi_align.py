"""ROIAlign: features of boxes by bilinear samples, from all levels of a pyramid in a single pass.

K. He et al.: Mask R-CNN (https://arxiv.org/abs/1703.06870), section 3. With a fixed number of
samples all levels become one table with a row for each cell, from which the corners of all samples
are gathered. An adaptive number has no bound, so that there what all samples of a bin weigh in each
row and in each column of a map is worked out, and two matrix products do the rest.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cvjax.errors import InputError

_CHUNK_BYTES = 32 << 20  # of features for the boxes that are worked on at once


def fpn_levels(
    boxes: jax.Array, lowest: int, highest: int, *, size: float = 224.0, level: int = 4
) -> jax.Array:
    """The level of each box [..., 4], 0 for `lowest`: int32 [...].

    T.-Y. Lin et al.: Feature Pyramid Networks (https://arxiv.org/abs/1612.03144), equation 1: a
    box of `size` x `size` pixels belongs to `level`.
    """
    boxes = jnp.asarray(boxes, jnp.float32)
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    length = jnp.sqrt(sides[..., 0]) * jnp.sqrt(sides[..., 1])
    chosen = jnp.floor(level + jnp.log2(jnp.maximum(length / size, 1e-8)) + 1e-6)
    return (jnp.clip(jnp.nan_to_num(chosen), lowest, highest) - lowest).astype(jnp.int32)


def roi_align(
    features: Sequence[jax.Array],
    boxes: jax.Array,
    levels: jax.Array | None = None,
    *,
    strides: Sequence[float],
    output_size: tuple[int, int],
    samples: int | None = 2,
    aligned: bool = True,
) -> jax.Array:
    """Features [b, r, height, width, c] of r boxes in each of b images, in the features' type.

    Args:
        features: one [b, h, w, c] for each level.
        boxes: [b, r, 4], xyxy in pixels of the image. They get no gradient. A box with a
            coordinate that is not finite has features 0.
        levels: int [b, r], which of the features each box is taken from; None: the first.
        strides: pixels per cell of each level.
        output_size: height and width in bins.
        samples: per bin and direction; None: as many as the bin is cells wide or high, rounded up
            (torchvision's sampling_ratio -1), which takes time in proportion to the size of a map.
        aligned: shifts by half a cell, so that cell i spans i..i + 1; False is the first version
            of the operator, in which boxes are at least one cell wide and high, too.

    Samples more than 1 cell out of the map are 0; between there and the outermost cells they have
    the features of those, as in torchvision and detectron2.

    Raises:
        InputError: levels and strides do not fit, or a number below 1.
    """
    if len(features) != len(strides) or not features:
        raise InputError(f"strides={tuple(strides)}: there are {len(features)} levels of features")
    if min(*output_size, 1 if samples is None else samples) < 1:
        raise InputError(
            f"output_size is {output_size}, samples {samples}; each must be at least 1"
        )
    batch, count = boxes.shape[:2]
    channels, dtype = features[0].shape[-1], features[0].dtype
    if batch * count == 0:
        return jnp.zeros((batch, count, *output_size, channels), dtype)
    boxes = jax.lax.stop_gradient(jnp.asarray(boxes, jnp.float32))
    levels = jnp.zeros((batch, count), jnp.int32) if levels is None else jnp.asarray(levels)
    levels = jnp.clip(levels, 0, len(features) - 1)
    if samples is None:
        return _adaptive(features, boxes, levels, strides, output_size, aligned)
    # Always float32, for the gradient of a cell is a sum over thousands of bins.
    table = jnp.concatenate([level.reshape(-1, channels).astype(jnp.float32) for level in features])
    heights = jnp.array([level.shape[1] for level in features])
    widths = jnp.array([level.shape[2] for level in features])
    sizes = [level.shape[0] * level.shape[1] * level.shape[2] for level in features]
    starts = jnp.array([sum(sizes[:i]) for i in range(len(sizes))])
    images = jnp.repeat(jnp.arange(batch), count)
    scale = 1 / jnp.asarray(strides, jnp.float32)

    def of_box(box: jax.Array, level: jax.Array, image: jax.Array) -> jax.Array:
        height, width = heights[level], widths[level]
        box = box * scale[level] - (0.5 if aligned else 0.0)
        finite = jnp.all(jnp.isfinite(box))
        y, wy = _corners(box[1], box[3], height, output_size[0], samples, aligned)
        x, wx = _corners(box[0], box[2], width, output_size[1], samples, aligned)
        rows = starts[level] + (image * height + y[:, None, :, None]) * width + x[None, :, None]
        weights = jnp.where(finite, wy[:, None, :, None] * wx[None, :, None], 0.0)
        values = table.at[rows].get(mode="promise_in_bounds")
        return jnp.einsum(
            "hwyx,hwyxc->hwc", weights, values, preferred_element_type=jnp.float32
        ).astype(dtype)

    corners = output_size[0] * output_size[1] * (2 * samples) ** 2
    chunk = max(1, _CHUNK_BYTES // (corners * channels * 4))
    rows = boxes.reshape(-1, 4), levels.reshape(-1), images
    out = jax.lax.map(lambda row: of_box(*row), rows, batch_size=chunk)
    return out.reshape(batch, count, *output_size, channels)


def _corners(
    start: jax.Array, end: jax.Array, size: jax.Array, bins: int, samples: int, aligned: bool
) -> tuple[jax.Array, jax.Array]:
    """Along one direction the cells of each bin's samples and their weights, [bins, 2 samples]."""
    step = (end - start if aligned else jnp.maximum(end - start, 1.0)) / bins
    place = (start + step * jnp.arange(bins))[:, None]
    place += (jnp.arange(samples) + 0.5) * (step / samples)
    counts = (place >= -1) & (place <= size)
    place = jnp.clip(jnp.where(counts, place, 0.0), 0.0, size - 1.0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, size - 1)
    share = place - low
    weight = counts / samples
    cells = jnp.concatenate([low, high], -1)
    return cells, jnp.concatenate([(1 - share) * weight, share * weight], -1)


def _adaptive(
    features: Sequence[jax.Array],
    boxes: jax.Array,
    levels: jax.Array,
    strides: Sequence[float],
    output_size: tuple[int, int],
    aligned: bool,
) -> jax.Array:
    """`roi_align` with as many samples as a bin has cells; boxes [b, r, 4], levels [b, r]."""
    dtype = features[0].dtype
    widest = max(level.shape[2] for level in features)
    chunk = max(1, _CHUNK_BYTES // (output_size[0] * widest * features[0].shape[-1] * 4))

    def of_image(one: tuple[list[jax.Array], jax.Array, jax.Array]) -> jax.Array:
        maps, boxes, levels = one

        def of_box(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            box, chosen = row
            found = jnp.zeros((*output_size, maps[0].shape[-1]), jnp.float32)
            for number, (level, stride) in enumerate(zip(maps, strides, strict=True)):
                start, end = jnp.split(box / stride - (0.5 if aligned else 0.0), 2)
                # Of a box that is not finite, or of another level, no cell weighs anything.
                counts = jnp.all(jnp.isfinite(box)) & (chosen == number)
                y, x = (
                    counts * _cell_weights(start[axis], end[axis], size, bins, aligned)
                    for axis, size, bins in zip((1, 0), level.shape[:2], output_size, strict=True)
                )
                rows = jnp.einsum("ph,hwc->pwc", y, level)
                found += jnp.einsum("pwc,qw->pqc", rows, x)
            return found.astype(dtype)

        return jax.lax.map(of_box, (boxes, levels), batch_size=chunk)

    # float32 as in `roi_align`.
    maps = [level.astype(jnp.float32) for level in features]
    return jax.lax.map(of_image, (maps, boxes, levels))


def _cell_weights(
    start: jax.Array, end: jax.Array, size: int, bins: int, aligned: bool
) -> jax.Array:
    """Along one direction what each cell weighs in each bin, [bins, size], finite."""
    step = jnp.nan_to_num(end - start if aligned else jnp.maximum(end - start, 1.0)) / bins
    # A box without a width has no sample, and so features 0.
    samples = jnp.maximum(jnp.ceil(step), 0.0)
    apart = jnp.where(samples > 0, step / jnp.maximum(samples, 1.0), 1.0)
    first = (jnp.nan_to_num(start) + step * jnp.arange(bins))[:, None]
    cell = jnp.arange(size)
    # Several samples are more than half a cell apart, so that at most four are less than one cell
    # from a cell. The first of these has this number, or one more, or one less by rounding.
    slot = jnp.clip(jnp.floor((cell - 1 - first) / apart - 0.5), 0.0, samples)[..., None]
    slot += jnp.arange(-1, 6)
    place = first[..., None] + (slot + 0.5) * apart
    counts = (slot >= 0) & (slot < samples) & (place >= -1) & (place <= size)
    # Out there as if on the border.
    far = jnp.abs(jnp.clip(place, 0.0, size - 1.0) - cell[:, None])
    return jnp.sum(jnp.where(counts, jnp.maximum(1 - far, 0.0), 0.0), -1) / jnp.maximum(samples, 1)
