"""How much detections and truth overlap, as COCO measures it: NumPy, in double precision.

Boxes are continuous (width = x2 - x1), x1 y1 x2 y2 in pixels.
"""

from collections.abc import Sequence

import numpy as np


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Areas [n] of boxes [n, 4], x1 y1 x2 y2; 0 for one that is turned inside out."""
    return np.prod(np.maximum(boxes[:, 2:].astype(np.float64) - boxes[:, :2], 0), axis=-1)


def box_overlap(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU [d, g] of boxes [d, 4] and [g, 4]; with a crowd, bool [g], the share of the first."""
    found, truth = found.astype(np.float64), truth.astype(np.float64)
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=-1)
    return _over_union(both, box_area(found), box_area(truth), crowd)


def mask_overlap(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """The same of masks, bool [d, h, w] and [g, h, w]."""
    # Sums of products of 0 and 1 are exact in float32 below 2^24 pixels, in float64 always.
    found = found.reshape(len(found), int(np.prod(found.shape[1:]))).astype(np.float64)
    truth = truth.reshape(len(truth), int(np.prod(truth.shape[1:]))).astype(np.float64)
    return _over_union(found @ truth.T, found.sum(axis=1), truth.sum(axis=1), crowd)


def keypoint_similarity(
    found: np.ndarray,
    truth: np.ndarray,
    boxes: np.ndarray,
    area: np.ndarray,
    sigmas: Sequence[float],
) -> np.ndarray:
    """OKS [d, g] of keypoints [d, k, 3] and [g, k, 3]; `boxes` [g, 4] and `area` [g] of the truth.

    For truth without any point, distances are those to its box, twice as wide and as high.
    """
    found, truth, boxes = (x.astype(np.float64) for x in (found, truth, boxes))
    away = found[:, None, :, :2] - truth[None, :, :, :2]
    side = boxes[:, 2:] - boxes[:, :2]
    low, high = (boxes[:, :2] - side)[:, None], (boxes[:, :2] + 2 * side)[:, None]
    outside = np.maximum(low - found[:, None, :, :2], 0) + np.maximum(
        found[:, None, :, :2] - high, 0
    )
    known = truth[..., 2] > 0
    is_empty = ~known.any(axis=-1)
    # What is not annotated may be anything, NaN included.
    away = np.where(known[..., None], away, np.where(is_empty[:, None, None], outside, 0))
    variance = (2 * np.asarray(sigmas, np.float64)) ** 2
    scale = 2 * variance * (area.astype(np.float64)[:, None] + np.spacing(1))
    weight = known | is_empty[:, None]
    similarity = np.exp(-(away**2).sum(axis=-1) / scale) * weight
    return similarity.sum(axis=-1) / weight.sum(axis=-1)


def _over_union(
    both: np.ndarray, found: np.ndarray, truth: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    union = np.where(crowd, found[:, None], found[:, None] + truth - both)
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)
