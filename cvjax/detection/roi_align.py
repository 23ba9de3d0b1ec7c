"""ROIAlign: features of boxes by bilinear samples, from all levels of a pyramid in a single pass.

K. He et al.: Mask R-CNN (https://arxiv.org/abs/1703.06870), section 3. All levels become one
table with a row for each cell, from which the corners of all samples are gathered.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cvjax.errors import InputError

_CHUNK_BYTES = 32 << 20  # of gathered features that are in memory at once


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
    max_samples: int = 8,
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
            (torchvision's sampling_ratio -1), but at most `max_samples`.
        max_samples: the bound of the adaptive number, each costs time.
        aligned: shifts by half a cell, so that cell i spans i..i + 1; False is the first version
            of the operator, in which boxes are at least one cell wide and high, too.

    Samples more than 1 cell out of the map are 0; between there and the outermost cells they have
    the features of those, as in torchvision and detectron2.

    Raises:
        InputError: levels and strides do not fit, or a number below 1.
    """
    if len(features) != len(strides) or not features:
        raise InputError(f"strides={tuple(strides)}: there are {len(features)} levels of features")
    if min(*output_size, 1 if samples is None else samples, max_samples) < 1:
        raise InputError(
            f"output_size is {output_size}, samples {samples}, max_samples {max_samples}; each "
            "must be at least 1"
        )
    batch, count = boxes.shape[:2]
    channels, dtype = features[0].shape[-1], features[0].dtype
    # Always float32, for the gradient of a cell is a sum over thousands of bins.
    table = jnp.concatenate([level.reshape(-1, channels).astype(jnp.float32) for level in features])
    heights = jnp.array([level.shape[1] for level in features])
    widths = jnp.array([level.shape[2] for level in features])
    sizes = [level.shape[0] * level.shape[1] * level.shape[2] for level in features]
    starts = jnp.array([sum(sizes[:i]) for i in range(len(sizes))])
    if batch * count == 0:
        return jnp.zeros((batch, count, *output_size, channels), dtype)
    boxes = jax.lax.stop_gradient(jnp.asarray(boxes, jnp.float32)).reshape(-1, 4)
    levels = jnp.zeros(batch * count, jnp.int32) if levels is None else levels.reshape(-1)
    levels = jnp.clip(levels, 0, len(features) - 1)
    images = jnp.repeat(jnp.arange(batch), count)
    scale = 1 / jnp.asarray(strides, jnp.float32)

    def of_box(box: jax.Array, level: jax.Array, image: jax.Array) -> jax.Array:
        height, width = heights[level], widths[level]
        box = box * scale[level] - (0.5 if aligned else 0.0)
        finite = jnp.all(jnp.isfinite(box))
        y, wy = _corners(box[1], box[3], height, output_size[0], samples, max_samples, aligned)
        x, wx = _corners(box[0], box[2], width, output_size[1], samples, max_samples, aligned)
        rows = starts[level] + (image * height + y[:, None, :, None]) * width + x[None, :, None]
        weights = jnp.where(finite, wy[:, None, :, None] * wx[None, :, None], 0.0)
        values = table.at[rows].get(mode="promise_in_bounds")
        return jnp.einsum(
            "hwyx,hwyxc->hwc", weights, values, preferred_element_type=jnp.float32
        ).astype(dtype)

    corners = output_size[0] * output_size[1] * (2 * (samples or max_samples)) ** 2
    chunk = max(1, _CHUNK_BYTES // (corners * channels * 4))
    out = jax.lax.map(lambda one: of_box(*one), (boxes, levels, images), batch_size=chunk)
    return out.reshape(batch, count, *output_size, channels)


def _corners(
    start: jax.Array,
    end: jax.Array,
    size: jax.Array,
    bins: int,
    samples: int | None,
    max_samples: int,
    aligned: bool,
) -> tuple[jax.Array, jax.Array]:
    """Along one direction the cells of each bin's samples and their weights, [bins, 2 samples]."""
    length = end - start if aligned else jnp.maximum(end - start, 1.0)
    step = length / bins
    slots = samples or max_samples
    # A box without a width has no adaptive sample, and so features 0.
    used = jnp.float32(samples) if samples else jnp.clip(jnp.ceil(step), 0.0, max_samples)
    slot = jnp.arange(slots)
    divisor = jnp.maximum(used, 1.0)
    place = start + step * jnp.arange(bins)[:, None] + (slot + 0.5) * (step / divisor)
    counts = (slot < used) & (place >= -1) & (place <= size)
    place = jnp.clip(jnp.where(counts, place, 0.0), 0.0, size - 1.0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, size - 1)
    share = place - low
    weight = jnp.where(counts, 1 / divisor, 0.0)
    cells = jnp.concatenate([low, high], -1)
    return cells, jnp.concatenate([(1 - share) * weight, share * weight], -1)
