"""Flow matching with optimal transport inside each batch, on 4,000 real MNIST digits.

The network learns to see the digit in what lies on the straight path between it and noise (Lipman
et al. 2023, arXiv:2210.02747; the image, not the velocity: Li and He 2025, arXiv:2511.13720). Noise
is paired with the digits of a batch, class by class, so that the paths are short (Tong et al. 2024,
arXiv:2302.00482); a few steps of Heun's method follow them, unguided.

    python main.py --config=configs/flow_matching.py
    python experiments/frechet/run.py --workdir=runs/flow_matching

280 CPU-seconds on one core of a shared machine. Of 1,000 samples, unguided (seeds 0, 1, 2):
FD-digits 0.61, 0.89, 0.70 (held-out real digits in their place 0.14), 91.1%, 90.0%, 89.7% are what
they were asked to be (real 99.3%), recall .942, .951, .950 (.945), median distance to the nearest
training image 5.4, 5.6, 5.6 (real 5.0). A network of velocities, with equal steps in time, had
0.53, 0.52, 0.60, but samples of less contrast, which small judges found half as far again from real
digits (experiments/frechet).
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
        coupling=dict(type="diffusion.coupling.optimal_coupling"),
        num_classes=10,
        image_shape=(28, 28, 1),
        class_dropout=0.05,
        guidance=1.0,
        sampler=dict(type="diffusion.samplers.heun", times=dict(type="diffusion.grids.quadratic")),
        sample_steps=13,
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
        config.task.network.update(width=8, multipliers=(1,), attention=(0,))
        config.task.sample_steps = 2
        config.optimizer.transform = ConfigDict(dict(type="optax.adam"))
        config.optimizer.warmup_steps = 1
    return config
