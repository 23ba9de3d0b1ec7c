"""The networks that are compared: ours, and the same one of timm."""

import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

# timm uses none of torchvision's compiled operators, and their registration stops its import where
# torchvision was built for another torch.
_REGISTRATIONS = "torchvision._meta_registrations"
sys.modules.setdefault(_REGISTRATIONS, types.ModuleType(_REGISTRATIONS))


class Network(NamedTuple):
    """Makers of both sides, and the input: `batch` images, `size` x `size` x `channels`.

    `of_pixels` says that there is a class for each pixel.
    """

    ours: Callable[[], Any]
    torch: Callable[[], Any]
    batch: int
    size: int
    channels: int = 3
    of_pixels: bool = False


def _ours(module: str, name: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import importlib

        return getattr(importlib.import_module(f"cvjax.nn.{module}"), name)(**fields)

    return make


def _timm(name: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import timm

        return timm.create_model(name, num_classes=10, **fields)

    return make


def _torch(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import torch_networks

        return getattr(torch_networks, name)()

    return make


def _scenes() -> Any:
    """The network of configs/segmentation.py."""
    from cvjax.nn.features import Patches
    from cvjax.nn.resnet import ResNet
    from cvjax.segmentation.heads import UNet
    from cvjax.segmentation.model import Segmenter

    backbone = ResNet(stem="cifar", width=16, stage_sizes=(1, 1, 1, 1))
    head = UNet(num_classes=11, features=(48, 32, 16), subpixel=2)
    return Segmenter(Patches(backbone, patch=2), head)


NETWORKS = {
    "ResNet-18, 8 x 128": Network(
        _ours("resnet", "ResNet", depth=18, num_classes=10), _timm("resnet18"), 8, 128
    ),
    "ResNet-18, 32 x 64": Network(
        _ours("resnet", "ResNet", depth=18, num_classes=10), _timm("resnet18"), 32, 64
    ),
    "ResNet-50, 8 x 128": Network(
        _ours("resnet", "ResNet", depth=50, num_classes=10), _timm("resnet50"), 8, 128
    ),
    "ConvNeXt-T, 8 x 128": Network(
        _ours("convnext", "ConvNeXt", num_classes=10), _timm("convnext_tiny"), 8, 128
    ),
    "EfficientNet-lite0, 8 x 128": Network(
        _ours("efficientnet", "EfficientNet", size="lite0", num_classes=10),
        _timm("efficientnet_lite0"), 8, 128,
    ),
    "ViT-S/16, 8 x 224": Network(
        _ours("vit", "ViT", size="s", num_classes=10), _timm("vit_small_patch16_224"), 8, 224
    ),
    "digits, 64 x 28": Network(
        _ours(
            "resnet", "ResNet", num_classes=10, stem="cifar", width=8, stage_sizes=(1, 1, 1, 1)
        ),
        _torch("digits"), 64, 28, 1,
    ),
    "ResNet-9, 64 x 32": Network(_ours("resnet9", "ResNet9"), _torch("resnet9"), 64, 32),
    "scenes, 8 x 96": Network(_scenes, _torch("scenes"), 8, 96, 1, of_pixels=True),
}  # fmt: skip
