"""Two stages: first which digits a scene shows, then, from that backbone, the digit of every pixel.

Names of classes are cheap, masks are dear: the first stage learns from 20,000 scenes that say only
which digits they show, the second from 300 with masks. Each stage is a config of its own; that its
`initialize` names no path means the work directory of the stage before. 0.671, 0.679 mean IoU on
held-out scenes (seeds 0, 1), 0.540 without the first stage (seed 0), after 2 min 21 s.

    python main.py --config=configs/stages.py
    python main.py --mode=evaluate --workdir=runs/stages/masks

What the first stage is worth: the second alone, from scratch, is

    python main.py --config=configs/stages.py --config.stages.names.steps=1
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    return ConfigDict(
        dict(
            stages=dict(
                names=stage(
                    steps=1600, count=20_000, field="present", tiny=tiny,
                    head=dict(
                        type="multitask.task.Head",
                        module=dict(type="multitask.multilabel.Pooled", outputs=10),
                        criterion=dict(type="multitask.multilabel.measure", field="present"),
                        predict=dict(type="jax.nn.sigmoid"),
                        weight=1.0,
                        check=dict(type="multitask.multilabel.check", field="present"),
                    ),
                ),
                masks=dict(
                    **stage(
                        steps=800, count=300, field="mask", tiny=tiny,
                        head=dict(
                            type="multitask.task.Head",
                            module=dict(
                                type="segmentation.heads.UNet",
                                num_classes=11,
                                features=(8,) if tiny else (48, 32, 16),
                                subpixel=2,
                                dtype="float32",
                            ),
                            criterion=dict(
                                type="segmentation.task.measure",
                                losses=dict(
                                    cross_entropy=dict(type="segmentation.losses.cross_entropy"),
                                    dice=dict(type="segmentation.losses.dice"),
                                ),
                            ),
                            predict=dict(type="jax.numpy.argmax", axis=-1),
                            picture=dict(type="segmentation.task.side_by_side"),
                            weight=1.0,
                            check=dict(type="segmentation.task.check_masks"),
                        ),
                    ),
                    initialize=dict(
                        type="train.restore.load_params",
                        take={
                            "model/backbone": "model/backbone",
                            "model_state/batch_stats/backbone": "model_state/batch_stats/backbone",
                        },
                    ),
                    evaluators=dict(
                        segmentation=dict(
                            type="segmentation.evaluate.MeanIoU", num_classes=11, prediction="mask"
                        )
                    ),
                ),
            )
        )
    )  # fmt: skip


def stage(steps: int, count: int, field: str, head: dict, tiny: bool) -> dict:
    """What both stages have in common: the data, the backbone, the optimizer."""
    scenes = dict(type="data.sources.scenes.Scenes", fields=("image", field))
    backbone = dict(
        type="nn.features.Patches",
        patch=2,
        backbone=dict(
            type="nn.resnet.ResNet",
            stem="cifar",
            width=4 if tiny else 16,
            stage_sizes=(1, 1) if tiny else (1, 1, 1, 1),
            dtype="float32",
            remat=False,
        ),
    )
    return dict(
        seed=0,
        steps=4 if tiny else steps,
        batch_size=16 if tiny else 8,
        parallel="jit",
        log_every=2 if tiny else 100,
        evaluate_every=4 if tiny else 400,
        data=dict(
            train=dict(split="train", count=32 if tiny else count, **scenes),
            test=dict(split="test", count=32 if tiny else 256, **scenes),
            transforms=dict(),
            threads=0,
            processes=0,
        ),
        task=dict(type="multitask.task.MultiTask", backbone=backbone, heads={field: head}),
        optimizer=dict(
            type="train.optimizer.Optimizer",
            transform=dict(type="optax.adamw", b2=0.99),
            learning_rate=dict(
                type="optax.cosine_onecycle_schedule", peak_value=1e-2, pct_start=0.15
            ),
            weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
            clip_norm=5.0,
            accumulate=1,
        ),
        ema=None,
    )
