"""Trees in aerial photographs, with FCOS: real detection from files.

FCOS (arXiv:1904.01355) on a small residual network with a feature pyramid. It learns on windows of
two photographs with 611 trees and is evaluated on two others with 340, one of another forest; the
files come with a package.

    pip install --no-deps deepforest==2.1.0
    python main.py --config=configs/trees.py

Measured (seed 0, untuned): box AP .055, AP50 .196 on the two held-out photographs,
in 193 CPU-seconds.
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 500
    config.batch_size = 16
    config.parallel = "jit"
    config.log_every = 50
    config.evaluate_every = 250

    size = 128
    moves = "data.transforms.geometry"
    config.data = dict(
        train=dict(type="data.sources.trees.Trees", split="train", window=192, count=10_000),
        test=dict(type="data.sources.trees.Trees", split="test", window=192),
        transforms=dict(
            scale=dict(type=f"{moves}.random_scale_crop", size=size, scale=(0.8, 1.4)),
            flip=dict(type=f"{moves}.random_flip"),
            turn=dict(type=f"{moves}.random_quarter_turn"),
            small=dict(type=f"{moves}.drop_small_boxes", pixels=4.0),
            colour=dict(
                type="data.transforms.colour.random_jitter",
                brightness=0.3,
                contrast=0.3,
                saturation=0.3,
                hue=0.03,
            ),
        ),
        test_transforms=dict(usual=dict(type="data.transforms.defaults.detection_eval", size=size)),
        threads=0,
        processes=0,
    )
    config.task = dict(
        type="detection.task.Detection",
        model=dict(
            type="detection.fcos.FCOS",
            encoder=dict(
                type="nn.fpn.Pyramid",
                backbone=dict(
                    type="nn.features.Patches",
                    patch=2,
                    backbone=dict(
                        type="nn.resnet.ResNet",
                        stem="cifar",
                        width=16,
                        stage_sizes=(1, 1, 1, 1),
                        dtype="float32",
                        remat=False,
                    ),
                ),
                fpn=dict(type="nn.fpn.FPN", features=48, extra="pool", dtype="float32"),
                stages=("stage3", "stage4"),
            ),
            head=dict(
                type="detection.fcos.FCOSHead",
                num_classes=1,
                features=48,
                depth=2,
                groups=8,
                dtype="float32",
            ),
            reach=4.0,
            candidates=200,
            outputs=60,
        ),
        weights=dict(box=1.0),
        shown_score=0.3,
    )
    config.evaluators = dict(
        coco=dict(
            type="detection.evaluate.CocoEvaluator",
            num_classes=1,
            parts=("boxes",),
            class_names=("tree",),
        ),
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adamw", b2=0.99),
        learning_rate=dict(type="optax.cosine_onecycle_schedule", peak_value=4e-3, pct_start=0.1),
        weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
        clip_norm=5.0,
        accumulate=1,
    )
    config.ema = None

    if tiny:
        config.steps, config.batch_size = 4, 8
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.count = 16
        config.task.model.encoder.backbone.backbone.width = 4
        config.task.model.encoder.fpn.features = config.task.model.head.features = 8
        config.task.model.head.depth = 1
    return config
