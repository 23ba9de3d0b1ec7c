"""The network of configs/diffusion.py and its sampler in PyTorch, as one would write them there."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def norm(channels: int) -> nn.GroupNorm:
    """As in cvjax/nn/unet.py."""
    return nn.GroupNorm(math.gcd(8, max(1, channels // 4), channels), channels, eps=1e-5)


class Block(nn.Module):
    """A residual block with adaptive group normalization."""

    def __init__(self, channels: int, features: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(features)
        self.conv1 = nn.Conv2d(channels, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.scale_shift = nn.Linear(embedding, 2 * features)
        self.shortcut = nn.Conv2d(channels, features, 1) if channels != features else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[b, c, h, w], [b, d] -> [b, features, h, w]."""
        y = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.scale_shift(condition)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(functional.silu(self.norm2(y) * (1 + scale) + shift))
        return self.shortcut(x) + y


class Attention(nn.Module):
    """A residual block in which every place looks at every other."""

    def __init__(self, channels: int, head_features: int = 32):
        super().__init__()
        self.heads, self.norm = channels // head_features, norm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape [b, c, h, w]."""
        b, c, h, w = x.shape
        tokens = self.query_key_value(self.norm(x).flatten(2).transpose(1, 2))
        parts = tokens.reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*parts)
        y = self.output(y.transpose(1, 2).reshape(b, h * w, c))
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class UNet(nn.Module):
    """Two levels of 32 and 64 channels on squares of 2 x 2 pixels; attention on the second."""

    def __init__(self, num_classes: int = 10, fine: int = 32, coarse: int = 64):
        super().__init__()
        embedding = 4 * fine
        self.register_buffer("frequencies", 10_000.0 ** -torch.linspace(0, 1, embedding // 2))
        self.time_hidden = nn.Linear(embedding, embedding)
        self.time_output = nn.Linear(embedding, embedding)
        self.table = nn.Embedding(num_classes + 1, embedding)
        self.stem = nn.Conv2d(4, fine, 3, padding=1)
        self.down0_0 = Block(fine, fine, embedding)
        self.down1_halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.down1_0 = Block(coarse, coarse, embedding)
        self.down1_0_attention = Attention(coarse)
        self.middle_0 = Block(coarse, coarse, embedding)
        self.middle_attention = Attention(coarse)
        self.middle_1 = Block(coarse, coarse, embedding)
        self.up1_0 = Block(2 * coarse, coarse, embedding)
        self.up1_0_attention = Attention(coarse)
        self.up0_double = nn.Conv2d(coarse, fine, 3, padding=1)
        self.up0_0 = Block(2 * fine, fine, embedding)
        self.head_norm = norm(fine)
        self.head = nn.Conv2d(fine, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """[b, 1, 28, 28], [b], [b] -> [b, 1, 28, 28]."""
        angles = 1000 * t[:, None] * self.frequencies
        time = functional.silu(self.time_hidden(torch.cat([angles.cos(), angles.sin()], dim=1)))
        condition = functional.silu(self.time_output(time) + self.table(label))
        fine = self.down0_0(self.stem(functional.pixel_unshuffle(x, 2)), condition)
        x = coarse = self.down1_0_attention(self.down1_0(self.down1_halve(fine), condition))
        x = self.middle_1(self.middle_attention(self.middle_0(x, condition)), condition)
        x = self.up1_0_attention(self.up1_0(torch.cat([x, coarse], dim=1), condition))
        x = self.up0_double(functional.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.up0_0(torch.cat([x, fine], dim=1), condition)
        x = self.head(functional.silu(self.head_norm(x)))
        return functional.pixel_shuffle(x, 2)


def load(network: UNet, params: dict[str, Any]) -> None:
    """Puts the parameters of `cvjax.nn.unet.UNet` into it; raises if one is left or missing."""
    state = {}

    def walk(node: dict[str, Any], path: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}.{name}")
                continue
            array, last = np.asarray(value), {"kernel": "weight", "scale": "weight"}
            if array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
            elif name == "kernel":
                array = array.T[:, :, None, None] if path.endswith("shortcut") else array.T
            state[f"{path}.{last.get(name, name)}"[1:]] = torch.tensor(np.ascontiguousarray(array))

    walk(params, "")
    for ours, theirs in (
        ("time.", "time_"), ("class.table.embedding", "table.weight"),
        ("attention.attention.", "attention."),
    ):  # fmt: skip
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    state["frequencies"] = network.frequencies
    network.load_state_dict(state)


def sample(
    network: Callable[..., Tensor],
    x: Tensor,
    label: Tensor,
    grid: np.ndarray,
    lambdas: np.ndarray,
    guidance: float,
    num_classes: int = 10,
) -> Tensor:
    """DPM-Solver++(2M) with classifier-free guidance along the path of flow matching.

    `lambdas` are log(alpha / sigma) at the times of the grid, finite at its ends.
    """
    both = torch.cat([label, torch.full_like(label, num_classes)])
    steps, before = len(grid) - 1, None
    for i, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
        given, free = network(torch.cat([x, x]), x.new_full((len(both),), t), both).chunk(2)
        x0 = free + guidance * (given - free)
        middle = x0
        if 0 < i < steps - 1:
            h, h_before = lambdas[i + 1] - lambdas[i], lambdas[i] - lambdas[i - 1]
            middle = x0 + float(h / (2 * h_before)) * (x0 - before)
        now, then = (1e-3 + 0.998 * time for time in (t, s))  # sigma, as `cvjax.diffusion.process`
        x, before = (1 - then) * middle + then / now * (x - (1 - now) * middle), x0
    return ((x + 1) / 2).clamp(0, 1)
