"""What an equally small detector of torchvision reaches on the scenes of our recipe.

    pip install torch torchvision
    python experiments/detection_peers/run.py retinanet|fcos|mask_rcnn|keypoint_rcnn [--seed 0]

The scenes, their order, the batch, the shape of the schedule, the widths of backbone, pyramid and
heads, the anchors and the thresholds are those of the recipe of that name; the layers of the heads,
losses, matching and selection are torchvision's. PyTorch's Muon takes no convolutions: where the
recipe has Muon, this has AdamW and the steps that the recipe had with AdamW, nearly twice as many.
Prints the figures of `CocoEvaluator`.
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
import torch
from torch import nn
from torchvision.models.detection import FCOS, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from cvjax import config as configs
from cvjax.build import build
from cvjax.data.loader import Loader
from cvjax.detection.evaluate import CocoEvaluator
from cvjax.train.evaluation import eval_loader_of

ROOT = Path(__file__).parents[2]
STEPS = {"retinanet": 8000, "fcos": 7200, "mask_rcnn": 4800, "keypoint_rcnn": 4800}
TWO_STAGES = ("mask_rcnn", "keypoint_rcnn")  # label 0 is the background in torchvision's
RATE, B2 = 4e-3, 0.99  # as our recipes had with AdamW


class Backbone(nn.Module):
    """Squares of pixels as channels, a small residual network, and torchvision's pyramid."""

    def __init__(self, encoder: dict):
        super().__init__()
        settings = encoder["backbone"]["backbone"]
        patch, width = encoder["backbone"]["patch"], settings["width"]
        self.out_channels = encoder["fpn"]["features"]
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch**2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        channels = [width, *(width * 2**i for i in range(len(settings["stage_sizes"])))]
        self.stages = nn.ModuleList(
            BasicBlock(
                before, after, stride=after // before,
                downsample=None if after == before else nn.Sequential(
                    nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after)
                ),
            )
            for before, after in itertools.pairwise(channels)
        )  # fmt: skip
        self.fpn = FeaturePyramidNetwork(channels[2:], self.out_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [b, 3, h, w] to the maps of all stages but the first; strides from 2 patches."""
        x, maps = self.stem(x), {}
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number > 0:
                maps[str(number - 1)] = x
        return self.fpn(maps)


def make(name: str, settings: dict) -> nn.Module:
    """The detector of torchvision with the widths, anchors and thresholds of our recipe."""
    encoder = settings["encoder"]
    backbone, patch = Backbone(encoder), encoder["backbone"]["patch"]
    strides = [2 * patch * 2**i for i in range(len(encoder["stages"]))]
    options = dict(min_size=128, max_size=128, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if name in TWO_STAGES:
        return make_rcnn(backbone, strides, settings, options)
    options |= dict(
        score_thresh=0.05, topk_candidates=settings["candidates"],
        detections_per_img=settings["outputs"],
    )  # fmt: skip
    head = settings["head"]
    norm = partial(nn.GroupNorm, head["groups"])
    classes, width = head["num_classes"], backbone.out_channels
    if name == "retinanet":
        octaves = settings["octaves"]
        sizes = [
            tuple(settings["scale"] * stride * 2 ** (i / octaves) for i in range(octaves))
            for stride in strides
        ]
        anchors = AnchorGenerator(tuple(sizes), (tuple(settings["ratios"]),) * 2)
        tower = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm)
        for part in (tower.classification_head, tower.regression_head):
            part.conv = part.conv[: head["depth"]]  # torchvision always makes four layers
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


def make_rcnn(
    backbone: Backbone, strides: list[int], settings: dict, options: dict
) -> MaskRCNN | KeypointRCNN:
    """Mask or Keypoint R-CNN; their last head sees the features alone, ours the pixels too."""
    rpn, box, heads = settings["rpn"], settings["box_head"], settings["heads"]
    pool, width = settings["pool"], backbone.out_channels
    pooled = partial(
        MultiScaleRoIAlign, [str(i) for i in range(pool["levels"])],
        sampling_ratio=pool["samples"], canonical_scale=pool["canonical_size"],
        canonical_level=pool["canonical_level"],
    )  # fmt: skip
    sizes = tuple((rpn["scale"] * stride,) for stride in strides)
    ratios = (tuple(rpn["ratios"]),) * len(strides)
    if "mask" in heads:
        detector, head = MaskRCNN, heads["mask"]
        channels = head["features"]
        options |= dict(
            mask_roi_pool=pooled(output_size=head["size"]),
            mask_head=MaskRCNNHeads(width, [channels] * head["depth"], 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, head["num_classes"] + 1),
        )
    else:
        detector, head = KeypointRCNN, heads["keypoints"]
        channels = head["features"]
        options |= dict(
            keypoint_roi_pool=pooled(output_size=head["size"]),
            keypoint_head=KeypointRCNNHeads(width, [channels] * head["depth"]),
            keypoint_predictor=KeypointRCNNPredictor(channels, head["keypoints"]),
        )
    return detector(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, ratios),
        rpn_head=RPNHead(width, len(rpn["ratios"])),
        rpn_pre_nms_top_n_train=rpn["candidates"],
        rpn_pre_nms_top_n_test=rpn["candidates"],
        rpn_post_nms_top_n_train=rpn["proposals"],
        rpn_post_nms_top_n_test=rpn["proposals"],
        rpn_batch_size_per_image=rpn["samples"],
        box_roi_pool=pooled(output_size=box["size"]),
        box_head=TwoMLPHead(width * box["size"] ** 2, box["features"]),
        box_predictor=FastRCNNPredictor(box["features"], box["num_classes"] + 1),
        box_batch_size_per_image=settings["samples"],
        box_positive_fraction=settings["fraction"],
        box_detections_per_img=box["outputs"],
        **options,
    )


def images_of(batch: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """The images [3, h, w] in [0, 1]."""
    return list(torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2))))


def targets_of(batch: dict[str, np.ndarray], background: int) -> list[dict[str, torch.Tensor]]:
    """Boxes, labels (`background` is added), masks and keypoints if there are any, not padded."""
    targets = []
    for i, real in enumerate(batch["box_valid"]):
        labels = torch.from_numpy(batch["box_label"][i][real]).long() + background
        targets.append({"boxes": torch.from_numpy(batch["boxes"][i][real]), "labels": labels})
        for part in ("masks", "keypoints"):
            if part in batch:
                targets[-1][part] = torch.from_numpy(batch[part][i][real])
    return targets


def evaluate(
    model: nn.Module, evaluator: CocoEvaluator, loader: Loader, rows: int, background: int
) -> dict[str, float]:
    """The numbers of COCO over all scenes of a loader."""
    model.eval()
    for batch in loader.iterate():
        with torch.inference_mode():
            found = model(images_of(batch))
        outputs = {
            "boxes": np.zeros((len(found), rows, 4), np.float32),
            "scores": np.zeros((len(found), rows), np.float32),
            "labels": np.zeros((len(found), rows), np.int32),
            "masks": np.zeros((len(found), rows, *batch["image"].shape[1:3]), bool),
            "detected": np.zeros((len(found), rows), bool),
        }
        if "keypoints" in batch:
            shape = (len(found), rows, *batch["keypoints"].shape[2:])
            outputs["keypoints"] = np.zeros(shape, np.float32)
        for i, one in enumerate(found):
            count = len(one["scores"])
            outputs["boxes"][i, :count] = one["boxes"].numpy()
            outputs["scores"][i, :count] = one["scores"].numpy()
            outputs["labels"][i, :count] = one["labels"].numpy() - background
            if "masks" in one:
                outputs["masks"][i, :count] = one["masks"][:, 0].numpy() >= 0.5
            if "keypoints" in one:
                outputs["keypoints"][i, :count] = one["keypoints"].numpy()
            outputs["detected"][i, :count] = True
        evaluator.add(outputs, batch)
    return evaluator.result()


def main() -> None:
    """Trains, and prints what was reached and in which time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--test", type=int, help="held-out scenes; all of the recipe's by default")
    flags = parser.parse_args()
    if any(count is not None and count < 1 for count in (flags.steps, flags.test)):
        parser.error("--steps and --test must be at least 1")
    recipe = configs.read(f"{ROOT}/configs/{flags.name}.py").to_dict()
    settings, optimizer = recipe["task"]["model"], recipe["optimizer"]
    background = int(flags.name in TWO_STAGES)
    # The losses of the heads are called by the singular there.
    weights = {
        f"loss_{name.removesuffix('s')}": weight
        for name, weight in recipe["task"]["weights"].items()
    }
    steps = flags.steps or STEPS[flags.name]
    torch.manual_seed(flags.seed)
    torch.set_num_threads(1)
    model = make(flags.name, settings)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    # Decoupled decay is multiplied by the learning rate in both.
    adamw = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=RATE, betas=(0.9, B2),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adamw, RATE, total_steps=steps, pct_start=optimizer["learning_rate"]["pct_start"],
        cycle_momentum=False,
    )  # fmt: skip
    loader = Loader(build(recipe["data"]["train"]), recipe["batch_size"], seed=flags.seed)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    batches, start, window = loader.iterate(), time.process_time(), []
    for step in range(1, steps + 1):
        batch = next(batches)
        losses = model(images_of(batch), targets_of(batch, background))
        loss = sum(weights.get(name, 1.0) * loss for name, loss in losses.items())
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
    evaluator = build(recipe["evaluators"]["coco"])
    outputs = settings["box_head"]["outputs"] if background else settings["outputs"]
    figures = evaluate(model, evaluator, held_out, outputs, background)
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
