"""Every recipe runs: its tiny version, and its data path without a model."""

import importlib.util
from pathlib import Path

import jax
import pytest

import main

ROOT = Path(__file__).parents[1]
# One recipe of each domain runs on all eight devices; one device compiles a quarter faster.
SHARDED = {
    "classification", "conditional_gan", "diffusion", "fcos", "segmentation", "vae",
}  # fmt: skip


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_runs_small_and_as_data_path_alone(config, tmp_path, monkeypatch, capfd):
    if config.stem == "trees" and importlib.util.find_spec("deepforest") is None:
        assert main.main([f"--config={config}:tiny"]) == 2
        assert "pip install --no-deps deepforest" in capfd.readouterr().err
        pytest.skip("without deepforest there are no trees: that is said, as it should be")
    if config.stem not in SHARDED:
        one = jax.devices()[:1]
        monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.chdir(tmp_path)
    stages = [f"stages.{name}." for name in main.configs.read(str(config)).get("stages", {})]
    alone = [f"--config.{stage}task.type=train.noop.NoOp" for stage in stages or [""]]
    assert main.main([f"--config={config}:tiny", *alone]) == 0
    assert capfd.readouterr().err.count("waited for data") == len(alone)
    assert not list(tmp_path.iterdir())
    assert main.main([f"--config={config}:tiny", "--workdir=run"]) == 0
    assert list((tmp_path / "run").rglob("pictures/*.png"))
