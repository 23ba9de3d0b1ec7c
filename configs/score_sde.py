"""Score-based generation by a stochastic differential equation, on 4,000 real MNIST digits.

A preconditioned network learns to take away noise of every level (EDM, Karras et al. 2022,
arXiv:2206.00364), which is to know the score of the noisy digits; the SDE of Song et al. 2021
(arXiv:2011.13456), run back in time by Heun's method with churn, makes digits of noise.

    python main.py --config=configs/score_sde.py
    python experiments/frechet/run.py --workdir=runs/score_sde

290 CPU-seconds on one core of a shared machine, 4 to 6 minutes on two that had other work, too. Of
1,000 samples, unguided (seeds 0, 1, 2): FD-digits 0.78, 0.85, 0.88 (held-out real digits in their
place 0.14), 90.9%, 89.8%, 89.6% are what they were asked to be (real 99.3%), recall .917, .907,
.920 (.945), median distance to the nearest training image 5.4 (real 5.0).
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 2000
    config.batch_size = 32
    config.parallel = "jit"
    config.log_every = 100
    config.evaluate_every = 500

    config.data = dict(
        train=dict(type="data.sources.digits.Digits", split="train"),
        test=dict(type="data.sources.digits.Digits", split="test"),
        transforms=dict(),
        threads=0,
        processes=0,
    )
    # The pixels of a digit in [-1, 1] have a standard deviation of 0.6.
    process = dict(
        type="diffusion.process.EDM",
        sigma_min=0.02,
        sigma_max=40.0,
        mean=-0.4,
        std=1.2,
        prediction="x0",
    )
    config.task = dict(
        type="diffusion.task.Diffusion",
        network=dict(
            type="diffusion.preconditioning.Preconditioned",
            network=dict(
                type="nn.unet.UNet",
                num_classes=10,
                width=32,
                multipliers=(1, 2),
                blocks=1,
                attention=(1,),
                patch=2,
                dtype="float32",
                remat=False,
            ),
            process=process,
            sigma_data=0.6,
        ),
        process=process,
        weighting=dict(type="diffusion.losses.edm", sigma_data=0.6),
        num_classes=10,
        image_shape=(28, 28, 1),
        class_dropout=0.05,
        guidance=1.0,
        sampler=dict(
            type="diffusion.samplers.heun",
            times=dict(type="diffusion.grids.karras", rho=7.0),
            s_churn=10.0,
        ),
        sample_steps=25,
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(
            type="train.muon.muon",
        ),
        learning_rate=dict(type="optax.cosine_decay_schedule", init_value=1e-2),
        warmup_steps=50,
        clip_norm=1.0,
        accumulate=1,
    )
    config.ema = dict(network=dict(type="train.step.warmed_up_decay", decay=0.998))

    if tiny:
        config.steps, config.batch_size = 4, 16
        config.log_every, config.evaluate_every = 2, 4
        config.data.train.per_class = config.data.test.per_class = 4
        config.task.network.network.update(width=8, multipliers=(1,), attention=(0,))
        config.task.sample_steps = 2
        config.task.sampler.s_churn = 0.0
        config.optimizer.transform = ConfigDict(dict(type="optax.adam"))
        config.optimizer.warmup_steps = 1
    return config
