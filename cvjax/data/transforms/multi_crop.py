"""Several views of one image, for methods that compare them."""

from collections.abc import Mapping

import numpy as np

from cvjax.checks import check_count
from cvjax.data.sources import Example
from cvjax.data.transforms import Transform, fields
from cvjax.data.transforms.objects import names_of_objects
from cvjax.errors import InputError, nearest


def multi_crop(
    example: Example,
    rng: np.random.Generator,
    *,
    views: Mapping[str, Transform],
    counts: Mapping[str, int] | None = None,
) -> Example:
    """Replaces `image` by views of it, each drawn anew.

    M. Caron et al.: SwAV (https://arxiv.org/abs/2006.09882, section 3.2): two large crops and
    several small ones, `views=dict(large=..., small=...), counts=dict(large=2, small=6)`.

    Args:
        example: `image`, uint8 [h, w, c].
        rng: drawn from by all views, one after the other.
        views: the transform of each kind of view, by name; all its results must have one size.
        counts: how many views of a kind; 1 where it is not named.

    Returns:
        The example with a field `image_<name>`, uint8 [count, h, w, c], for each kind, and without
        `image` and all that is tied to its pixels.
    """
    counts = counts or {}
    if not views:
        raise InputError("views is empty: multi_crop needs at least one")
    for name, count in counts.items():
        if name not in views:
            raise InputError(f"counts.{name}: there is no such view{nearest(name, views)}")
        check_count(1, **{f"counts.{name}": count})
    image = {"image": fields.image_of(example)}
    tied = {"image", "mask", "keypoint_swap", "scale", *names_of_objects(example)}
    result = {name: value for name, value in example.items() if name not in tied}
    for name, transform in views.items():
        images = [transform(image, rng)["image"] for _ in range(counts.get(name, 1))]
        if len({view.shape for view in images}) > 1:
            sizes = ", ".join(str(list(view.shape)) for view in images)
            raise InputError(f"views.{name} must give images of one size, not {sizes}")
        result[f"image_{name}"] = np.stack(images)
    return result
