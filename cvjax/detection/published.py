"""The detectors whose weights torchvision publishes, with all of its settings.

From a file of torchvision's weights to detections:

    model = mask_rcnn()
    task = Detection(model, mean=MEAN, std=STD)
    batch = {"image": image, "valid": np.ones(1, bool)}      # float32 [1, h, w, 3], RGB in [0, 1]
    params, state = jax.jit(task.init)(jax.random.key(0), batch)
    path = "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    params, state, table = load_pretrained(params, state, path=path)
    print(table)                                             # whatever was not loaded
    found = jax.jit(task.predict)(params, state, batch, jax.random.key(0))

For `fit`, `initialize=functools.partial(load_pretrained, path=path)`; a model for another number of
classes keeps its own last layers, and the table says so.

The published weights want images whose shorter side is 800 pixels, or whose longer one is 1333
where that makes it smaller; that is for the caller to do. Where sides are no multiples
of the largest stride (128 for RetinaNet and FCOS, 64 for R-CNN) torchvision places the anchors of
the coarsest levels at another, truncated stride; fill up the right and lower border with the mean
colour to such a multiple, and both do the same.

Labels: RetinaNet and FCOS have COCO's own numbers, 0 to 90; R-CNN has those less one, since its
background is no class of ours. Of the candidates for suppression theirs are the 1000 best of each
level, and all of R-CNN; ours are the best 2000 of an image.
"""

import flax.linen as nn

from cvjax.detection.box_head import BoxHead
from cvjax.detection.fcos import FCOS, FCOSHead
from cvjax.detection.keypoint_head import KeypointHead
from cvjax.detection.mask_head import MaskHead
from cvjax.detection.rcnn import RCNN, PyramidPool
from cvjax.detection.retinanet import RetinaNet, RetinaNetHead
from cvjax.detection.rpn import RPN, RPNHead
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.resnet import ResNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
CANDIDATES = 2000
# All but FCOS were published with norms that divide by the bare deviation.
RESNET50, RESNET50_OF_FCOS = ResNet(50, epsilon=0.0), ResNet(50)


def retinanet(
    num_classes: int = 91, *, backbone: nn.Module = RESNET50, features: int = 256
) -> RetinaNet:
    """retinanet_resnet50_fpn."""
    return RetinaNet(
        _dense(backbone, features), RetinaNetHead(num_classes, features=features, groups=0),
        offset=0, rounded=True, candidates=CANDIDATES, outputs=300,
    )  # fmt: skip


def fcos(
    num_classes: int = 91, *, backbone: nn.Module = RESNET50_OF_FCOS, features: int = 256
) -> FCOS:
    """fcos_resnet50_fpn."""
    return FCOS(
        _dense(backbone, features), FCOSHead(num_classes, features=features, scales=False),
        offset=0, distances="relu", score=0.2, candidates=CANDIDATES,
    )  # fmt: skip


def faster_rcnn(
    num_classes: int = 90,
    *,
    backbone: nn.Module = RESNET50,
    features: int = 256,
    heads: dict[str, nn.Module] | None = None,
) -> RCNN:
    """fasterrcnn_resnet50_fpn; `heads` are "mask" and "keypoints", where there are such."""
    encoder = Pyramid(backbone, FPN(features, "pool", 1), ("stage1", "stage2", "stage3", "stage4"))
    return RCNN(
        encoder, RPN(RPNHead(features=features), offset=0, rounded=True),
        BoxHead(num_classes, candidates=CANDIDATES), heads or {}, PyramidPool(aligned=False),
    )  # fmt: skip


def mask_rcnn(num_classes: int = 90) -> RCNN:
    """maskrcnn_resnet50_fpn."""
    return faster_rcnn(num_classes, heads={"mask": MaskHead(num_classes)})


def keypoint_rcnn(num_classes: int = 1, keypoints: int = 17) -> RCNN:
    """keypointrcnn_resnet50_fpn."""
    return faster_rcnn(num_classes, heads={"keypoints": KeypointHead(keypoints)})


def _dense(backbone: nn.Module, features: int) -> Pyramid:
    return Pyramid(backbone, FPN(features, "pyramid", 2), ("stage2", "stage3", "stage4"))
