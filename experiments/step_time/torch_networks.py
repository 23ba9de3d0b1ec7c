"""The small networks of our recipes in PyTorch."""

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn


def digits() -> nn.Module:
    """The ResNet of configs/classification.py."""
    return _resnet(1, 8)


def scenes() -> nn.Module:
    """The segmenter of configs/segmentation.py."""
    return Scenes()


def resnet9() -> nn.Module:
    """The network of configs/cifar10.py, `cvjax.nn.resnet9`."""

    def block(before: int, features: int, kernel: int = 3) -> nn.Module:
        convolution = nn.Conv2d(before, features, kernel, padding=kernel // 2, bias=False)
        norm = nn.BatchNorm2d(features, momentum=0.2)
        norm.weight.requires_grad_(False)
        return nn.Sequential(convolution, norm, nn.CELU(0.3))

    def twice(features: int) -> nn.Module:
        return Residual(block(features, features), block(features, features))

    return nn.Sequential(
        nn.Conv2d(3, 54, 3, padding=1, bias=False), block(54, 64, 1),
        block(64, 128), nn.MaxPool2d(2), twice(128),
        block(128, 256), nn.MaxPool2d(2),
        block(256, 512), nn.MaxPool2d(2), twice(512),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(512, 10, bias=False), Scale(1 / 16),
    )  # fmt: skip


class Residual(nn.Sequential):
    """x + what the layers make of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies it."""
        return x + super().forward(x)


class Scale(nn.Module):
    """A constant factor."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies."""
        return self.factor * x


class Scenes(nn.Module):
    """A ResNet that sees squares of 2 x 2 pixels, and the head of a U-Net."""

    def __init__(self):
        super().__init__()
        self.backbone = _resnet(4, 16)
        self.levels = nn.ModuleList()
        before = 128
        for skip, features in ((64, 48), (32, 32), (16, 16)):
            first, second = _conv_norm_relu(before + skip, features), _conv_norm_relu(features)
            self.levels.append(nn.Sequential(first, second))
            before = features
        self.score = nn.Conv2d(before, 4 * 11, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [b, 11, h, w] of images [b, 1, h, w]."""
        net, maps = self.backbone, []
        x = net.act1(net.bn1(net.conv1(nn.functional.pixel_unshuffle(x, 2))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(x)
        for level, skip in zip(self.levels, maps[-2::-1], strict=True):
            x = nn.functional.interpolate(x, skip.shape[2:], mode="bilinear")
            x = level(torch.cat([x, skip], 1))
        return nn.functional.pixel_shuffle(self.score(x), 2)


def _conv_norm_relu(before: int, features: int | None = None) -> nn.Module:
    convolution = nn.Conv2d(before, features or before, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(features or before), nn.ReLU(inplace=True))


def _resnet(channels: int, width: int) -> nn.Module:
    widths = tuple(width * 2**stage for stage in range(4))
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, in_chans=channels, channels=widths)
    model.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    model.bn1, model.maxpool = nn.BatchNorm2d(width), nn.Identity()
    model.layer1[0].conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
    model.layer1[0].downsample = None
    return model
