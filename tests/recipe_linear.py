"""A config that trains in milliseconds a step, with parts from outside the package."""

from ml_collections import ConfigDict


def get_config(tiny=False):
    config = ConfigDict()
    config.steps = 60
    config.batch_size = 16
    config.seed = 3
    config.log_every = 5
    config.evaluate_every = 20
    config.checkpoint_every = 5
    config.tensorboard = False
    config.task = dict(
        type="tests.train.toys.Regression",
        model=dict(type="tests.train.toys.Network", batch_norm=True),
        noise=0.1,
    )
    config.data = dict(
        train=dict(type="tests.train.toys.Linear", seconds=0.0),
        test=dict(type="tests.train.toys.Linear", size=20),
        transforms=dict(),
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adam"),
        learning_rate=0.01,
        accumulate=1,
    )
    config.ema = 0.9
    return config
