"""A Wasserstein GAN with gradient penalty on 4,000 real MNIST digits, without classes.

Gulrajani et al. 2017 (arXiv:1704.00028): a critic without norms, kept smooth by a penalty of
weight 10, and Adam without momentum. Each step of the generator follows three of the critic, each
of which sees other digits.

    python main.py --config=configs/wgan_gp.py
    python experiments/frechet/run.py --workdir=runs/wgan_gp

1,212 CPU-seconds on one core of a slow day; two made 2.1 steps a second, which is 13 minutes. Of
1,000 samples (seed 0): FD-digits 1.2 (held-out real digits in their place 0.13), precision .807
(.933), recall .914 (.940): most are clean digits; 2,000 steps give 1.1, .828 and .920. With 64
latents and half the generator's widths these gave 3.5.

Weight clipping (Arjovsky et al. 2017, arXiv:1701.07875) in place of the penalty, of the critic's
weights alone, for which each group has an optimizer of its own:

    config.task.gradient_penalty = 0.0
    plain = config.optimizer.to_dict()
    clipped = dict(type="gan.clipping.clipped", transform=dict(type="optax.rmsprop"), limit=0.01)
    config.optimizer = dict(generator=plain, discriminator={**plain, "transform": clipped})
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 1600
    config.batch_size = 96  # 32 for each step of the critic
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 800

    config.data = dict(
        train=dict(type="data.sources.digits.Digits", split="train"),
        test=dict(type="data.sources.digits.Digits", split="test"),
        transforms=dict(),
        threads=0,
        processes=0,
    )
    config.task = dict(
        type="gan.task.GAN",
        generator=dict(
            type="gan.model.Generator", shape=(28, 28, 1), widths=(128, 64), num_classes=0
        ),
        discriminator=dict(
            type="gan.model.Discriminator",
            widths=(32, 64, 128),
            num_classes=0,
            spectral_norm=False,
        ),
        latents=8,
        num_classes=0,
        loss=dict(type="gan.losses.Wasserstein"),
        critic_steps=3,
        gradient_penalty=10.0,
        r1=0.0,
        augment=None,
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adam", b1=0.0, b2=0.9),
        learning_rate=dict(type="optax.constant_schedule", value=5e-4),
        clip_norm=None,
        accumulate=1,
    )
    config.ema = dict(generator=dict(type="train.step.warmed_up_decay", decay=0.995))

    if tiny:
        config.steps, config.batch_size = 4, 24
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.per_class = config.data.test.per_class = 4
        config.task.generator.widths = (4, 4)
        config.task.discriminator.widths = (4, 4)
    return config
