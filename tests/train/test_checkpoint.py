import json
import logging
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cvjax.errors import InputError
from cvjax.train import checkpoint
from cvjax.train.checkpoint import Checkpoints
from cvjax.train.checkpoint_files import damage, newest
from cvjax.train.guards import NonFiniteError
from cvjax.train.state import TrainState


def make_state(seed=0, width=4):
    key = jax.random.key(seed)
    params = {
        "model": {
            "kernel": jax.random.normal(key, (8, width)),
            "half": jax.random.normal(key, (3,)).astype(jnp.bfloat16),
            "empty": {},
        }
    }
    optimizer = optax.MultiSteps(optax.adamw(1e-3), 2)
    return TrainState(
        step=jnp.int32(7 + seed),
        rng=key,
        params=params,
        opt_state={"model": optimizer.init(params["model"])},
        model_state={"count": jnp.arange(3), "mask": jnp.array([True, False])},
        ema={},
    )


def same(one, other):
    one, other = (
        jax.tree.map(
            lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
            tree,
        )
        for tree in (one, other)
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def save(checkpoints, step, state=None, **metrics):
    state = make_state(step) if state is None else state
    checkpoints.save(
        step, state, position=10 * step, metrics=metrics, config={"a": {"b": [1, None]}}, wait=True
    )


def fill(directory, *steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            save(checkpoints, step)


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = make_state(1)
    state.params["model"]["kernel"] = state.params["model"]["kernel"].at[0, 0].set(-0.0)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) is None
        save(checkpoints, 5, state, accuracy=np.float32(0.5))
    restored = Checkpoints(tmp_path).restore(make_state(2))
    assert same(restored.state, state)
    assert jax.random.key_impl(restored.state.rng) == jax.random.key_impl(state.rng)
    assert restored.state.params["model"]["empty"] == {}
    assert (restored.step, restored.position, restored.metrics) == (5, 50, {"accuracy": 0.5})
    assert (restored.config, restored.path) == ({"a": {"b": [1, None]}}, tmp_path / "5")
    assert restored.skipped == []


def test_a_state_that_is_donated_after_the_save_is_saved_as_it_was(tmp_path):
    state = {"x": jnp.arange(1 << 20, dtype=jnp.float32)}
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, position=0, metrics={}, config={})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
    restored = Checkpoints(tmp_path).restore(state)
    np.testing.assert_array_equal(restored.state["x"], np.arange(1 << 20))


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, best="accuracy") as checkpoints:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.4, float("nan")], 1):
            save(checkpoints, step, accuracy=accuracy)
        assert steps_in(tmp_path) == [2, 4, 5]
        save(checkpoints, 6)  # between two evaluations: no metric
        assert steps_in(tmp_path) == [2, 5, 6]
    with Checkpoints(tmp_path, keep=1, best="accuracy", mode="min") as checkpoints:
        save(checkpoints, 7, accuracy=0.8)
        assert steps_in(tmp_path) == [7]


def test_a_step_is_saved_once_but_what_an_earlier_run_left_is_replaced(tmp_path):
    fill(tmp_path, 3)
    stat = (tmp_path / "3" / "manifest.json").stat().st_mtime_ns
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(make_state())
        save(checkpoints, 3)
        assert (tmp_path / "3" / "manifest.json").stat().st_mtime_ns == stat
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, make_state(9))
    assert same(Checkpoints(tmp_path).restore(make_state()).state, make_state(9))


def flip_a_bit(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def change_metadata(folder):
    path = folder / "metadata.json"
    path.write_text(path.read_text().replace("1", "2", 1))


DAMAGES = {
    "flipped bit": (flip_a_bit, "other bytes than were written"),
    "truncated": (truncate, "bytes instead of"),
    "deleted": (lambda folder: largest_file(folder).unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "its save was cut off"),
    "garbage manifest": (
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"),
        "cannot be read",
    ),
    "empty manifest": (
        lambda folder: (folder / "manifest.json").write_text("{}"),
        "cannot be read",
    ),
    "garbage metadata": (
        lambda folder: (folder / "metadata.json").write_text("{garbage"),
        "metadata.json has 8 bytes",
    ),
    "changed metadata": (change_metadata, "metadata.json has other bytes"),
    "empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "save was cut off"),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    directory = tmp_path_factory.mktemp("three")
    fill(directory, 1, 2, 3)
    return directory


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_next_older_checkpoint_taken(name, three, tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    do, reason = DAMAGES[name]
    do(directory / "3")
    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(directory).restore(make_state())
    assert restored.step == 2 and same(restored.state, make_state(2))
    (line,) = restored.skipped
    assert str(directory / "3") in line and reason in line and "\n" not in line
    assert caplog.text.count("skipped checkpoint") == 1

    for step in (1, 2):
        do(directory / str(step))
    with pytest.raises(InputError, match="none of the checkpoints is whole") as caught:
        newest(directory)
    assert str(caught.value).count(reason) == 3 and "\n" not in str(caught.value)


def test_every_single_file_is_needed(three, tmp_path):
    for path in sorted(p for p in (three / "3").rglob("*") if p.is_file()):
        folder = tmp_path / "copy"
        shutil.copytree(three / "3", folder)
        assert damage(folder) is None
        (folder / path.relative_to(three / "3")).unlink()
        assert damage(folder) is not None, path
        shutil.rmtree(folder)


def test_damaged_checkpoints_do_not_push_out_good_ones(three, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    fill(directory, 4)  # 2, 3, 4
    flip_a_bit(directory / "4")
    flip_a_bit(directory / "3")
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.restore(make_state()).step == 2
        assert steps_in(directory) == [2, 3, 4]  # restoring deletes nothing
        save(checkpoints, 3)
    assert steps_in(directory) == [2, 3]
    assert Checkpoints(directory).restore(make_state()).skipped == []


KILLED = """
import os, sys
import jax.numpy as jnp
from cvjax.train import checkpoint
seal = checkpoint.seal
def die(folder, text):
    if folder.name == "2":
        os._exit(9)
    seal(folder, text)
checkpoint.seal = die
checkpoints = checkpoint.Checkpoints(sys.argv[1])
for step in (1, 2):
    checkpoints.save(step, {"x": jnp.ones(3) * step}, position=0, metrics={}, config={}, wait=True)
"""


def test_a_save_that_is_killed_is_no_checkpoint_and_is_cleared_away(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path]).returncode == 9
    assert (tmp_path / "2").is_dir()
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore({"x": jnp.zeros(3)})
        assert restored.step == 1 and "cut off" in restored.skipped[0]
        assert (tmp_path / "3.orbax-checkpoint-tmp").exists()  # another process may be writing
        save(checkpoints, 4, {"x": jnp.zeros(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]


def test_a_run_that_is_killed_in_its_first_save_begins_anew(tmp_path):
    killed = KILLED.replace('"2"', '"1"')
    assert subprocess.run([sys.executable, "-c", killed, tmp_path]).returncode == 9
    assert steps_in(tmp_path) == [1] and newest(tmp_path) is None
    (tmp_path / "7").write_text("a file of somebody's")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore({"x": jnp.zeros(3)}) is None
        save(checkpoints, 1, {"x": jnp.zeros(3)})
    assert newest(tmp_path).step == 1 and (tmp_path / "7").is_file()


def test_a_folder_that_is_half_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed in between
        save(checkpoints, 2)
    assert steps_in(tmp_path) == [1, 2]
    assert "cut off" in damage(tmp_path / "1") and damage(tmp_path / "2") is None


def test_another_model_is_one_line_with_both_shapes(three):
    with pytest.raises(InputError, match=r"float32\[8,4\] there, float32\[8,5\] here") as caught:
        Checkpoints(three).restore(make_state(width=5))
    assert "params/model/kernel" in str(caught.value) and "\n" not in str(caught.value)
    other = make_state()
    other.params["model"]["more"] = jnp.zeros(2)
    with pytest.raises(InputError, match=r"params/model/more is absent there, float32\[2\] here"):
        Checkpoints(three).restore(other)
    other = make_state().replace(model_state={})
    with pytest.raises(InputError, match=r"model_state/count is int32\[3\] there, absent here"):
        Checkpoints(three).restore(other)
    other = make_state().replace(rng=jax.random.key(0, impl="rbg"))
    with pytest.raises(InputError, match=r"rng is key<fry>\[\] there, key<rbg>\[\] here"):
        Checkpoints(three).restore(other)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")])
def test_restores_onto_any_number_of_devices(spec, tmp_path):
    def on(count, tree):
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
        )
        whole = NamedSharding(mesh, PartitionSpec())
        tree = jax.device_put(tree, whole)
        tree.params["model"]["kernel"] = jax.device_put(
            tree.params["model"]["kernel"], NamedSharding(mesh, spec)
        )
        return tree

    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, on(4, make_state(3)))
    for count in (1, 4, 8):
        like = on(count, make_state())
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        for tree in (like, abstract):
            restored = Checkpoints(tmp_path).restore(tree).state
            assert same(restored, make_state(3))
            for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
                assert x.sharding == y.sharding


def test_a_state_that_is_not_finite_is_refused_and_the_array_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for bad in (jnp.nan, -jnp.inf):
            state = make_state()
            state.params["model"]["kernel"] = state.params["model"]["kernel"].at[2, 1].set(bad)
            with pytest.raises(NonFiniteError, match="params/model/kernel is not finite at step 4"):
                save(checkpoints, 4, state)
        plateau = optax.contrib.reduce_on_plateau().init({})
        save(checkpoints, 5, make_state().replace(opt_state={"model": plateau}))
    assert steps_in(tmp_path) == [5]


def test_a_scalar_of_the_parameters_that_is_infinite_is_refused(tmp_path):
    state = make_state()
    state.params["model"]["scale"] = jnp.float32(jnp.inf)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(NonFiniteError, match="params/model/scale"),
    ):
        save(checkpoints, 4, state)


def test_the_round_trip_leaves_nothing_behind(tmp_path):
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        checkpoints.prove_round_trip(make_state())
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []


def test_the_round_trip_finds_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="NotADirectoryError") as caught:
        Checkpoints(tmp_path / "file" / "checkpoints").prove_round_trip(make_state())
    assert str(tmp_path / "file" / "checkpoints") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_round_trip_finds_a_full_disk(tmp_path, monkeypatch):
    def seal(folder, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", seal)
    with pytest.raises(InputError, match="No space left on device"):
        Checkpoints(tmp_path).prove_round_trip(make_state())
    assert list(tmp_path.iterdir()) == []


def test_the_round_trip_finds_what_is_read_back_differently(tmp_path, monkeypatch):
    read = checkpoint.read_arrays
    monkeypatch.setattr(
        checkpoint,
        "read_arrays",
        lambda *args: {path: array * -1 for path, array in read(*args).items()},
    )
    with pytest.raises(InputError, match="x is read back with other values"):
        Checkpoints(tmp_path).prove_round_trip({"x": jnp.zeros(3)})


# Orbax leaves a thread that speaks to a closed event loop when it refuses an array.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "leaf, reason",
    [
        (object(), "model_state is of type object, not an array"),
        (np.array([{}]), "model_state is an array of object, not of numbers"),
        (np.array(["a"]), "model_state is an array of <U1, not of numbers"),
        (jnp.zeros((0, 3)), "zero size"),
    ],
)
def test_the_round_trip_finds_what_cannot_be_saved(leaf, reason, tmp_path):
    with pytest.raises(InputError, match=reason) as caught:
        Checkpoints(tmp_path).prove_round_trip(make_state().replace(model_state=leaf))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def break_the_background(checkpoints, monkeypatch):
    save(checkpoints, 1)
    monkeypatch.setattr(
        checkpoint, "seal", lambda *args: (_ for _ in ()).throw(OSError(5, "I/O error"))
    )
    checkpoints.save(2, make_state(), position=0, metrics={}, config={})


def test_a_failure_in_the_background_is_raised_at_the_next_step(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    break_the_background(checkpoints, monkeypatch)
    deadline = time.monotonic() + 20
    with pytest.raises(InputError, match=r"/2 cannot be saved: OSError: .*I/O error") as caught:
        while time.monotonic() < deadline:
            checkpoints.raise_failed_save()
            time.sleep(0.01)
    assert "\n" not in str(caught.value)
    checkpoints.raise_failed_save()  # once is enough
    checkpoints.close()


def test_a_directory_that_goes_away_is_raised(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        save(checkpoints, 1)
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("")
        with pytest.raises(InputError, match="2 cannot be saved"):
            save(checkpoints, 2)


def test_close_raises_the_failure_but_does_not_hide_another_error(tmp_path, monkeypatch, caplog):
    with pytest.raises(InputError, match="I/O error"), Checkpoints(tmp_path) as checkpoints:
        break_the_background(checkpoints, monkeypatch)
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
        break_the_background(checkpoints, monkeypatch)
        raise ZeroDivisionError
    assert "I/O error" in caplog.text


def test_metadata_can_be_read_by_a_person(three):
    metadata = json.loads((three / "3" / "metadata.json").read_text())
    assert metadata["arrays"]["params/model/half"] == "bfloat16[3]"
    assert metadata["arrays"]["rng"] == "key<fry>[]"
    assert metadata["position"] == 30
