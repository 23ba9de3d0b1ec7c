"""Detection of digits in composed scenes, 128 x 128 pixels, with RetinaNet.

RetinaNet (arXiv:1708.02002) on a small residual network with a feature pyramid; scenes of one to
six real MNIST digits that may overlap, among clutter; the held-out ones have held-out digits:
0.617, 0.625 and 0.627 box AP (COCO, .50:.95) on 500 held-out scenes (seeds 0, 1, 2; 0.627, 0.625,
0.629 with other roundings, those of Flax's BatchNorm), in 8 min 40 s on one core. Anchors stand on
the corners of cells (`offset` 0), for there is the middle of what a padded convolution of stride 2
sees; in the middle of the cells they gave 0.618, 0.620 and 0.621. Muon
(https://kellerjordan.github.io/posts/muon) takes little more than half the steps of AdamW: with
that, a rate of 4e-3 and anchors in the middle it was 0.613, 0.607, 0.612 after 8,000.

    python main.py --config=configs/retinanet.py
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 4500
    config.batch_size = 8
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 2250

    scenes = dict(type="data.sources.detection_scenes.DetectionScenes")
    config.data = dict(
        train=dict(**scenes, split="train", count=40_000),
        test=dict(**scenes, split="test", count=500),
        transforms=dict(),
        threads=0,
        processes=0,
    )
    config.task = dict(
        type="detection.task.Detection",
        model=dict(
            type="detection.retinanet.RetinaNet",
            encoder=dict(
                type="nn.fpn.Pyramid",
                backbone=dict(
                    type="nn.features.Patches",
                    patch=4,
                    backbone=dict(
                        type="nn.resnet.ResNet",
                        stem="cifar",
                        width=32,
                        stage_sizes=(1, 1, 1),
                        dtype="float32",
                        remat=False,
                    ),
                ),
                fpn=dict(type="nn.fpn.FPN", features=48, extra="pool", dtype="float32"),
                stages=("stage2", "stage3"),
            ),
            head=dict(
                type="detection.retinanet.RetinaNetHead",
                num_classes=10,
                anchors=4,
                features=48,
                depth=2,
                groups=8,
                dtype="float32",
            ),
            scale=2.5,
            offset=0.0,
            octaves=2,
            ratios=(1.0, 2.0),
            candidates=200,
            outputs=20,
        ),
        weights=dict(box=1.0),
    )
    config.evaluators = dict(coco=dict(type="detection.evaluate.CocoEvaluator", num_classes=10))
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(
            type="train.muon.muon",
            adam_b2=0.99,
        ),
        learning_rate=dict(type="optax.cosine_onecycle_schedule", peak_value=1e-2, pct_start=0.1),
        weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
        clip_norm=5.0,
        accumulate=1,
    )
    config.ema = None

    if tiny:
        config.steps, config.batch_size = 4, 8
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.update(count=32, size=64)
        config.data.test.update(count=16, size=64)
        config.optimizer.transform = ConfigDict(dict(type="optax.adam"))
        config.task.model.encoder.backbone.backbone.width = 4
        config.task.model.encoder.fpn.features = config.task.model.head.features = 8
        config.task.model.head.depth = 1
    return config
