"""Arrays out of pickles: those that NumPy writes, and nothing that a pickle might want to do."""

import os
import pickle

import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.pickles import read_arrays


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_numpy_wrote_is_read(tmp_path, protocol):
    rng = np.random.default_rng(0)
    tree = {
        "a": {
            "c": rng.normal(size=(2, 3)),
            "f": np.asfortranarray(rng.normal(size=(3, 2)).astype("f4")),
        },
        "b": rng.integers(0, 9, 4).astype(">i4"),
        "scalar": np.array(True),
        "empty": np.zeros((0, 3), np.float16),
    }
    path = tmp_path / "weights.ckpt"
    # Protocol 5 makes contiguous arrays by another function, which is refused.
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    if protocol == 5:
        with pytest.raises(InputError, match="_frombuffer"):
            read_arrays(path)
        return
    found = read_arrays(path)
    assert found.keys() == tree.keys()
    for one, two in [(found["a"][k], tree["a"][k]) for k in "cf"] + [
        (found[k], tree[k]) for k in ("b", "scalar", "empty")
    ]:
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype and one.shape == two.shape


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_is_executed(tmp_path):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    for evil in (
        Evil(os.mkdir, str(trace)),
        Evil(getattr, "text", "upper"),
        Evil(np.dtype, "O"),
        np.array([Evil(os.mkdir, str(trace))], object),
    ):
        path.write_bytes(pickle.dumps({"a": evil}, protocol=3))
        with pytest.raises(InputError, match=r"evil.ckpt is not a pickle of arrays alone"):
            read_arrays(path)
    assert not trace.exists()


def test_what_is_damaged_or_holds_something_else_is_said(tmp_path):
    path = tmp_path / "w.ckpt"
    whole = pickle.dumps({"a": np.arange(6.0)}, protocol=3)
    for data in (
        b"", b"text", whole[:-20], pickle.dumps({"a": 1}), pickle.dumps([np.ones(2)], 3),
        pickle.dumps({1: np.ones(2)}, 3), pickle.dumps(np.float32(1), 3),
        whole.replace(b"K\x06\x85", b"K\x07\x85"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"w.ckpt is not a pickle of arrays alone"):
            read_arrays(path)
