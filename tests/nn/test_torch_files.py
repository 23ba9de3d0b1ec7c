"""Files that torch wrote, files that want something executed, and damaged ones."""

import argparse
import io
import os
import pickle
import subprocess
import time
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.pretrained import read_weights
from cvjax.nn.torch_files import LEGACY_MAGIC, read_torch, state_dict

HERE = Path(__file__).parent
WRITTEN = ["torch_zip.pth", "torch_legacy.pth"]  # by record_parity.py


@pytest.mark.parametrize("name", WRITTEN)
def test_what_torch_wrote(name):
    arrays = read_weights(HERE / name)
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "parameter": whole[0] - 2.5,
        "expanded": np.full(3, 1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(7),
        "half": whole[0].astype(np.float16),
        "bfloat16": whole[0].astype(jnp.bfloat16),
        "double": whole[0].astype(np.float64),
        "bool": whole[0] > 2,
        "byte": whole[0].astype(np.uint8),
    }
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    root = read_torch(HERE / WRITTEN[0])
    assert root["epoch"] == 3 and root["optimizer"] == {"lr": [0.1, None, True]}


def test_what_training_scripts_save_beside_the_weights(tmp_path):
    """Options, devices and sets, as torch pickles them, are values; their classes are not made."""
    weight = tensor()[2:-1]  # {"w": tensor}
    device = b"ctorch\ndevice\nX\x04\x00\x00\x00cudaK\x00\x86R"
    sets = b"c__builtin__\nset\n](K\x01X\x01\x00\x00\x00ae\x85R", b"\x8f(K\x02\x90", b"(K\x03\x91"
    options = pickle.dumps(argparse.Namespace(lr=0.1, crop=[3, 32], amp=None), 2)[2:-1]
    keys = [b"X%c\x00\x00\x00%s" % (len(k), k) for k in (b"state_dict", b"args", b"d", b"s")]
    values = (weight, options, device, b"(" + b"".join(sets) + b"t")
    items = b"".join(key + value for key, value in zip(keys, values, strict=True))
    file = tmp_path / "weights.pth"
    as_zip(file, b"\x80\x02}(" + items + b"u.", **{"data/0": bytes(16)})
    root = read_torch(file)
    assert root["args"] == {} and read_weights(file)["w"].shape == (4,)
    assert root["d"] == "cuda:0" and root["s"] == ([1, "a"], [2], [3])
    counts = Counter("aba"), defaultdict(list, a=[1]), defaultdict(None)
    as_zip(file, pickle.dumps(counts, 2))
    assert read_torch(file) == ({"a": 2, "b": 1}, {"a": [1]}, {})
    # The same words for another class are refused; so is one with arguments.
    for other in (
        options.replace(b"Namespace", b"FileType"),
        options.replace(b")\x81", b"K\x01\x85\x81"),
        b"cargparse\nNamespace\n)R",
        b"ctorch\ndevice\n]\x85R",
        b"ccollections\ndefaultdict\n]\x85R",
        b"ccollections\nCounter\n]\x85R",
    ):
        assert other != options
        as_zip(file, b"\x80\x02" + other + b".")
        with pytest.raises(InputError, match="is refused|is not a whole file"):
            read_torch(file)


class Calls:
    """Pickled, it is an instruction to call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_zip(path, data, **parts):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, part in parts.items():
            archive.writestr(f"archive/{name}", part)


def as_legacy(path, data):
    start = b"".join(pickle.dumps(v, 2) for v in (LEGACY_MAGIC, 1001, {"little_endian": True}))
    path.write_bytes(start + data + pickle.dumps([], 2))


def hostile(canary):
    """Pickles that leave a file behind when they are loaded, by all the ways there are."""
    touch = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w').close()"
    text = touch.encode()
    found = {}
    for protocol in range(6):
        call = Calls(os.system, touch)
        found[f"system {protocol}"] = pickle.dumps(call, protocol)
        found[f"inside {protocol}"] = pickle.dumps({"weight": [call], "bias": 1.0}, protocol)
    found["exec"] = pickle.dumps(Calls(exec, python))
    found["eval"] = pickle.dumps(Calls(eval, f"__import__('os').system({touch!r})"))
    found["process"] = pickle.dumps(Calls(subprocess.call, ["touch", str(canary)]))
    found["inst"] = b"(S'" + text + b"'\nios\nsystem\n."
    found["obj"] = b"(cos\nsystem\nS'" + text + b"'\no."
    # What stays on the stack is innocent; the call has happened by then.
    found["popped"] = b"cos\nsystem\n(S'" + text + b"'\ntR0}."
    found["memo"] = b"cos\nsystem\np0\n0g0\n(S'" + text + b"'\ntR."
    found["ordered"] = b"ccollections\nOrderedDict\n(cos\nsystem\n(S'" + text + b"'\ntRtR."
    return found


@pytest.mark.parametrize("name", sorted(hostile("x")))
def test_hostile_files_are_refused_and_nothing_happens(name, tmp_path):
    canary = tmp_path / "canary"
    data = hostile(canary)[name]
    try:
        pickle.loads(data)
    except TypeError:  # some end badly, once the call has been made
        pass
    assert canary.exists(), "this pickle is not hostile"
    canary.unlink()
    as_zip(tmp_path / "zip.pth", data)
    as_legacy(tmp_path / "legacy.pth", data)
    (tmp_path / "bare.pth").write_bytes(data)
    for file in ("zip.pth", "legacy.pth", "bare.pth"):
        with pytest.raises(InputError, match="is refused: it (calls|makes)"):
            read_weights(tmp_path / file)
    assert not canary.exists()


INNOCENT_LOOKS = {
    # A name is never imported: this module does not exist, one that does is not run.
    "unknown": b"cno_such_module\nno_such_name\n)R.",
    "newobj": b"\x80\x02cbuiltins\nobject\n)\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "build": b"\x80\x02]}b.",
    "persistent": b"Pname\n.",
    "numpy": pickle.dumps({"a": np.array(["text"])}, 2),
    "load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
    "key": b"\x80\x02}((K\x01tK\x02s.",
    "module": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.",
}


@pytest.mark.parametrize("name", INNOCENT_LOOKS)
def test_all_else_that_is_no_data_is_refused(name, tmp_path):
    as_zip(tmp_path / "weights.pth", INNOCENT_LOOKS[name])
    with pytest.raises(InputError, match=r"weights\.pth (is refused|is not a whole file)"):
        read_weights(tmp_path / "weights.pth")


def test_a_whole_module_in_the_older_format_is_refused_as_one(tmp_path):
    module = b"(X\x06\x00\x00\x00moduleca\nNet\nX\x01\x00\x00\x00aX\x01\x00\x00\x00btQ."
    as_legacy(tmp_path / "weights.pth", b"\x80\x02" + module)
    with pytest.raises(InputError, match=r"a whole module, not weights alone; save the state_dict"):
        read_weights(tmp_path / "weights.pth")


def tensor(storage="FloatStorage", length="K\x04", offset="K\x00", shape="K\x04\x85",
           strides="K\x01\x85"):  # fmt: skip
    """A pickle {"w": tensor} of four numbers, with something changed."""
    reference = (
        f"(X\x07\x00\x00\x00storagectorch\n{storage}\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    rebuild = "ctorch._utils\n_rebuild_tensor_v2\n("
    text = f"}}X\x01\x00\x00\x00w{rebuild}{reference}{length}tQ{offset}{shape}{strides}\x89NtRs."
    return b"\x80\x02" + text.encode("latin1")


NO_NUMBERS = "a tensor whose shape and strides are no numbers"
IMPOSSIBLE = {
    "beyond the end": (dict(offset="K\x01"), "reaches to number 4 of 4"),
    "stride beyond": (dict(strides="K\x02\x85"), "reaches to number 6 of 4"),
    "negative offset": (dict(offset="J\xff\xff\xff\xff"), NO_NUMBERS),
    "negative stride": (dict(strides="J\xff\xff\xff\xff\x85"), NO_NUMBERS),
    "negative size": (dict(shape="J\xff\xff\xff\xff\x85"), NO_NUMBERS),
    "more dimensions": (dict(shape="K\x02K\x02\x86"), "a tensor without numbers"),
    "longer than it is": (dict(length="K\x05"), "of 5 numbers, of which 4 are there"),
    "no integer": (dict(shape="\x88\x85"), NO_NUMBERS),
    "of no known type": (
        dict(storage="ComplexFloatStorage"), "refused: its numbers are of type torch.Complex"
    ),
    "endless": (
        dict(shape="J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", strides="K\x00K\x00\x86"),
        r"of shape \(2147483647, 2147483647\), made of 4 numbers",
    ),
}  # fmt: skip


def test_tensors_stay_inside_their_storage(tmp_path):
    file, numbers = tmp_path / "weights.pth", np.arange(4, dtype=np.float32)
    as_zip(file, tensor(), **{"data/0": numbers.tobytes()})
    np.testing.assert_array_equal(read_weights(file)["w"], numbers)
    for name, (change, message) in IMPOSSIBLE.items():
        as_zip(file, tensor(**change), **{"data/0": numbers.tobytes()})
        with pytest.raises(InputError, match=message):
            print(name, read_weights(file))
    as_zip(file, tensor())
    with pytest.raises(InputError, match="not a whole file"):
        read_weights(file)


def test_numbers_that_are_meant_with_another_sign_are_refused(tmp_path):
    """`torch.conj(x).imag` is saved as the numbers of x and a note, {"neg": True}."""
    file = tmp_path / "weights.pth"
    negative = tensor().replace(b"\x89NtR", b"\x89N}X\x03\x00\x00\x00neg\x88stR")
    as_zip(file, negative, **{"data/0": bytes(16)})
    with pytest.raises(InputError, match=r"refused: a tensor has more .* clone\(\)"):
        read_weights(file)


def nested(end):
    """A pickle with a tuple of itself, sixty times, as memo 60: written out it has no end."""
    steps = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    return b"\x80\x02)q\x00" + steps + b"0" + end


NUMBERS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
ENDLESS = {
    "shape": nested(
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + NUMBERS + b"K\x06tQK\x00h\x3c\x85K\x01\x85tR."
    ),
    "reference": nested(b"(h\x3c" + NUMBERS[NUMBERS.index(b"ctorch") :] + b"K\x06tQ."),
    "set": nested(b"cbuiltins\nset\nh\x3c\x85R."),
    "name": nested(b"h\x3ch\x3c\x93."),
    "dtype": nested(b"}X\x01\x00\x00\x00acnumpy\ndtype\nh\x3c\x85Rs."),
    "namespace": nested(b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00ah\x3csb."),
    "length": nested(NUMBERS + b"h\x3ctQ."),
    "key": nested(b"}h\x3cK\x01s."),
    "root": nested(b"h\x3c."),
    "marks": b"\x80\x02" + b"K\x01" * 300_000 + b"(t" * 30_000 + b".",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_take_for_ever_is_refused_at_once(name, tmp_path):
    as_zip(tmp_path / "weights.pth", ENDLESS[name])
    began = time.process_time()
    refused = "is not a whole file|is refused: it has a key|has no dictionary of weights"
    with pytest.raises(InputError, match=rf"weights\.pth ({refused})") as error:
        read_weights(tmp_path / "weights.pth")
    assert time.process_time() - began < 10 and len(str(error.value)) < 1000


def test_the_older_format_has_names_for_its_numbers(tmp_path):
    """Nested names would take for ever to be looked up."""
    start = b"".join(pickle.dumps(v, 2) for v in (LEGACY_MAGIC, 1001, {}, {}))
    (tmp_path / "weights.pth").write_bytes(start + nested(b"h\x3c.") + bytes(8))
    with pytest.raises(InputError, match="numbers without a name"):
        read_weights(tmp_path / "weights.pth")


def test_numbers_of_numpy_beside_the_weights(tmp_path):
    saved = {"best": np.float64(0.9), "history": [np.float32(1), np.int64(2)], "mean": np.ones(3)}
    items = pickle.dumps(saved, 2)[2:-1]
    file = tmp_path / "weights.pth"
    keys = [b"X\x05\x00\x00\x00%s" % name for name in (b"model", b"state")]
    as_zip(file, b"\x80\x02}(" + keys[0] + tensor()[2:-1] + keys[1] + items + b"u.",
           **{"data/0": bytes(16)})  # fmt: skip
    state = read_torch(file)["state"]
    assert state["best"] == 0.9 and state["history"] == [1, 2]
    np.testing.assert_array_equal(state["mean"], np.ones(3))
    assert read_weights(file).keys() == {"w"}


def test_a_small_file_does_not_become_a_large_array(tmp_path):
    """A stride of 0 shows the same number again: as position embeddings it would be resampled."""
    file, numbers = tmp_path / "weights.pth", np.arange(4, dtype=np.float32)
    side = "J\x00\x10\x00\x00"  # 4096
    as_zip(file, tensor(shape=f"{side}{side}\x86", strides="K\x00K\x00\x86"),
           **{"data/0": numbers.tobytes()})  # fmt: skip
    assert read_weights(file)["w"].shape == (4096, 4096)  # a view: it takes no memory
    as_zip(file, tensor(shape=f"{side}{side}K\x02\x87", strides="K\x00K\x00K\x00\x87"),
           **{"data/0": numbers.tobytes()})  # fmt: skip
    with pytest.raises(InputError, match="made of 4 numbers"):
        read_weights(file)
    # Nor do many, which would be copied where they are put together.
    one = tensor(shape=f"{side}{side}\x86", strides="K\x00K\x00\x86")[3:-2]
    both = b"\x80\x02}(" + one + one.replace(b"w", b"v", 1) + b"u."
    as_zip(file, both, **{"data/0": numbers.tobytes()})
    with pytest.raises(InputError, match="made of 4 numbers"):
        read_weights(file)


def test_encrypted_archives_are_told_in_one_line(tmp_path):
    file = tmp_path / "weights.pth"
    as_zip(file, tensor(), **{"data/0": bytes(16)})
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of the first file
    file.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        read_weights(file)


def test_compressed_archives_are_refused(tmp_path):
    file = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor())
        archive.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(InputError, match="compressed"):
        read_weights(file)


@pytest.mark.parametrize("name", WRITTEN)
def test_damage_is_told_in_one_line(name, tmp_path):
    """Cut short anywhere, or with bytes changed: an InputError, or arrays; nothing else."""
    data = (HERE / name).read_bytes()
    file = tmp_path / "damaged.pth"
    rng = np.random.default_rng(0)
    errors = 0
    for trial in range(400):
        damaged = bytearray(data)
        if trial % 2:
            del damaged[rng.integers(len(data)) :]
        else:
            for at in rng.integers(len(data), size=3):
                damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            read_weights(file)
        except InputError as error:
            errors += 1
            assert "damaged.pth" in str(error)
    assert errors > 200


def test_files_without_weights_say_what_is_there(tmp_path):
    file = tmp_path / "weights.pth"
    for data, message in (
        (pickle.dumps({"epoch": 3, "lr": 0.1}, 2), r"weights\.pth .* epoch, lr"),
        (pickle.dumps([1, 2], 2), r"weights\.pth .* list"),
    ):
        as_zip(file, data)
        with pytest.raises(InputError, match=message):
            read_weights(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(InputError, match=r"0 files data\.pkl"):
        read_weights(file)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    file.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="not a whole file"):
        read_weights(file)


def test_tensors_beside_the_weights_are_not_taken_for_them():
    """What training scripts save: {"state_dict": weights, "best_accuracy": tensor}."""
    weights = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}
    for name in ("state_dict", "model"):
        saved = {"best_accuracy": np.array(0.9), "epoch": 3, name: weights}
        assert set(state_dict(saved, Path("a.pth"))) == {"fc.weight", "fc.bias"}
    assert set(state_dict(weights, Path("a.pth"))) == {"fc.weight", "fc.bias"}
