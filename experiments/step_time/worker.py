"""One side of the comparison: builds a network and times blocks of steps when it is told to.

    python worker.py jax|onednn|eager|channels_last|compile NAME train|inference

Reads a number of steps per line and answers with the milliseconds of each step.
"""

import sys

import numpy as np
from networks import NETWORKS
from turns import OUR_MODES, serve


def labels(network):
    """Classes [batch], or [batch, size, size]."""
    shape = (network.batch, network.size, network.size) if network.of_pixels else network.batch
    return np.arange(np.prod(shape)).reshape(shape) % 10


def torch_step(network, mode: str, train: bool):
    """A function that makes one step, with PyTorch."""
    import torch

    torch.manual_seed(0)
    model = network.torch()
    batch = torch.randn(network.batch, network.channels, network.size, network.size)
    label = torch.from_numpy(labels(network))
    if mode != "eager":
        model = model.to(memory_format=torch.channels_last)
        batch = batch.to(memory_format=torch.channels_last)
    model.train(train)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    run = torch.compile(model) if mode == "compile" else model

    def step():
        if not train:
            with torch.inference_mode():
                return run(batch)
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(run(batch), label).backward()
        optimizer.step()

    return step


def jax_step(network, train: bool):
    """The same with this package: the engine's own train step, or `predict`."""
    import jax
    import optax

    from cvjax.classification.task import Classification
    from cvjax.segmentation.task import Segmentation
    from cvjax.train.sharding import data_mesh, jit_step, put_batch, replicated
    from cvjax.train.step import initial_state, make_train_step

    make_task = Segmentation if network.of_pixels else Classification
    task, mesh = make_task(network.ours()), data_mesh()
    shape = (network.batch, network.size, network.size, network.channels)
    batch = {
        "image": np.random.default_rng(0).random(shape, np.float32),
        "mask" if network.of_pixels else "label": labels(network),
        "valid": np.ones(network.batch, bool),
    }
    optimizers = {"model": optax.sgd(1e-3, momentum=0.9)}
    make = lambda key: initial_state(task, batch, key, optimizers, {})  # noqa: E731
    state = jax.jit(make, out_shardings=replicated(mesh))(jax.random.key(0))
    batch = put_batch(batch, mesh)
    if not train:
        predict = jax.jit(task.predict)
        return lambda: jax.block_until_ready(
            predict(state.params, state.model_state, batch, jax.random.key(0))
        )
    train_step = jit_step(make_train_step(task, optimizers), mesh)
    compiled = train_step.lower(state, batch).compile()
    holder = [state]

    def step():
        holder[0], _ = compiled(holder[0], batch)
        jax.block_until_ready(holder[0].step)

    step.program = compiled.as_text()
    return step


def main() -> None:
    """Builds and serves."""
    mode, name, kind = sys.argv[1:]
    network, train = NETWORKS[name], kind == "train"
    if mode == "onednn":
        from cvjax.nn.onednn import use_onednn

        use_onednn()
    is_ours = mode in OUR_MODES
    step = jax_step(network, train) if is_ours else torch_step(network, mode, train)
    serve(step)


if __name__ == "__main__":
    main()
