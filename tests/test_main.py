"""The program as a person uses it: bad input, resuming, signals, kills, and what is left behind."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

import main
from cvjax import config as configs
from cvjax.data.sources.arrays import Arrays
from cvjax.errors import InputError, from_callbacks
from cvjax.run import _predict, check_class_names, load_run
from cvjax.train.checkpoint_files import newest, read_arrays
from cvjax.train.writers import read_json_lines
from tests.children import environment

ROOT = Path(__file__).parents[1]
LINEAR = str(ROOT / "tests/recipe_linear.py")
DIFFUSION = str(ROOT / "configs/diffusion.py") + ":tiny"
CLASSIFICATION = str(ROOT / "configs/classification.py") + ":tiny"
DATA = "--config.data.train"
AFFINE = "--config.data.transforms.affine"

BAD = {
    "no config": ([], "--config is missing"),
    "no file": (["--config=configs/difusion.py"], "configs/difusion.py: there is no such file"),
    "a folder": (["--config=configs"], "there is no such file"),
    "no python": (["--config={tmp}/notes.txt"], "a config is a Python file"),
    "broken python": (["--config={tmp}/broken.py"], "SyntaxError"),
    "no function": (["--config={tmp}/empty.py"], "no function get_config"),
    "version": ([f"--config={DIFFUSION[:-4]}tny"], "'tny' is no version"),
    "misspelt": (["--config.stesp=3"], "did you mean steps?"),
    "misspelt inside": (["--config.task.guidence=3"], "did you mean guidance?"),
    "field of a value": (["--config.steps.x=3"], "no fields"),
    "object by a value": (["--config.task.network=3"], "fields of its own"),
    "text for a number": (["--config.steps=many"], "must be of type int"),
    "half a step": (["--config.steps=1.5"], "must be of type int"),
    "no boolean": (["--config.task.network.remat=maybe"], "must be true or false"),
    "no value": (["--config.steps"], "write --config.steps=..."),
    "unknown flag": (["--wrokdir=x"], "did you mean --workdir?"),
    "unknown mode": (["--mode=trian"], "did you mean train?"),
    "negative batch": (["--config.batch_size=-4"], "batch_size is -4"),
    "empty batch": (["--config.batch_size=0"], "batch_size is 0"),
    "devices": (["--config.batch_size=12"], "8 devices do not divide; 8 would do"),
    "no steps": (["--config.steps=0"], "steps is 0"),
    "log": (["--config.log_every=-1"], "log_every is -1"),
    "parallel": (["--config.parallel=pmpa"], "'jit' or 'pmap'"),
    "module": (["--config.task.type=difusion.task.Diffusion"], "did you mean diffusion.task?"),
    "name in module": (["--config.task.type=diffusion.task.Difusion"], "did you mean Diffusion?"),
    "no dot": (["--config.task.type=Diffusion"], "it must be module.Name"),
    "split": ([f"{DATA}.split=trian"], "it can be 'train' or 'test'"),
    "folder missing": (
        [f"{DATA}.type=data.sources.folder.Folder", f"{DATA}.path={{tmp}}/nowhere"],
        "nowhere does not exist"),
    "folder empty": (
        [f"{DATA}.type=data.sources.folder.Folder", f"{DATA}.path={{tmp}}/hollow"],
        "hollow has no sub-folders"),
    "field of another type": (
        [f"{DATA}.type=data.sources.folder.Folder", f"{DATA}.pth=x"], "did you mean path?"),
    "field left out": ([f"{DATA}.type=data.sources.folder.Folder"], "path is missing"),
    "accumulate": (["--config.optimizer.accumulate=0"], "accumulate is 0"),
    "clip": (["--config.optimizer.clip_norm=-1"], "clip_norm is -1"),
    "optimizer": (["--config.optimizer.transform.type=optax.adamm"], "did you mean adam?"),
    "decay rule": (["--config.optimizer.weight_decay=(('x',1.0),)"], "'x' matches no parameter"),
    "decay covers": (
        ["--config.optimizer.weight_decay=(('.*/kernel',1.0),)"], "no rule covers"),
    "guidance": (["--config.task.class_dropout=0.0"], "set class_dropout above 0"),
    "sampling": (["--config.task.sample_steps=0"], "sample_steps is 0"),
    "prediction": (
        ["--config.task.process.prediction=epsilon"],
        "prediction is 'epsilon' (did you mean eps?)"),
    "halvings": (["--config.task.network.patch=3"], "multiples of 3"),
    "ema group": (["--config.ema.netwrok=0.9"], "did you mean network?"),
    "data field": (["--config.data.threds=3"], "did you mean threads?"),
    "too few classes": (
        [f"--config={ROOT}/configs/classification.py", "--config.task.model.num_classes=7"],
        "config.task.model.num_classes is 7, but config.data.train has 10 classes"),
    "too few classes are evaluated": (
        [f"--config={ROOT}/configs/fcos.py", "--config.evaluators.coco.num_classes=7"],
        "config.evaluators.coco.num_classes is 7, but config.data.test has 10 classes"),
    "sigmas": (
        [f"--config={ROOT}/configs/keypoint_rcnn.py", "--config.evaluators.coco.sigmas=(0.05,0.1)"],
        "evaluators.coco: there are 4 keypoints but 2 sigmas"),
    "alone": (["--distributed"], "leave the flag out"),
    "setting of a transform": (
        [f"--config={CLASSIFICATION}", f"{AFFINE}.degrees=-1"], "degrees is -1.0; it must be in"),
    "field of a transform": (
        [f"--config={CLASSIFICATION}", f"{AFFINE}.degree=1"], "did you mean degrees?"),
    "no number": (["--config.steps={[1]: 2}"], "must be of type int"),
    "no steps at all": (["--config={tmp}/few.py"], "config.steps is missing"),
    "a field of nobody": (
        ["--config={tmp}/stesp.py"], "config.stesp: no such field (did you mean steps?)"),
    "nothing held out": (
        ["--workdir={tmp}/alone", "--mode=predict"], "config.data.test is missing"),
    "no run": (["--mode=evaluate", "--workdir={tmp}/hollow"], "hollow/config.json does not exist"),
    "no checkpoint": (["--mode=evaluate", "--workdir={tmp}/early"], "no checkpoint"),
    "workdir too long": ([f"--config={LINEAR}", f"--workdir={300 * 'x'}"], "too long"),
    "workdir a file": (["--workdir={tmp}/notes.txt"], "notes.txt"),
    "average of nothing": (
        [f"--config={LINEAR}", "--config.ema=1.5"], "ema of model is 1.5; it must be in"),
    "best of all": (["--config.best_mode=most"], "best_mode is 'most'; it can be 'max' or 'min'"),
    "rules that are none": (["--config.optimizer.weight_decay=0.1"], "it must be pairs (pattern"),
    "one rule for several": (["--config.optimizer.freeze=('.*',True)"], "it must be pairs (patt"),
    "no pattern": (["--config.optimizer.freeze=(('.*[',True),)"], "is no regular expression"),
    "text where the default is a number": (
        [f"--config={LINEAR}", "--config.optimizer.transform.b1=abc"],
        "config.optimizer.transform.b1 is 'abc'; it must be a number, as its default is: 0.9"),
    "no such numbers": (["--config.task.network.dtype=bfloat15"], "dtype is 'bfloat15'; it can be"),
    "falling up": (
        [f"--config={CLASSIFICATION}", "--config.optimizer.learning_rate.peak_value=-0.01"],
        "learning_rate.peak_value is -0.01; it cannot be"),
    "get_config fails": (["--config={tmp}/fails.py"], "fails.py: ZeroDivisionError"),
    "get_config leaves": (["--config={tmp}/leaves.py"], "leaves.py: SystemExit: 3"),
    "get_config takes nothing": (["--config={tmp}/bare.py"], "unexpected keyword argument 'tiny'"),
    "get_config gives nothing": (["--config={tmp}/gives.py"], "a NoneType; it must be a ConfigDic"),
    "no stages": (["--config={tmp}/stages.py"], "config.stages is {}"),
    "a stage that is none": (["--config={tmp}/three.py"], "config.stages.a is 3; it must be a con"),
    "no length": ([f"--config={LINEAR}", "--config.steps=None"], "config.steps is None"),
    "no task": ([f"--config={LINEAR}", "--config.task=None"], "config.task is None; it must be of"),
    "a task that is none": (
        [f"--config={LINEAR}", "--config.task.type=optax.adam"], "config.task is a partial, no ta"),
    "no data": ([f"--config={LINEAR}", "--config.data=None"], "config.data is missing"),
    "no examples": ([f"--config={LINEAR}", f"{DATA}=None"], "config.data.train is missing"),
    "none for a number": ([f"--config={LINEAR}", "--config.task.noise=None"], "noise is None;"),
    "none for a part": ([f"--config={LINEAR}", "--config.task.model=None"], "model is None;"),
    "best of nothing": (
        [f"--config={LINEAR}", "--config.data.test=None", "--config.best=loss"],
        "best is 'loss', but nothing is evaluated"),
    "evaluator that is none": (
        [f"--config={LINEAR}", "--config.evaluators.x.type=optax.adam"],
        "evaluators.x is functools.partial"),
    "to begin from nothing": (
        [f"--config={LINEAR}", "--config.initialize.type=train.restore.load_params",
         "--config.initialize.path=7", "--workdir={tmp}/run"], "7 has no checkpoint"),
    "later stage": (
        [f"--config={ROOT}/tests/recipe_stages.py", "--config.stages.cold.batch_size=12"],
        "stage cold: batch_size is 12, which 8 devices do not divide"),
    "module that cannot be imported": (
        ["--config.task.type=tests.fails_to_import.Task"],
        "tests.fails_to_import cannot be imported: ZeroDivisionError"),
}  # fmt: skip

DATA_ALONE = dict(task=dict(type="train.noop.NoOp"), data=dict(train=(1,)), batch_size=8)
GET = "def get_config(tiny=False):\n    "
FILES = dict(fails=f"{GET}1 / 0", leaves="raise SystemExit(3)", bare="def get_config():\n    pass",
             gives=f"{GET}pass")  # fmt: skip
FIELDS = dict(
    stages=dict(stages={}),
    three=dict(stages=dict(a=3)),
    few=DATA_ALONE,
    stesp=DATA_ALONE | {"stesp": 2},
    alone=DATA_ALONE | {"steps": 2},
)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "empty.py").write_text("")
    for file, text in FILES.items():
        (tmp_path / f"{file}.py").write_text(text)
    for file, fields in FIELDS.items():
        (tmp_path / f"{file}.py").write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config(tiny):\n    return ConfigDict({fields!r})\n"
        )
    saved = {"alone": FIELDS["alone"], "early": configs.save_json(configs.read(DIFFUSION))}
    for folder, config in saved.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "hollow").mkdir()
    arguments, message = BAD[name]
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if arguments and not any(a.startswith("--config=") for a in arguments):
        arguments.insert(0, f"--config={DIFFUSION}")
    before = sorted(tmp_path.rglob("*"))
    code = main.main(arguments)
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(error) == 1 and message in error[0], error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_class_has_the_same_number_among_held_out_examples():
    def source(*names):
        return SimpleNamespace(class_names=names)

    train = source("cat", "dog", "owl")
    for test in (train, source("cat", "dog"), source("ant", "bee"), source(), None):
        check_class_names(train, test)
    with pytest.raises(InputError, match="'owl' is class 1 of 2, but 2 of 3 in config.data.train"):
        check_class_names(train, source("cat", "owl"))


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no such file"):
        main.main(["--config=nowhere.py", "--debug"])


def test_what_a_compiled_program_refuses_is_an_input_error():
    def refuse(x):
        raise InputError(f"x is {x}; 4 would do") if x == 3 else TypeError("no InputError")

    program = jax.jit(lambda x: jax.pure_callback(refuse, x, x))
    with pytest.raises(InputError, match=r"^x is 3; 4 would do$"), from_callbacks():
        program(np.int32(3)).block_until_ready()
    with pytest.raises(JaxRuntimeError, match="TypeError"), from_callbacks():
        program(np.int32(4)).block_until_ready()


def linear(workdir, *flags, **options):
    flags = flags if any("--config=" in flag for flag in flags) else [f"--config={LINEAR}", *flags]
    command = [sys.executable, "main.py", f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def finish(process, code=0):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text
    return text


def final(workdir):
    saved = newest(workdir / "checkpoints")
    return saved.step, read_arrays(saved.path, saved.arrays)


def wait_for_step(process, workdir, step):
    """Until the log of a process that lives has come to a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lives = process.poll() is None
        rows = read_json_lines(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        assert lives, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"the log did not come to step {step} in two minutes")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(linear(workdir))
    return workdir


def assert_same_run(workdir, whole):
    (step, arrays), (whole_step, whole_arrays) = final(workdir), final(whole)
    assert step == whole_step == 60
    assert arrays.keys() == whole_arrays.keys()
    for name, array in arrays.items():
        assert np.asarray(array).tobytes() == np.asarray(whole_arrays[name]).tobytes(), name

    def losses(folder):  # those of training are means since the last line, or since the resume
        rows = read_json_lines(folder / "metrics.jsonl")
        return [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]

    assert losses(workdir) == losses(whole)


def test_what_a_run_leaves(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"metrics.jsonl", "curves.png", "config.json", "checkpoints"} <= names
    assert json.loads((uninterrupted / "config.json").read_text())["steps"] == 60
    assert "done" in finish(linear(uninterrupted)), "a finished run says so at once"


def test_five_kills_change_nothing(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for kill in range(5):
        process = linear(workdir, "--config.data.train.seconds=0.002")
        wait_for_step(process, workdir, 10 * (kill + 1))
        time.sleep(0.013 * kill)
        process.kill()
        process.communicate()
    finish(linear(workdir))
    assert_same_run(workdir, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(number, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = linear(workdir, "--config.data.train.seconds=0.005", "--config.checkpoint_every=60")
    wait_for_step(process, workdir, 10)
    process.send_signal(number)
    text = finish(process, code=128 + number)
    assert "finishing the step and saving" in text and "Traceback" not in text
    assert 10 <= final(workdir)[0] < 60
    assert "resumed at step" in finish(linear(workdir))
    assert_same_run(workdir, uninterrupted)


def test_a_second_interrupt_exits_at_once(tmp_path):
    process = linear(tmp_path / "run", "--config.data.train.seconds=0.5")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    finish(process, code=130)
    assert time.monotonic() - began < 5


def test_two_runs_in_one_workdir(tmp_path):
    workdir = tmp_path / "run"
    first = linear(workdir, "--config.data.train.seconds=0.02")
    wait_for_step(first, workdir, 5)
    text = finish(linear(workdir), code=2)
    assert f"in use by the run with pid {first.pid}" in text
    first.kill()
    first.communicate()


def test_a_run_that_diverges_stops_and_names_metric_and_step(tmp_path, capfd):
    code = main.main(
        [f"--config={LINEAR}", f"--workdir={tmp_path / 'run'}", "--config.task.noise=1e30"]
    )
    assert code == 1
    assert "model/loss" in (error := capfd.readouterr().err) and "at step 11" in error


def test_evaluate_and_predict_read_the_saved_config(tmp_path, capfd):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert main.main([f"--config={DIFFUSION}", workdir]) == 0
    capfd.readouterr()
    assert main.main(["--mode=evaluate", workdir]) == 0
    assert "loss: " in capfd.readouterr().out
    # Not the recipe, which may have changed since.
    assert main.main(["--mode=predict", "--config=changed/since.py", workdir]) == 0
    predictions = np.load(tmp_path / "run/predictions.npz")
    assert predictions["sample"].shape == (40, 28, 28, 1)
    np.testing.assert_array_equal(predictions["index"], np.arange(40))
    assert predictions["id"][3] == "3"
    run = load_run(tmp_path / "run", [("task.sample_steps", "3"), ("data.test.per_class", "2")])
    at, arrays = final(tmp_path / "run")
    assert int(run.state.step) == at and run.task.sample_steps == 3
    assert len(run.test) == 20 and run.train.split == "train"
    kernel = run.state.params["network"]["stem"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["params/network/stem/kernel"])
    alone = load_run(tmp_path / "run", [("data.train.split", "gone"), ("data.test.per_class", "2")])
    assert alone.train is None and len(alone.test) == 20  # the training data is elsewhere
    np.testing.assert_array_equal(alone.state.params["network"]["stem"]["kernel"], kernel)
    with pytest.raises(InputError, match="did you mean guidance"):
        load_run(tmp_path / "run", [("task.guidence", "3")])
    with pytest.raises(InputError, match="there is no run to load"):
        load_run(tmp_path)


def test_evaluate_and_predict_say_what_other_data_lack(tmp_path, capfd, monkeypatch):
    workdir = f"--workdir={tmp_path / 'run'}"
    recipe = DIFFUSION.replace("diffusion", "classification")
    assert main.main([f"--config={recipe}", workdir]) == 0
    images, labels = np.zeros((6, 28, 28, 1), np.uint8), np.arange(6)
    sets = {
        "fractions": (images, labels / 7, r"label is 0\."),
        "names": (images, labels.astype(str), r"label is '\d'"),
        "colours": (images.repeat(3, axis=-1), labels, r"other shapes: image \[28, 28, 3\]"),
    }
    path = tmp_path / "set.npz"
    flags = [
        f"--config.data.test.{name}={value}"
        for name, value in dict(
            type="data.sources.arrays.Npz", path=path, image_key="x", label_key="y"
        ).items()
    ]
    for name, (x, y, message) in sets.items():
        np.savez(path, x=x, y=y)
        capfd.readouterr()
        assert main.main(["--mode=evaluate", workdir, *flags]) == 2, name
        assert re.search(message, capfd.readouterr().err), name
        # Predictions need no labels.
        assert main.main(["--mode=predict", workdir, *flags]) == (2 if name == "colours" else 0)
    assert not (tmp_path / "run/evaluation.json").exists()
    # What cannot be written leaves the file of before as it was.
    before = (tmp_path / "run/predictions.npz").read_bytes()
    np.savez(path, x=images, y=labels)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    assert main.main(["--mode=predict", workdir, *flags]) == 2
    assert (tmp_path / "run/predictions.npz").read_bytes() == before
    assert not list((tmp_path / "run").glob(".predictions*"))


def test_predictions_in_half_precision_can_be_read(tmp_path):
    state = SimpleNamespace(averaged_params={}, model_state={})
    half = lambda batch: {"latent": batch["image"][:, 0, 0].astype(jnp.bfloat16)}  # noqa: E731
    task = SimpleNamespace(predict=lambda params, model_state, batch, rng: half(batch))
    data = Arrays({"image": np.full((3, 2, 2, 1), 255, np.uint8)})
    assert _predict(task, state, data, 8, None, 0, tmp_path) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "predictions.npz")["latent"], np.ones((3, 1)))


STAGES = str(ROOT / "tests/recipe_stages.py")


def test_stages_follow_one_another_and_resume_in_the_middle(tmp_path, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(linear(whole, f"--config={STAGES}"))
    for stage, step in (("warm", 8), ("cold", 12)):
        process = linear(
            killed, f"--config={STAGES}", f"--config.stages.{stage}.data.train.seconds=0.01"
        )
        wait_for_step(process, killed / stage, step)
        process.kill()
        process.communicate()
        assert (killed / "cold").exists() == (stage == "cold")
    finish(linear(killed, f"--config={STAGES}"))
    for stage, step in (("warm", 20), ("cold", 30)):
        (at, arrays), (whole_at, whole_arrays) = final(killed / stage), final(whole / stage)
        assert at == whole_at == step
        for name, array in arrays.items():
            assert np.asarray(array).tobytes() == np.asarray(whole_arrays[name]).tobytes(), name
    assert main.main(["--mode=evaluate", f"--workdir={whole}"]) == 0
    assert "loss: " in capfd.readouterr().out
    assert (whole / "cold/evaluation.json").exists()


def test_a_stage_begins_with_what_the_one_before_has_learned(tmp_path):
    still = "--config.stages.cold.optimizer.learning_rate=0.0"
    finish(linear(tmp_path / "run", f"--config={STAGES}", still))
    (_, first), (_, second) = final(tmp_path / "run/warm"), final(tmp_path / "run/cold")
    for name, array in first.items():
        if name.startswith("params/"):
            np.testing.assert_array_equal(second[name], array)


def test_a_mistake_in_the_last_stage_shows_before_the_first_begins(tmp_path, capfd):
    flags = [f"--config={STAGES}", f"--workdir={tmp_path / 'run'}"]
    assert main.main([*flags, "--config.stages.cold.optimizer.accumulate=0"]) == 2
    assert "accumulate is 0" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
