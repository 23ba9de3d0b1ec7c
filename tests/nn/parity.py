"""Small networks that torchvision, timm and Hugging Face also have, with the same weights.

`record_parity.py` asks the others for their maps and logits and writes them to `parity.npz`; the
tests ask ours. The weights are not kept: they follow from the names.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from cvjax.nn.convnext import ConvNeXt
from cvjax.nn.efficientnet import EfficientNet
from cvjax.nn.mobilenet_v3 import SMALL, MobileNetV3
from cvjax.nn.resnet import ResNet
from cvjax.nn.swin import Swin
from cvjax.nn.vit import ViT

RECORD = Path(__file__).with_suffix(".npz")
CLASSES = 5
ROWS = (0, 1, 3, 6, 8)  # of MobileNetV3's blocks: with and without expansion, squeeze, shortcut


def _our_networks():
    resnet = dict(num_classes=CLASSES, width=8, stage_sizes=(1, 2, 1, 1))
    convnext = dict(num_classes=CLASSES, blocks=(1, 1, 2, 1), channels=(8, 12, 16, 20))
    efficientnet = dict(num_classes=CLASSES, width=0.25, depth=0.6)
    vit = dict(num_classes=CLASSES, patch=8, width=12, depth=4, heads=3)
    swin = dict(num_classes=CLASSES, window=4, width=8, blocks=(2, 2), heads=(2, 4))
    mobilenet = dict(size="small", num_classes=CLASSES, blocks=tuple(SMALL[i] for i in ROWS))
    torch = dict(padding="symmetric", epsilon=1e-5)
    return {
        "timm resnet18": ResNet(18, **resnet | dict(width=64)),
        "timm resnet50d": ResNet(50, variant="d", **resnet),
        "timm resnext50": ResNet(50, groups=2, base_width=32, **resnet | dict(width=64)),
        "hf resnet50": ResNet(50, **resnet),
        "torchvision wide_resnet50": ResNet(
            50, num_classes=CLASSES, base_width=128, stage_sizes=(1, 1, 1, 1)
        ),
        "timm convnext": ConvNeXt(**convnext),
        "torchvision convnext": ConvNeXt(**convnext),
        "hf convnext": ConvNeXt(**convnext),
        "timm efficientnet": EfficientNet("b0", **efficientnet, **torch),
        "timm tf_efficientnet": EfficientNet("b0", **efficientnet),
        "timm tf_efficientnet_lite": EfficientNet("lite0", **efficientnet),
        "torchvision efficientnet": EfficientNet("b0", **efficientnet, **torch),
        # Theirs has no shortcut in the first block of a stage, which matters at width 0.25 alone.
        "hf efficientnet": EfficientNet("b0", **efficientnet | dict(width=0.5)),
        "timm mobilenetv3": MobileNetV3("small", CLASSES, epsilon=1e-5),
        "torchvision mobilenetv3": MobileNetV3(**mobilenet),
        "timm vit": ViT(image_size=(32, 48), **vit),
        "timm vit mean": ViT(image_size=32, pooling="mean", **vit),
        "timm vit mean norm": ViT(image_size=32, pooling="mean_norm", **vit),
        "timm vit registers": ViT(
            image_size=32, registers=3, layer_scale=1e-5, class_has_position=False, **vit
        ),
        "torchvision vit": ViT(image_size=32, **vit),
        "hf vit": ViT(image_size=32, epsilon=1e-12, **vit),
        "hf vit resized": ViT(image_size=32, epsilon=1e-12, **vit),
        "hf vit in memory": ViT(image_size=32, epsilon=1e-12, **vit),
        "hf dinov2 registers": ViT(image_size=32, registers=2, layer_scale=1.0, **vit),
        "timm swin": Swin(**swin),
        "torchvision swin": Swin(**swin),
        "hf swin": Swin(**swin),
        "hf swin in memory": Swin(**swin),
    }


OURS = _our_networks()
# Height and width of the images. Where theirs and ours differ in what they do with what is left
# over (EfficientNet of Hugging Face, any ConvNeXt, Swin of timm) there is nothing left over.
SIZES = dict.fromkeys(OURS, (64, 48)) | {
    "hf efficientnet": (64, 96),
    "timm convnext": (64, 32),
    "torchvision convnext": (64, 32),
    "hf convnext": (64, 32),
    "timm vit": (32, 48),
    "timm vit mean": (32, 32),
    "timm vit mean norm": (32, 32),
    "timm vit registers": (32, 32),
    "torchvision vit": (32, 32),
    "hf vit": (32, 32),
    "hf vit resized": (48, 24),
    "hf vit in memory": (32, 32),
    "hf dinov2 registers": (32, 32),
    "timm swin": (64, 64),
    "torchvision swin": (64, 56),
    "hf swin": (64, 56),
    "hf swin in memory": (64, 56),
}


def image(peer: str) -> np.ndarray:
    """float32 [2, h, w, 3]."""
    return np.random.RandomState(7).normal(size=(2, *SIZES[peer], 3)).astype(np.float32)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays that their names and shapes determine; of a size that keeps activations near 1."""
    arrays = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).normal(size=shape)
        if name.endswith("num_batches_tracked"):
            arrays[name] = np.zeros(shape, np.int64)
            continue
        if name.endswith("running_var") or (name.endswith(".weight") and len(shape) == 1):
            noise = np.exp(0.3 * noise)
        elif name.endswith("weight") and len(shape) > 1:
            noise /= np.sqrt(np.prod(shape[1:]))
        else:
            noise *= 0.3
        arrays[name] = noise.astype(np.float32)
    return arrays


def thin(array: np.ndarray) -> np.ndarray:
    """About 300 of the channels and pixels: each depends on all that comes before it."""
    pixels = int(np.prod(array.shape[:-1]))
    return array[..., :: max(1, array.shape[-1] * pixels // 300)]


def read() -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]]:
    """{peer: ({name: shape} of its weights, {name: what it gave})}."""
    found = {}
    with np.load(RECORD) as record:
        for peer in OURS:
            shapes = json.loads(record[f"{peer}/shapes"].tobytes())
            given = {
                key.removeprefix(f"{peer}/"): record[key]
                for key in record.files
                if key.startswith(f"{peer}/") and not key.endswith("/shapes")
            }
            found[peer] = {name: tuple(shape) for name, shape in shapes.items()}, given
    return found
