"""The ends of the stroke of each digit in composed scenes, 128 x 128 pixels, with Keypoint R-CNN.

Mask R-CNN with a keypoint head (arXiv:1703.06870, section 5) on a small residual network with a
feature pyramid; scenes of one to six real MNIST digits that partly hide each other, the held-out
ones made of held-out digits. A point has sigma 0.05: at 0.1 * sqrt(area of the digit) from its
place it counts exp(-1/2). 0.477, 0.473 and 0.475 keypoint AP, 0.636, 0.637 and 0.641 box AP (COCO,
.50:.95) on 500 held-out scenes (seeds 0, 1, 2), in 13 min 46 s on one core, all told, on a good day
and 21 on a bad one; where a stroke ends in a flat edge, its point is hard to tell. Muon
(https://kellerjordan.github.io/posts/muon) takes little more than half the steps of AdamW, which
with a rate of 4e-3 and 256 features in the box head had 0.472 and 0.636 after 4,800.

    python main.py --config=configs/keypoint_rcnn.py
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 2600
    config.batch_size = 8
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 1300
    config.best = "coco/keypoint_AP"

    scenes = dict(type="data.sources.detection_scenes.DetectionScenes", keypoints=True)
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
            type="detection.rcnn.RCNN",
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
                fpn=dict(type="nn.fpn.FPN", features=48, dtype="float32"),
                stages=("stage2", "stage3", "stage4"),
            ),
            rpn=dict(
                type="detection.rpn.RPN",
                head=dict(
                    type="detection.rpn.RPNHead", anchors=2, features=48, depth=1, dtype="float32"
                ),
                scale=4.0,
                ratios=(1.0, 2.0),
                samples=64,
                candidates=100,
                proposals=50,
            ),
            box_head=dict(
                type="detection.box_head.BoxHead",
                num_classes=10,
                features=128,
                size=7,
                candidates=100,
                outputs=20,
                dtype="float32",
            ),
            heads=dict(
                keypoints=dict(
                    type="detection.keypoint_head.KeypointHead",
                    keypoints=4,
                    features=48,
                    depth=2,
                    size=14,
                    detail=2,
                    dtype="float32",
                )
            ),
            pool=dict(
                type="detection.rcnn.PyramidPool",
                levels=2,
                canonical_size=56.0,
                canonical_level=3,
                samples=1,
            ),
            samples=32,
            fraction=0.25,
        ),
        weights=dict(keypoints=0.5),
    )
    config.evaluators = dict(
        coco=dict(
            type="detection.evaluate.CocoEvaluator",
            num_classes=10,
            parts=("boxes", "keypoints"),
            sigmas=(0.05, 0.05, 0.05, 0.05),
        )
    )
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
        config.data.train.update(count=16, size=64)
        config.data.test.update(count=16, size=64)
        config.optimizer.transform = ConfigDict(dict(type="optax.adam"))
        model = config.task.model
        model.encoder.backbone.backbone.width = 4
        model.encoder.fpn.features = model.rpn.head.features = 8
        model.box_head.features = model.heads.keypoints.features = 8
        model.heads.keypoints.depth = 1
        model.rpn.proposals, model.samples = 8, 8
    return config
