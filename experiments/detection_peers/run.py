"""What an equally small detector of torchvision reaches on the scenes of our recipe.

    pip install torch==2.13.0 && pip install --no-deps torchvision==0.29.2
    python experiments/detection_peers/run.py retinanet|fcos [--seed 0] [--steps N]

The scenes, their order, the number of steps, the batch, the schedule, the widths of backbone and
pyramid, the anchors and the thresholds are those of configs/retinanet.py or configs/fcos.py; head,
losses, matching and selection are torchvision's. Prints the figures of `CocoEvaluator`.
"""

import argparse
import copy
import itertools
import math
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import stand_in  # noqa: F401  before torchvision
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork

from cvjax import config as configs
from cvjax.build import build
from cvjax.data.loader import Loader
from cvjax.detection.evaluate import CocoEvaluator
from cvjax.train.evaluation import eval_loader_of

ROOT = Path(__file__).parents[2]


class Backbone(nn.Module):
    """Squares of pixels as channels, a small residual network, and torchvision's pyramid."""

    def __init__(self, patch: int, width: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch**2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        channels = [width, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            BasicBlock(
                before, after, stride=after // before,
                downsample=None if after == before else nn.Sequential(
                    nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after)
                ),
            )
            for before, after in itertools.pairwise(channels)
        )  # fmt: skip
        self.fpn = FeaturePyramidNetwork(channels[2:], out_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [b, 3, h, w] to two maps, with strides of 2 and 4 patches."""
        x, maps = self.stem(x), {}
        for number, stage in enumerate(self.stages):
            x = stage(x)
            maps[str(number)] = x
        return self.fpn({name: maps[name] for name in ("1", "2")})


def make(name: str, settings: dict) -> nn.Module:
    """The detector of torchvision with the widths, anchors and thresholds of our recipe."""
    encoder, head = settings["encoder"], settings["head"]
    patch = encoder["backbone"]["patch"]
    backbone = Backbone(patch, encoder["backbone"]["backbone"]["width"], encoder["fpn"]["features"])
    strides, norm = (2 * patch, 4 * patch), partial(nn.GroupNorm, head["groups"])
    options = dict(
        min_size=128, max_size=128, image_mean=[0.5] * 3, image_std=[0.5] * 3, score_thresh=0.05,
        topk_candidates=settings["candidates"], detections_per_img=settings["outputs"],
    )  # fmt: skip
    classes, width = head["num_classes"], backbone.out_channels
    if name == "retinanet":
        octaves = settings["octaves"]
        sizes = [
            tuple(settings["scale"] * stride * 2 ** (i / octaves) for i in range(octaves))
            for stride in strides
        ]
        anchors = AnchorGenerator(tuple(sizes), (tuple(settings["ratios"]),) * 2)
        tower = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm)
        return RetinaNet(backbone, classes, anchor_generator=anchors, head=tower, **options)
    # torchvision's levels are for sides of 4 to 8 "anchors", ours of reach / 2 to reach strides.
    share = settings["reach"] / 8
    anchors = AnchorGenerator(tuple((stride * share,) for stride in strides), ((1.0,),) * 2)
    tower = FCOSHead(32, 1, classes)  # its norm has 32 groups, which need not divide our width
    tower.classification_head = FCOSClassificationHead(
        width, 1, classes, head["depth"], norm_layer=norm
    )
    tower.regression_head = FCOSRegressionHead(width, 1, head["depth"], norm_layer=norm)
    return FCOS(
        backbone, classes, anchor_generator=anchors, head=tower,
        center_sampling_radius=1.5 / share, **options,
    )  # fmt: skip


def images_of(batch: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """The images [3, h, w] in [0, 1]."""
    return list(torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2))))


def targets_of(batch: dict[str, np.ndarray]) -> list[dict[str, torch.Tensor]]:
    """Boxes and labels without padding."""
    return [
        {"boxes": torch.from_numpy(boxes[real]), "labels": torch.from_numpy(labels[real]).long()}
        for boxes, labels, real in zip(
            batch["boxes"], batch["box_label"], batch["box_valid"], strict=True
        )
    ]


def evaluate(model: nn.Module, loader: Loader, rows: int) -> dict[str, float]:
    """The numbers of COCO over all scenes of a loader."""
    model.eval()
    evaluator = CocoEvaluator(num_classes=10)
    for batch in loader.iterate():
        with torch.inference_mode():
            found = model(images_of(batch))
        outputs = {
            "boxes": np.zeros((len(found), rows, 4), np.float32),
            "scores": np.zeros((len(found), rows), np.float32),
            "labels": np.zeros((len(found), rows), np.int32),
            "detected": np.zeros((len(found), rows), bool),
        }
        for i, one in enumerate(found):
            for name in ("boxes", "scores", "labels"):
                outputs[name][i, : len(one[name])] = one[name].numpy()
            outputs["detected"][i, : len(one["scores"])] = True
        evaluator.add(outputs, batch)
    return evaluator.result()


def main() -> None:
    """Trains, and prints what was reached and in which time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("retinanet", "fcos"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--test", type=int, help="held-out scenes; all of the recipe's by default")
    flags = parser.parse_args()
    recipe = configs.read(f"{ROOT}/configs/{flags.name}.py").to_dict()
    settings, optimizer = recipe["task"]["model"], recipe["optimizer"]
    steps = flags.steps or recipe["steps"]
    torch.manual_seed(flags.seed)
    torch.set_num_threads(1)
    model = make(flags.name, settings)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    rate = optimizer["learning_rate"]
    # Decoupled decay is multiplied by the learning rate in both.
    adamw = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=rate["peak_value"], betas=(0.9, optimizer["transform"]["b2"]),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adamw, rate["peak_value"], total_steps=steps, pct_start=rate["pct_start"],
        cycle_momentum=False,
    )  # fmt: skip
    loader = Loader(build(recipe["data"]["train"]), recipe["batch_size"], seed=flags.seed)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    batches, start, window = loader.iterate(), time.process_time(), []
    for step in range(1, steps + 1):
        batch = next(batches)
        losses = model(images_of(batch), targets_of(batch))
        loss = sum(losses.values())
        if not math.isfinite(loss.item()):
            sys.exit(f"the loss of step {step} is {loss.item()}")
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_norm"])
        adamw.step()
        schedule.step()
        window.append(loss.item())
        if step % 100 == 0 or step == steps:
            seconds = time.process_time() - start
            print(
                f"step {step}/{steps}  loss {np.mean(window):.4f}  {seconds:.0f} CPU-s", flush=True
            )
            window.clear()
    held_out = copy.deepcopy(recipe["data"]["test"])
    if flags.test:
        held_out["count"] = flags.test
    held_out = eval_loader_of(build(held_out), recipe["batch_size"], None)
    figures = evaluate(model, held_out, settings["outputs"])
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
