"""What the README tells a newcomer to type."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from cvjax.build import build
from cvjax.data.sources.digits import digits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    """Each indented command, its continued lines joined, without comments."""
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^    (python main\.py .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[2:] for line in lines]


@pytest.fixture
def own_images(tmp_path, monkeypatch):
    """`my/train` and `my/test`, with a folder for each of three digits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for split in ("train", "test"):
        source = digits(split)
        for i in range(300):
            record = source[i]
            if record["label"] < 3:
                folder = tmp_path / "my" / split / str(record["label"])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.squeeze(record["image"], -1)).save(folder / f"{i}.png")


def test_the_command_for_own_images(own_images, tmp_path, capfd):
    (command,) = (c for c in commands() if any("Folder" in flag for flag in c))
    tiny = [flag.replace(".py", ".py:tiny") if "--config=" in flag else flag for flag in command]
    assert main.main([*tiny, "--workdir=run"]) == 0, capfd.readouterr().err
    assert "my/train" in (tmp_path / "run/config.json").read_text()
    assert list((tmp_path / "run/pictures").glob("worst_*.png"))


def test_the_flags_of_every_command_are_known(monkeypatch):
    assert len(commands()) > 4
    for command in commands():
        flags, changes = main.parse(command)
        if flags.config and not any("sources" in str(value) for _, value in changes):
            main.configs.override(main.configs.read(str(ROOT / flags.config)), changes)


def test_the_flag_for_mixing():
    (flag,) = re.findall(r"`--(config\.task\.mix\.type=[^`]*)`", README)
    path, _, name = flag.removeprefix("config.").partition("=")
    config = main.configs.override(
        main.configs.read(str(ROOT / "configs/classification.py")), [(path, name)]
    )
    assert callable(build(main.configs.buildable(config)["task"]).mix)


def test_the_cell_for_a_notebook():
    cells = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (cell,) = (cell for cell in cells if "result.history" in cell)
    namespace = {}
    exec(cell.replace("steps=300", "steps=2"), namespace)
    assert "eval/accuracy" in namespace["result"].history[-1]


@pytest.mark.parametrize("script", sorted(ROOT.glob("experiments/*/run.py")), ids=str)
def test_an_experiment_reads_its_flags(script):
    """One that did not would run for minutes when asked for --help."""
    assert re.search(r"\.parse(_known)?_args\(", script.read_text())


def test_every_experiment_is_in_the_list():
    for folder in ROOT.glob("experiments/*/"):
        assert f"\n[{folder.name}](experiments/{folder.name}/README.md)" in README, folder
