"""Where arrays live: one mesh over all devices, the state on each, the batch cut in pieces."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cvjax.checks import check_count
from cvjax.errors import InputError
from cvjax.train.state import PyTree, TrainState

AXIS = "data"


def join_processes() -> None:
    """Makes this process one of those that train together; before anything else uses jax.

    They find each other as `jax.distributed.initialize` does: on TPU pods, SLURM, Open MPI and
    Kubernetes by themselves. Raises InputError where they do not.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: jax.distributed.initialize() found no other processes ({error}); "
            "leave the flag out to train with this one"
        ) from error


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over `devices` (default: all of all processes).

    Its axis is Auto: with jax's default, Explicit, ordinary code like `z @ z.T` is refused.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError when a batch cannot be cut into equal pieces for the devices."""
    check_count(1, batch_size=batch_size)
    if batch_size % mesh.size:
        fits = max(batch_size // mesh.size, 1) * mesh.size
        raise InputError(
            f"batch_size is {batch_size}, which {mesh.size} devices do not divide; {fits} would do"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch become one global array, its first axis over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_whole_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The same, of a batch of which every process holds all rows (evaluation)."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows]), batch
    )


def shapes_of_batch(
    batch: dict[str, np.ndarray], times: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch with so many times the rows of this one."""
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    shape = lambda x: (times * x.shape[0], *x.shape[1:])  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x), x.dtype, sharding=rows), batch)


def jit_step(step: Callable, mesh: Mesh) -> Callable:
    """`step(state, batch)` compiled for the mesh; the state's buffers are donated."""
    whole = replicated(mesh)
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.jit(step, in_shardings=(whole, rows), out_shardings=(whole, whole), donate_argnums=0)


def pmap_step(step: Callable, mesh: Mesh) -> Callable:
    """The same step through `pmap`: each device runs it on its own rows.

    `step` must average over the axis `data` (`make_train_step(..., axis_name="data")`). Batch
    statistics are those of a device's own rows, and a loss that divides by the number of valid
    examples divides by its own: only with equally many on every device is it what `jit` gives.
    """
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)

    def run(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
        cut = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
        state, metrics = mapped(state, cut)
        # pmap places what comes out by a mesh of its own; evaluation is compiled for ours.
        return jax.device_put((state, metrics), replicated(mesh))

    return run
