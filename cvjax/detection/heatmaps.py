"""CenterNet's truth: a bump for each object's centre, and which cell answers for it."""

import jax
import jax.numpy as jnp

from cvjax.detection.assigners import Assignment


def gaussian_radius(heights: jax.Array, widths: jax.Array, min_overlap: float = 0.7) -> jax.Array:
    """How far corners may move so that a box keeps at least `min_overlap` IoU: float32, cells.

    The least of three cases (both corners in, both out, one each way), H. Law, J. Deng: CornerNet
    (https://arxiv.org/abs/1808.01244), section 3.2, each solved as a quadratic.
    """
    both, product, m = heights + widths, heights * widths, min_overlap

    def smaller_root(a: float, b: jax.Array, c: jax.Array) -> jax.Array:
        # Of a r^2 - b r + c = 0, without the difference of two large numbers.
        return 2 * c / jnp.maximum(b + jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0.0)), 1e-12)

    shifted = smaller_root(1.0, both, product * (1 - m) / (1 + m))
    inner = smaller_root(4.0, 2 * both, (1 - m) * product)
    # 4 m r^2 + 2 m (h + w) r - (1 - m) h w = 0, whose positive root it is.
    b, c = 2 * m * both, (1 - m) * product
    outer = 2 * c / jnp.maximum(b + jnp.sqrt(b**2 + 16 * m * c), 1e-12)
    return jnp.minimum(jnp.minimum(shifted, inner), outer)


def centre_heatmap(
    boxes: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    height: int,
    width: int,
    stride: int,
    num_classes: int,
    min_overlap: float = 0.7,
) -> tuple[jax.Array, Assignment]:
    """The heatmap, float32 [height, width, num_classes] in 0..1, and who owns each cell.

    X. Zhou et al.: Objects as Points (https://arxiv.org/abs/1904.07850), section 3: a Gaussian
    around the cell of each centre, 1 there, cut off at the radius r with sigma = (2r + 1) / 6;
    the maximum where objects of a class overlap. Boxes [n, 4] are xyxy in pixels of the image,
    `stride` pixels per cell; a centre outside of the map, or a box without an area, has none.
    The `Assignment` is that of the height * width cells; the first of two truths in a cell wins.
    """
    boxes = jnp.where(valid[:, None], jnp.asarray(boxes, jnp.float32), 0.0) / stride
    labels = jnp.where(valid, labels, 0)
    sides = boxes[:, 2:] - boxes[:, :2]
    cell = jnp.floor((boxes[:, :2] + boxes[:, 2:]) / 2)
    there = valid & jnp.all((sides > 0) & (cell >= 0), -1)
    there &= (cell[:, 0] < width) & (cell[:, 1] < height)
    radius = jnp.floor(gaussian_radius(sides[:, 1], sides[:, 0], min_overlap))
    radius = jnp.where(there, radius, 0.0)[:, None, None]
    sigma = (2 * radius + 1) / 6
    y = jnp.arange(height)[:, None] - cell[:, 1, None, None]
    x = jnp.arange(width) - cell[:, 0, None, None]
    bump = jnp.exp(-(x**2 + y**2) / (2 * sigma**2))
    near = (jnp.abs(x) <= radius) & (jnp.abs(y) <= radius) & there[:, None, None]
    heat = jnp.zeros((num_classes, height, width), jnp.float32)
    heat = heat.at[labels].max(jnp.where(near, bump, 0.0), mode="drop")
    place = (cell[:, 1] * width + cell[:, 0]).astype(jnp.int32)
    rows, count = jnp.arange(boxes.shape[0]), boxes.shape[0]
    owner = jnp.full(height * width, count, jnp.int32)
    owner = owner.at[jnp.where(there, place, height * width)].min(rows, mode="drop")
    chosen = owner < count
    weight = jnp.ones(height * width, jnp.float32)
    return heat.transpose(1, 2, 0), Assignment(jnp.where(chosen, owner, 0), chosen, weight)
