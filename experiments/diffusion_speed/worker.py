"""One side of the comparison: the main job's training step or its whole sampler.

python worker.py jax|onednn|eager|channels_last|compile ADAM|MUON train|sample
python worker.py same
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.step_time.turns import OUR_MODES, serve

BATCH, SAMPLES, RATE, DECAY, CLIP = 32, 40, 1e-3, 0.998, 1.0
RANDOM = np.random.default_rng(0)
IMAGES, LABELS = RANDOM.random((BATCH, 28, 28, 1), np.float32), np.arange(BATCH) % 10
NOISE = RANDOM.normal(size=(SAMPLES, 28, 28, 1)).astype(np.float32)


def ours():
    """The task of configs/diffusion.py, and its optimizer."""
    from cvjax import config as configs
    from cvjax.build import build

    root = Path(__file__).parents[2]
    built = build(configs.buildable(configs.read(str(root / "configs/diffusion.py"))))
    return built["task"], built["optimizer"]


def start(task):
    """Random parameters, none of them zero, so that every layer has its say."""
    import jax

    batch = {"image": IMAGES, "label": LABELS, "valid": np.ones(BATCH, bool)}
    params, _ = jax.jit(task.init)(jax.random.key(0), batch)
    leaves, tree = jax.tree.flatten(params)
    noise = np.random.default_rng(1)
    moved = [np.asarray(x) + 0.02 * noise.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, moved), batch


def grid_of(task):
    """The times of the sampler, and log(alpha / sigma) there."""
    from cvjax.diffusion.process import log_snr
    from cvjax.diffusion.samplers.integration import time_steps

    grid = time_steps(task.sampler.keywords["times"], task.process, task.sample_steps)
    return np.asarray(grid, np.float64), np.asarray(log_snr(task.process, grid), np.float64) / 2


def our_sampler(task, params):
    """(noise, label) -> images."""
    import jax
    import jax.numpy as jnp

    from cvjax.diffusion.samplers import example_keys

    @jax.jit
    def sample(noise, label):
        keys = example_keys(jax.random.key(0), len(label))
        shape = tuple(task.image_shape)
        denoise = task.denoiser(params, label)
        x = task.sampler(denoise, task.process, keys, shape, task.sample_steps, start=noise)
        return jnp.clip((x + 1) / 2, 0, 1)

    return sample


def jax_step(optimizer_name: str, kind: str):
    """A function that makes one step, or all samples, with this package."""
    import jax
    import optax

    from cvjax.train.sharding import data_mesh, jit_step, put_batch, replicated
    from cvjax.train.step import initial_state, make_train_step

    mesh, (task, muon) = data_mesh(), ours()
    params, batch = start(task)
    if kind == "sample":
        params = jax.device_put(params, replicated(mesh))
        noise, label = put_batch((NOISE, np.arange(SAMPLES) % 10), mesh)
        sample = our_sampler(task, params)
        return lambda: jax.block_until_ready(sample(noise, label))
    transform = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE))
    if optimizer_name == "MUON":
        transform = muon.build(params["network"], 1800)
    optimizers, ema = {"network": transform}, {"network": lambda _: DECAY}
    make = lambda key: initial_state(task, batch, key, optimizers, ema)  # noqa: E731
    holder = [jax.jit(make, out_shardings=replicated(mesh))(jax.random.key(0))]
    step, batch = jit_step(make_train_step(task, optimizers, ema), mesh), put_batch(batch, mesh)

    def run():
        holder[0], _ = step(holder[0], batch)
        jax.block_until_ready(holder[0].step)

    return run


def torch_optimizer(name: str, network, layout):
    """A function that makes one step of PyTorch's Adam, or of its Muon where ours is Muon."""
    import torch

    if name == "ADAM":
        return torch.optim.Adam(network.parameters(), lr=RATE, foreach=True).step

    def as_matrix(x):
        turned = x.ndim == 4 and layout is torch.channels_last
        return (x.permute(0, 2, 3, 1) if turned else x).flatten(1)

    # PyTorch's Muon takes matrices alone: it is given each kernel as one, in the same memory.
    kernels = [p for p in network.parameters() if p.ndim > 1]
    matrices = [torch.nn.Parameter(as_matrix(p.detach())) for p in kernels]
    assert [p.data_ptr() for p in kernels] == [p.data_ptr() for p in matrices]
    steps = ours()[1].transform.keywords["ns_steps"]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, ns_steps=steps)
    others = [p for p in network.parameters() if p.ndim < 2]
    adam = torch.optim.Adam(others, lr=RATE, foreach=True)

    def step():
        for kernel, matrix in zip(kernels, matrices, strict=True):
            matrix.grad = as_matrix(kernel.grad)
        muon.step()
        adam.step()

    return step


def torch_step(mode: str, optimizer_name: str, kind: str):
    """The same with PyTorch."""
    import torch
    from torch_unet import UNet, sample

    torch.manual_seed(0)
    network = UNet()
    layout = torch.contiguous_format if mode == "eager" else torch.channels_last
    network = network.to(memory_format=layout)
    run = torch.compile(network) if mode == "compile" else network
    image = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    noise = torch.from_numpy(NOISE).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    if kind == "sample":
        label, grid = torch.arange(SAMPLES) % 10, grid_of(ours()[0])

        def draw():
            with torch.inference_mode():
                return sample(run, noise, label, *grid, guidance=2.0)

        return draw
    optimize = torch_optimizer(optimizer_name, network, layout)
    averages = [p.detach().clone() for p in network.parameters()]
    label = torch.from_numpy(LABELS)

    def step():
        x0, eps = 2 * image - 1, torch.randn_like(image)
        quantile = (torch.arange(BATCH) + torch.rand(())) / BATCH
        t = torch.sigmoid(0.3 + torch.special.ndtri(quantile))
        shown = torch.where(torch.rand(BATCH) < 0.05, 10, label)
        factor = t[:, None, None, None]
        network.zero_grad(set_to_none=True)
        prediction = run((1 - factor) * x0 + factor * eps, t, shown)
        errors = torch.mean((prediction - x0) ** 2, dim=(1, 2, 3))
        torch.mean((((1 - t) / t) ** 2 + 4) * errors).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP, foreach=True)
        optimize()
        torch._foreach_lerp_(averages, [p.detach() for p in network.parameters()], 1 - DECAY)

    return step


def same() -> None:
    """Prints how far the two networks and the two samplers are from each other."""
    import jax
    import torch
    from torch_unet import UNet, load, sample

    task, _ = ours()
    params, _ = start(task)
    network = UNet()
    load(network, jax.device_get(params["network"]))
    t, label = RANDOM.random(BATCH).astype(np.float32), LABELS.astype(np.int32)
    first = jax.jit(task.network.apply)({"params": params["network"]}, IMAGES, t, label)
    nchw = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)  # noqa: E731
    with torch.inference_mode():
        second = network(nchw(IMAGES), torch.from_numpy(t), torch.from_numpy(LABELS))
        few, labels = NOISE[:8], np.arange(8)
        drawn = sample(network, nchw(few), torch.arange(8), *grid_of(task), guidance=2.0)
    images = our_sampler(task, params)(few, labels)
    for name, a, b in (("network", first, second), ("sampler", images, drawn)):
        a, b = np.asarray(a), b.permute(0, 2, 3, 1).numpy()
        print(f"{name}: {np.abs(a - b).max():.2g}, of {np.abs(a).max():.2g}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "same":
        same()
    else:
        mode, optimizer, kind = sys.argv[1:]
        if mode == "onednn":
            from cvjax.nn.onednn import use_onednn

            use_onednn()
        is_ours = mode in OUR_MODES
        serve(jax_step(optimizer, kind) if is_ours else torch_step(mode, optimizer, kind))
