"""Makes torchvision importable beside a torch for which its compiled operators were not built.

To be imported before torchvision. Of the compiled operators RetinaNet and FCOS need only `nms`,
here in plain torch; it is used in evaluation alone, so that no time of training is changed.
"""

import sys
import types

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
# The shapes of the operators that are not there.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("_meta_registrations")


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy suppression of boxes [n, 4], xyxy: the indices that are kept, best first."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    both = (torch.minimum(high, high.transpose(0, 1)) - torch.maximum(
        low, low.transpose(0, 1)
    )).clamp(min=0).prod(-1)  # fmt: skip
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlap = both / (area[:, None] + area - both)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not kept or not (overlap[i, kept] > iou_threshold).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


_LIBRARY.impl("nms", nms, "CPU")

import torchvision.extension  # noqa: E402  not before the operators are there

torchvision.extension._has_ops = lambda: True
