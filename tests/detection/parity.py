"""Small detectors that torchvision and Hugging Face also have, with the same weights.

`record_parity.py` asks the others and writes `parity.npz`, and `published.json` with the names and
shapes of the weights that torchvision publishes; the tests ask ours. The weights are not
kept: they follow from the names.
"""

import json
from pathlib import Path

import numpy as np

from cvjax.detection import published
from cvjax.detection.detr import DETR
from cvjax.detection.keypoint_head import KeypointHead
from cvjax.detection.mask_head import MaskHead
from cvjax.nn.resnet import ResNet
from tests.nn.parity import weights as by_name

RECORD = Path(__file__).with_suffix(".npz")
PUBLISHED = Path(__file__).with_name("published.json")
CLASSES, FEATURES, SIZE = 5, 64, (128, 256)  # torchvision's largest stride divides the sizes
SCORES = {"retinanet": 0.9, "fcos": 0.6, "rcnn": 0.4}
OUTPUTS = 20


def ours():
    bare = ResNet(18, stage_sizes=(1, 1, 1, 1), epsilon=0.0)
    rcnn = published.faster_rcnn(CLASSES, backbone=bare, features=FEATURES)
    return {
        "retinanet": published.retinanet(CLASSES, backbone=bare, features=FEATURES).clone(
            score=SCORES["retinanet"], outputs=OUTPUTS
        ),
        "fcos": published.fcos(CLASSES, backbone=bare.clone(epsilon=1e-5), features=FEATURES).clone(
            score=SCORES["fcos"], outputs=OUTPUTS
        ),
        "rcnn": rcnn.clone(
            rpn=rcnn.rpn.clone(candidates=200, proposals=50),
            box_head=rcnn.box_head.clone(features=64, score=SCORES["rcnn"], outputs=OUTPUTS),
            heads={"mask": MaskHead(CLASSES, 16, 2), "keypoints": KeypointHead(3, 16, 2)},
        ),
        "detr": DETR(
            ResNet(18, width=8, stage_sizes=(1, 1, 1, 1)),
            CLASSES,
            queries=7,
            features=16,
            heads=2,
            hidden=24,
            encoder_layers=2,
            decoder_layers=2,
        ),
    }


def images() -> np.ndarray:
    """float32 [2, h, w, 3] in [0, 1]."""
    return np.random.RandomState(7).uniform(size=(2, *SIZE, 3)).astype(np.float32)


def truth() -> dict[str, np.ndarray]:
    """For DETR: xyxy in pixels of two images, one of them empty, and two rows of padding."""
    boxes = [[3, 5, 90, 100], [20, 7, 250, 125], [100, 60, 130, 90], [0, 0, 0, 0], [0, 0, 0, 0]]
    boxes = np.array([boxes, np.zeros((5, 4))], np.float32)
    valid = boxes[..., 2] > boxes[..., 0]
    label = np.array([[0, 3, 2, 0, 0]] * 2)
    return {"boxes": boxes, "box_label": label, "box_valid": valid, "valid": np.ones(2, bool)}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """As those of the backbones, but for two things that torchvision decides in another way.

    Boxes are near their anchors: it keeps those without an area as detections, and for us they are
    none. No proposal is so sure that its probability is rounded to 1: it then is equal to others.
    """
    arrays = by_name(shapes)
    for name, array in arrays.items():
        if name.split(".")[-2] in ("bbox_reg", "bbox_pred") and not name.startswith("roi_heads"):
            array *= 0.2
        if name.startswith("rpn.head.cls_logits"):
            array *= 0.2
        if name == "head.regression_head.bbox_reg.bias":
            array += 1
    return arrays


def thin(array: np.ndarray) -> np.ndarray:
    """Some 500 of the numbers, of all channels: each depends on all that comes before it."""
    return array.reshape(-1)[:: array.size // 500 | 1]


def read() -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]]:
    """{peer: ({name: shape} of its weights, {name: what it gave})}."""
    found = {}
    with np.load(RECORD) as record:
        for key in record.files:
            peer, name = key.split("/")
            shapes, given = found.setdefault(peer, ({}, {}))
            if name == "shapes":
                text = json.loads(record[key].tobytes())
                shapes.update({name: tuple(shape) for name, shape in text.items()})
            else:
                given[name] = record[key]
    return found
