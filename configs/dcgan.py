"""Digits out of noise: a deep convolutional GAN on 4,000 real MNIST digits, without classes.

Generator and discriminator after Radford et al. 2016 (arXiv:1511.06434), the loss non-saturating
(Goodfellow et al. 2014, arXiv:1406.2661). In place of the BatchNorm in the discriminator there is
spectral normalization on every layer (Miyato et al. 2018, arXiv:1802.05957), and in place of
transposed convolutions depth-to-space.

    python main.py --config=configs/dcgan.py
    python experiments/frechet/run.py --workdir=runs/dcgan

830 CPU-seconds, 8 minutes on two cores, 15 with other work beside it. Of 1,000 samples (seeds 0,
1): FD-digits 0.65, 0.70 (held-out real digits in their place 0.14), precision .823, .833 (.943),
recall .933, .940 (.945), median distance to the nearest training image 5.2 (5.0): most are clean
digits. Classes (configs/conditional_gan.py) are worth more. With what the discriminator sees
shifted by up to two pixels (DiffAugment), and a shorter average, FD-digits was 1.2; with a longer
one (decay 0.9995) and a rate that falls to 0 it is 0.97 (seed 0).

So shifted, few latents were worth much, and so was a wide generator; FD-digits after 2,000 steps:

    latents, widths of the generator      FD-digits
    64, (64, 32)                          5.2
    16, (64, 32)                          4.1 and 4.1 (two seeds)
    16, (128, 64)                         3.4
    8, (64, 32)                           3.5
    8, (128, 64)                          2.3

and 2.3 after 6,000 steps of the first. Of that, on another day, with 4.6, the hinge loss had 4.9,
and R1 of gamma 1 in place of spectral normalization 3.7, which takes three times as long. Logits
four times as large gave 4.5, ten times 5.4.
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 5000
    config.batch_size = 32
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 2500

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
            widths=(48, 96, 192),
            num_classes=0,
            spectral_norm=True,
        ),
        latents=8,
        num_classes=0,
        loss=dict(type="gan.losses.NonSaturating"),
        critic_steps=1,
        gradient_penalty=0.0,
        r1=0.0,
        augment=None,
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adam", b1=0.5, b2=0.99),
        learning_rate=dict(type="optax.linear_schedule", init_value=1e-3, end_value=1e-4),
        clip_norm=None,
        accumulate=1,
    )
    config.ema = dict(generator=dict(type="train.step.warmed_up_decay", decay=0.999))

    if tiny:
        config.steps, config.batch_size = 4, 16
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.per_class = config.data.test.per_class = 4
        config.task.generator.widths = (4, 4)
        config.task.discriminator.widths = (4, 4)
    return config
