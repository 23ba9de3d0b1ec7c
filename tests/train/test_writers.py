import json
import struct
import sys
import types

import numpy as np
import optax
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from cvjax.errors import InputError
from cvjax.train.loop import fit
from cvjax.train.writers import JsonLines, Several, TensorBoard, WeightsAndBiases, read_json_lines
from tests.train.toys import Linear, Regression


def test_lines_after_the_resumed_step_are_written_anew(tmp_path):
    writer = JsonLines(tmp_path)
    for step in (1, 2, 3):
        writer.write_scalars(step=step, scalars={"train/loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # what a crash leaves
    writer = JsonLines(tmp_path, 2)
    writer.write_scalars(step=3, scalars={"train/loss": np.float32(9)})
    writer.close()
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert (tmp_path / "curves.png").exists()


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path):
    damaged = b'\xff\xfe\n{"step": 1, "a": "x"}\n{"step": true}\n{"step": 1, "a": [1]}\n'
    (tmp_path / "metrics.jsonl").write_bytes(damaged + b'{"step": 2, "a": 1}\n')
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 2, "a": 1}]


def test_curves_are_drawn_anew_for_new_lines_alone(tmp_path):
    writer, curves = JsonLines(tmp_path), tmp_path / "curves.png"
    for step in (1, 2):
        writer.write_scalars(step=step, scalars={"train/loss": 1.0})
        writer.flush()
        assert curves.exists()
        curves.unlink()
    writer.close()
    assert not curves.exists()


def test_what_is_not_finite_stays_readable(tmp_path):
    writer = JsonLines(tmp_path)
    writer.write_scalars(step=1, scalars={"train/loss": float("nan")})
    writer.close()
    assert np.isnan(read_json_lines(tmp_path / "metrics.jsonl")[0]["train/loss"])


def test_pictures_are_files_named_by_step(tmp_path):
    picture = np.linspace(0, 1, 4 * 6 * 3).reshape(4, 6, 3)
    JsonLines(tmp_path).write_images(step=7, images={"eval/samples": picture})
    with Image.open(tmp_path / "pictures" / "eval_samples_0000007.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.round(picture * 255))


def events(folder):
    """The events of all files, by the framing of TFRecord: length, checksum, bytes, checksum."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard(tmp_path):
    writer = TensorBoard(tmp_path, 4)
    writer.write_scalars(step=5, scalars={"train/loss": 0.25})
    writer.write_images(step=5, images={"samples": np.zeros((2, 3, 1))})
    writer.write_hparams(hparams={"seed": 3})
    writer.close()
    found = list(events(tmp_path / "tensorboard"))
    values = {value.tag: (event.step, value) for event in found for value in event.summary.value}
    assert values["train/loss"][0] == 5 and values["train/loss"][1].simple_value == 0.25
    assert (values["samples"][1].image.height, values["samples"][1].image.width) == (2, 3)
    config = next(value for tag, (_, value) in values.items() if tag.startswith("config"))
    assert '"seed": 3' in config.tensor.string_val[0].decode()
    # SessionLog.START tells TensorBoard to forget what it saw of later steps.
    assert [event.step for event in found if event.session_log.status == 1] == [5]


@pytest.fixture
def wandb(monkeypatch):
    """A module with the four names that the writer uses, which writes down its calls."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish",)),
        config=types.SimpleNamespace(update=lambda c, **o: calls.append(("config", c))),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options)) or run
    module.Image = lambda pixels: pixels
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_weights_and_biases(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    writer = WeightsAndBiases(tmp_path / "run")
    writer.write_hparams(hparams={"seed": 3})
    writer.write_scalars(step=5, scalars={"train/loss": 0.25})
    writer.write_images(step=5, images={"samples": np.full((2, 2, 1), 0.5)})
    writer.flush()
    writer.close()
    kinds, (_, options) = [call[0] for call in wandb], wandb[0]
    assert kinds == ["init", "config", "log", "log", "finish"]
    assert (options["name"], options["resume"]) == ("run", "allow")
    assert wandb[2][1] == {"train/loss": 0.25, "step": 5}
    assert wandb[3][1]["samples"].dtype == np.uint8 and wandb[3][1]["step"] == 5


def test_a_work_directory_is_one_run_of_weights_and_biases_whatever_its_name(tmp_path, wandb):
    for folder in ("a/seed0", "b/seed0", "a/seed0"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        WeightsAndBiases(tmp_path / folder)
    one, other, again = (options["id"] for _, options in wandb)
    assert one == again != other


def test_fit_writes_to_weights_and_biases(tmp_path, wandb):
    fit(
        Regression(), Linear(), steps=2, batch_size=8, optimizer=optax.sgd(0.1), log_every=1,
        workdir=tmp_path / "run", wandb=True, tensorboard=False, config={"seed": 3},
    )  # fmt: skip
    assert ("config", {"seed": 3}) in wandb and wandb[-1] == ("finish",)
    assert [call[1]["step"] for call in wandb if call[0] == "log"] == [1, 2]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_weights_and_biases_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        fit(
            Regression(), Linear(), steps=1, batch_size=8, optimizer=optax.sgd(0.1), wandb=True,
            workdir=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_several_writers_get_everything(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    both = Several([JsonLines(tmp_path / "one"), JsonLines(tmp_path / "two")])
    both.write_scalars(step=1, scalars={"a/loss": 1.0})
    both.write_images(step=1, images={"x": np.zeros((2, 2, 3))})
    both.write_hparams(hparams={})
    both.flush()
    both.close()
    for folder in ("one", "two"):
        assert json.loads((tmp_path / folder / "metrics.jsonl").read_text())["a/loss"] == 1
        assert (tmp_path / folder / "pictures" / "x_0000001.png").exists()


def test_all_writers_are_closed_though_one_cannot_write(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    first, second = JsonLines(tmp_path), TensorBoard(tmp_path)
    both = Several([first, second], tmp_path)
    both.write_scalars(step=1, scalars={"train/loss": 1.0})
    closed = []
    monkeypatch.setattr("cvjax.draw.curves", full)
    monkeypatch.setattr(second, "close", lambda: closed.append(True))
    with pytest.raises(InputError, match="cannot be written: .*No space left on device"):
        both.close()
    assert closed and first._file.closed


def test_curves_show_every_metric_of_a_task_and_the_first_of_an_evaluator(tmp_path, monkeypatch):
    writer, drawn = JsonLines(tmp_path), {}
    monkeypatch.setattr("cvjax.draw.curves", lambda path, curves: drawn.update(curves))
    writer.write_scalars(1, {"train/elbo": -9.0, "train/nonfinite/model/loss": 1.0, "speed": 3.0})
    writer.write_scalars(1, {"train/mask/loss": 4.0, "train/mask/dice": 5.0})  # a head of several
    writer.write_scalars(2, {"eval/kl": 1.0, "eval/coco/box_AP": 0.1, "eval/coco/box_AP50": 0.2})
    writer.write_scalars(2, {"eval/mask/loss": 6.0, "eval/mask/dice": 7.0})
    writer.close()
    assert drawn == {"train/elbo": ([1], [-9.0]), "eval/kl": ([2], [1.0]),
                     "eval/coco/box_AP": ([2], [0.1]), "train/mask/loss": ([1], [4.0]),
                     "train/mask/dice": ([1], [5.0]), "eval/mask/loss": ([2], [6.0]),
                     "eval/mask/dice": ([2], [7.0])}  # fmt: skip


def test_what_is_not_finite_is_null_in_json(tmp_path):
    writer = JsonLines(tmp_path)
    writer.write_scalars(1, {"eval/nll": np.nan, "eval/psnr": np.inf, "eval/loss": 2.0})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=None) and "NaN" not in text and "Inf" not in text
    (row,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert np.isnan(row["eval/nll"]) and row["eval/loss"] == 2.0
