"""A small ResNet on 4,000 real MNIST digits.

ResNet v1.5 (He et al. 2016, arXiv:1512.03385) with the CIFAR stem, label smoothing, small
rotations, shifts and changes of scale.

    python main.py --config=configs/classification.py
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 930  # 15 epochs
    config.batch_size = 64
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 310
    config.best = "accuracy"

    config.data = dict(
        train=dict(type="data.sources.digits.Digits", split="train"),
        test=dict(type="data.sources.digits.Digits", split="test"),
        transforms=dict(
            affine=dict(
                type="data.transforms.geometry.random_affine",
                degrees=15.0,
                scale=(0.9, 1.1),
                pixels=2.0,
            ),
        ),
        threads=0,
        processes=0,
    )
    config.task = dict(
        type="classification.task.Classification",
        model=dict(
            type="nn.resnet.ResNet",
            depth=18,
            num_classes=10,
            stem="cifar",
            width=8,
            stage_sizes=(1, 1, 1, 1),
            dtype="float32",
            remat=False,
        ),
        label_smoothing=0.1,
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adamw"),
        learning_rate=dict(type="optax.cosine_onecycle_schedule", peak_value=1e-2),
        weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
        accumulate=1,
    )
    config.ema = None

    if tiny:
        config.steps, config.batch_size = 4, 16
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.per_class = config.data.test.per_class = 4
        config.task.model.width = 4
    return config
