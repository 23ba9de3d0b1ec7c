"""How long is a training step of RetinaNet-R50 at 2 x 320 x 320 beside torchvision's, and why?

    pip install torch torchvision
    python experiments/detection_peers/step.py [--rounds 5] [--onednn]

In the environment of `main.py` (unless GLIBC_TUNABLES is set), ours with convolutions by oneDNN if
asked for. Both in one process, in turn: forward, losses, gradients and a step of SGD, 91 classes, 8
objects in each image. Prints milliseconds of the wall and of the processor, their ratios round by
round, and the share of each kind of operation in our step.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))
sys.path.insert(2, str(Path(__file__).parents[1] / "step_time"))

from cvjax import cpu

if __name__ == "__main__":
    cpu.begin_again()  # before anything heavy is imported

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
import optax
import torch
from profile_step import KINDS, kinds_of, times
from torchvision.models.detection.retinanet import retinanet_resnet50_fpn

from cvjax.detection.retinanet import RetinaNet, RetinaNetHead
from cvjax.detection.task import Detection
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.onednn import use_onednn
from cvjax.nn.resnet import ResNet
from cvjax.train.step import initial_state, make_train_step

BATCH, SIZE, OBJECTS, CLASSES = 2, 320, 8, 91


def data() -> dict[str, np.ndarray]:
    """A batch as `cvjax.detection.task.Detection` takes it."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 200, (BATCH, OBJECTS, 2))
    boxes = np.concatenate([low, low + rng.uniform(20, 120, (BATCH, OBJECTS, 2))], -1)
    return {
        "image": rng.random((BATCH, SIZE, SIZE, 3), np.float32),
        "boxes": boxes.astype(np.float32),
        "box_label": rng.integers(1, CLASSES, (BATCH, OBJECTS), np.int32),
        "box_valid": np.ones((BATCH, OBJECTS), bool),
        "valid": np.ones(BATCH, bool),
    }


def of_torchvision(batch: dict[str, np.ndarray]) -> Callable[[], None]:
    """A function that makes one step of retinanet_resnet50_fpn."""
    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIZE, max_size=SIZE,
        trainable_backbone_layers=5,
    ).train()  # fmt: skip
    images = list(torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous())
    targets = [
        {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels).long()}
        for boxes, labels in zip(batch["boxes"], batch["box_label"], strict=True)
    ]
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        sgd.zero_grad(set_to_none=True)
        sum(model(images, targets).values()).backward()
        sgd.step()

    return step


def of_ours(batch: dict[str, np.ndarray]) -> Callable[[], None]:
    """The same of this package, by the engine's train step."""
    model = RetinaNet(
        Pyramid(ResNet(50), FPN(256, "pyramid", 2), ("stage2", "stage3", "stage4")),
        RetinaNetHead(CLASSES, groups=0),
        offset=0, rounded=True,
    )  # fmt: skip
    task, optimizers = Detection(model), {"model": optax.sgd(1e-4, momentum=0.9)}
    make = jax.jit(lambda key: initial_state(task, batch, key, optimizers, {}))
    batch = jax.device_put(batch)
    state = make(jax.random.key(0))
    train_step = jax.jit(make_train_step(task, optimizers), donate_argnums=0)
    compiled = train_step.lower(state, batch).compile()
    holder = [state]

    def step() -> None:
        holder[0], _ = compiled(holder[0], batch)
        jax.block_until_ready(holder[0].step)

    step.program = compiled.as_text()
    return step


def main() -> None:
    """Prints the times and the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--onednn", action="store_true")
    flags = parser.parse_args()
    rounds = flags.rounds
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    if flags.onednn:
        use_onednn()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch = data()
    sides = {"torchvision": of_torchvision(batch), "ours": of_ours(batch)}
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    found = {clock: {side: [] for side in sides} for clock in clocks}
    for step in sides.values():
        step()
    for _ in range(rounds):
        for side, step in sides.items():
            began = {clock: read() for clock, read in clocks.items()}
            step()
            for clock, read in clocks.items():
                found[clock][side].append(1000 * (read() - began[clock]))
    print("| clock | ours, ms | torchvision, ms | ratio (range) |")
    print("|---|---|---|---|")
    for clock, by_side in found.items():
        ratios = sorted(a / b for a, b in zip(by_side["ours"], by_side["torchvision"], strict=True))
        ours, theirs = (statistics.median(by_side[side]) for side in ("ours", "torchvision"))
        print(
            f"| {clock} | {ours:.0f} | {theirs:.0f} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} .. {ratios[-1]:.2f}) |"
        )
    known, kinds = kinds_of(sides["ours"].program), Counter()
    for operation, duration in times(sides["ours"]).items():
        kinds[known.get(operation, "other")] += duration
    whole = sum(kinds.values())
    shares = {kind: round(100 * kinds[kind] / whole) for kind in [*KINDS, "other"]}
    print("per cent of our step:", ", ".join(f"{kind} {share}" for kind, share in shares.items()))


if __name__ == "__main__":
    main()
