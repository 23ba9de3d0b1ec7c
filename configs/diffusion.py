"""Class-conditional diffusion on 4,000 real MNIST digits: the main job.

A U-Net learns to see the digit in what lies on the straight path between it and noise (flow
matching, Lipman et al. 2023, arXiv:2210.02747; the image, not the velocity: Li and He 2025,
arXiv:2511.13720; times as in Esser et al. 2024, arXiv:2403.03206), with classifier-free guidance.
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) takes fewer steps than Adam;
preconditioned (Boissin et al. 2025, arXiv:2512.04632) it makes a matrix orthogonal in three steps,
not five.

    python main.py --config=configs/diffusion.py
    python experiments/digit_agreement/run.py
    python experiments/frechet/run.py --workdir=runs/diffusion --config.task.guidance=1.0

With nothing compiled before it takes 4 to 6 minutes on two cores. Without guidance 90.3%, 90.8%,
91.6% of 500 samples are what they were asked to be, at 2 99.8%, 99.6%, 99.5% (seeds 0, 1, 2). Of
1,000 samples, unguided: FD-digits 0.77, 0.63, 0.61 (held-out real digits in their place 0.14),
recall .953, .939, .952 (.945), median distance to the nearest training image 5.5, 5.5, 5.5 (5.0);
at 2 0.58, .738 and 5.1 (seed 0). Small judges find them 1.5, 1.4 and 1.3 times as far from the
training digits as other real ones (experiments/frechet).
"""

from ml_collections import ConfigDict


def get_config(tiny: bool = False) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 2400
    config.batch_size = 32
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
        type="diffusion.task.Diffusion",
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
        process=dict(
            type="diffusion.process.FlowMatching",
            prediction="x0",
            times=dict(type="diffusion.process.logit_normal", mean=0.3, std=1.0),
        ),
        weighting=dict(type="diffusion.losses.edm", sigma_data=0.5),  # of x_0: SNR + 4
        num_classes=10,
        image_shape=(28, 28, 1),
        class_dropout=0.05,
        guidance=2.0,
        sampler=dict(
            type="diffusion.samplers.dpm_solver_2m", times=dict(type="diffusion.grids.quadratic")
        ),
        sample_steps=25,
    )
    config.optimizer = dict(
        type="train.optimizer.Optimizer",
        transform=dict(
            type="train.muon.muon",
            preconditioning="aol",  # after it three steps do what five did
            ns_steps=3,
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
        config.task.network.update(width=8)
        config.task.sample_steps = 2
        config.optimizer.transform = ConfigDict(dict(type="optax.adam"))
        config.optimizer.warmup_steps = 1
    return config
