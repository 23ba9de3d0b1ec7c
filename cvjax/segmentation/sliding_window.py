"""Prediction for images of any size by a network that sees one size."""

from collections.abc import Callable

import jax
import numpy as np
from jax.typing import ArrayLike

from cvjax.checks import check_count, height_and_width
from cvjax.errors import InputError


def sliding_window(
    logits: Callable[[jax.Array], jax.Array],
    image: ArrayLike,
    *,
    window: int | tuple[int, int],
    overlap: float = 0.5,
    batch_size: int = 8,
) -> np.ndarray:
    """The logits of an image of any size: the mean over all windows that see a pixel.

    Windows begin at the upper left corner and go on by (1 - overlap) of their size; the last in
    each direction ends at the border. An image smaller than the window goes on as its edge. One
    program is compiled, whatever the sizes of the images: keep `logits` the same object.

        logits = functools.partial(task.logits, params, model_state)
        classes = sliding_window(logits, image, window=512).argmax(-1)

    Args:
      logits: maps images [batch_size, *window, c] to [batch_size, *window, k]; it is jitted here.
      image: [h, w, c], as `logits` wants it, float32 in [0, 1] for a task's.
      window: height and width, or one number for both.
      overlap: share of a window's height and width that the next one sees again, in [0, 1).
      batch_size: windows that are predicted together.

    Returns:
      float32 [h, w, k].

    Raises:
      InputError: an image without pixels or of another shape, or a number that makes no sense.
    """
    image = np.asarray(image)
    window = height_and_width(window, "window")
    if image.ndim != 3 or not image.size:
        raise InputError(f"image is {list(image.shape)}; it must be [height, width, channels]")
    if not 0 <= overlap < 1:
        raise InputError(f"overlap is {overlap}; it must be in [0, 1)")
    check_count(1, batch_size=batch_size)
    height, width = image.shape[:2]
    missing = [(0, max(0, one - side)) for one, side in zip(window, (height, width), strict=True)]
    image = np.pad(image, [*missing, (0, 0)], mode="edge")
    corners = [
        (top, left)
        for top in _starts(image.shape[0], window[0], overlap)
        for left in _starts(image.shape[1], window[1], overlap)
    ]
    predict = jax.jit(logits)
    total, seen = None, np.zeros((*image.shape[:2], 1), np.float32)
    for first in range(0, len(corners), batch_size):
        some = corners[first : first + batch_size]
        # The last batch is filled up with its last window: one shape, one program.
        crops = [
            image[top : top + window[0], left : left + window[1]]
            for top, left in some + [some[-1]] * (batch_size - len(some))
        ]
        results = np.asarray(predict(np.stack(crops)), np.float32)
        if total is None:
            total = np.zeros((*image.shape[:2], results.shape[-1]), np.float32)
        for (top, left), result in zip(some, results, strict=False):
            part = slice(top, top + window[0]), slice(left, left + window[1])
            total[part] += result
            seen[part] += 1
    return (total / seen)[:height, :width]


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side that is at least as long as one; the last touches its end.

    No pixel is left out: the step is at most a window, and at least one pixel.
    """
    # A hair more: 10 * (1 - 0.8) is less than 2.
    step = max(1, int(window * (1 - overlap) + 1e-6))
    return [*range(0, side - window, step), side - window]
