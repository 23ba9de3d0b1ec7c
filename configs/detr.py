"""Detection of digits in composed scenes, 128 x 128 pixels, with DETR.

DETR (arXiv:2005.12872) with 16 queries on a small residual network; scenes of one to six real MNIST
digits that partly hide each other, the held-out ones made of held-out digits: 0.455 box AP (COCO,
.50:.95) on 500 held-out scenes (seed 0), after 31 minutes on one core. DETR learns slowly (500
epochs of COCO in the paper) and is not at its end here. Its map has cells of 8 x 8 pixels: with 16
x 16 and one layer in the encoder it had 0.325, after 3,000 steps of 16 scenes.

    python main.py --config=configs/detr.py
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
    config.best = "coco/box_AP"

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
            type="detection.detr.DETR",
            backbone=dict(
                type="nn.features.Patches",
                patch=4,
                backbone=dict(
                    type="nn.resnet.ResNet",
                    stem="cifar",
                    width=32,
                    stage_sizes=(1, 2),
                    dtype="float32",
                    remat=False,
                ),
            ),
            num_classes=10,
            queries=16,
            features=96,
            heads=4,
            hidden=192,
            encoder_layers=2,
            decoder_layers=3,
            dropout=0.0,
            dtype="float32",
        ),
        weights=dict(box=5.0, giou=2.0),
    )
    config.evaluators = dict(coco=dict(type="detection.evaluate.CocoEvaluator", num_classes=10))
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(
            type="train.muon.muon",
            adam_b2=0.99,
        ),
        learning_rate=dict(type="optax.cosine_onecycle_schedule", peak_value=4e-3, pct_start=0.1),
        weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
        clip_norm=0.5,
        accumulate=1,
    )
    config.ema = None

    if tiny:
        config.optimizer.transform = ConfigDict(dict(type="optax.adam"))
        config.steps, config.batch_size = 4, 8
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.update(count=16, size=64)
        config.data.test.update(count=16, size=64)
        model = config.task.model
        model.backbone.backbone.width = 4
        model.features, model.hidden, model.queries = 8, 8, 8
        model.heads, model.encoder_layers, model.decoder_layers = 2, 1, 1
    return config
