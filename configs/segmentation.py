"""Segmentation of composed scenes: two to four real MNIST digits among clutter, 96 x 96 pixels.

A small residual network (He et al. 2016, arXiv:1512.03385) with a U-Net's expanding path
(Ronneberger et al. 2015, arXiv:1505.04597) that works on squares of 2 x 2 pixels; cross-entropy and
soft Dice. The held-out scenes are made of held-out digits: 0.868, 0.875, 0.877 mean IoU (seeds 0,
1, 2) over the ground and the ten digits, after 508 CPU-seconds (4 min 40 s).

    python main.py --config=configs/segmentation.py
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 3600
    config.batch_size = 8
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 1200
    config.best = "segmentation/mean_iou"

    config.data = dict(
        train=dict(
            type="data.sources.scenes.Scenes", split="train", count=20_000, fields=("image", "mask")
        ),
        test=dict(
            type="data.sources.scenes.Scenes", split="test", count=256, fields=("image", "mask")
        ),
        transforms=dict(),
        threads=0,
        processes=0,
    )
    config.task = dict(
        type="segmentation.task.Segmentation",
        model=dict(
            type="segmentation.model.Segmenter",
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
            head=dict(
                type="segmentation.heads.UNet",
                num_classes=11,
                features=(48, 32, 16),
                subpixel=2,
                dtype="float32",
            ),
        ),
        losses=dict(
            cross_entropy=dict(type="segmentation.losses.cross_entropy"),
            dice=dict(type="segmentation.losses.dice"),
        ),
        weights=dict(cross_entropy=1.0, dice=1.0),
    )
    config.evaluators = dict(
        segmentation=dict(type="segmentation.evaluate.MeanIoU", num_classes=11)
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adamw", b2=0.99),
        learning_rate=dict(type="optax.cosine_onecycle_schedule", peak_value=1e-2, pct_start=0.08),
        weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
        clip_norm=5.0,
        accumulate=1,
    )
    config.ema = None

    if tiny:
        config.steps, config.batch_size = 4, 16
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.count = config.data.test.count = 32
        config.task.model.backbone.backbone.update(width=4, stage_sizes=(1, 1))
        config.task.model.head.features = (8,)
    return config
