"""Detection of digits in composed scenes, 128 x 128 pixels, with FCOS.

FCOS (arXiv:1904.01355) on a small residual network with a feature pyramid; scenes of one to
six real MNIST digits that may overlap, among clutter; the held-out ones have held-out digits:
0.645, 0.642 and 0.641 box AP (COCO, .50:.95) on 500 held-out scenes (seeds 0, 1, 2), after 9 min
36 s on one core. Muon (https://kellerjordan.github.io/posts/muon) takes
little more than half the steps of AdamW: with that and a rate of 4e-3 it was 0.625, 0.619 and 0.626
after 7,200; after 4,000 of Muon 0.628, 0.627 and 0.625.

    python main.py --config=configs/fcos.py
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 5000
    config.batch_size = 8
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 2500

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
            type="detection.fcos.FCOS",
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
                type="detection.fcos.FCOSHead",
                num_classes=10,
                features=48,
                depth=2,
                groups=8,
                dtype="float32",
            ),
            reach=4.0,
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
