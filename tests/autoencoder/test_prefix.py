"""An encoder that was trained here is the beginning of a classifier."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from cvjax.autoencoder.model import Decoder, Encoder
from cvjax.autoencoder.task import Autoencoder
from cvjax.classification.task import Classification
from cvjax.data.sources.digits import ScikitDigits
from cvjax.train.loop import fit
from cvjax.train.restore import load_params


def test_a_classifier_begins_with_the_encoder_of_an_autoencoder(tmp_path):
    data = ScikitDigits("train")
    task = Autoencoder(Encoder(3, (4,), 8), Decoder((8, 8, 1), (4,), 8))
    trained = fit(
        task, data, steps=1, batch_size=8, optimizer=optax.adam(1e-2), workdir=tmp_path / "run",
        tensorboard=False,
    ).state.params["model"]["encoder"]  # fmt: skip
    tables = []

    def initialize(params, model_state):
        found = load_params(
            params, model_state, path=tmp_path / "run", take={"model/encoder": "model"}
        )
        tables.append({row.path: row.status for row in found[2].rows})
        return found

    classifier = Classification(Encoder(10, (4,), 8))
    run = partial(fit, classifier, data, steps=1, batch_size=8, optimizer=optax.set_to_zero())
    found, fresh = run(initialize=initialize).state, run().state
    for layer in ("Conv_0", "Dense_0"):
        jax.tree.map(np.testing.assert_array_equal, found.params["model"][layer], trained[layer])
        assert not np.array_equal(fresh.params["model"][layer]["kernel"], trained[layer]["kernel"])
    # The last layer has other outputs: it is as it would be from scratch, and the table says so.
    jax.tree.map(
        np.testing.assert_array_equal,
        found.params["model"]["Dense_1"],
        fresh.params["model"]["Dense_1"],
    )
    assert tables[0]["model/Conv_0/kernel"] == "loaded"
    assert tables[0]["model/Dense_1/kernel"] == "shape differs"


def test_one_percent_of_the_labels_goes_further_after_it():
    """Of 4,000 digits 40 have labels; with the first two seeds the gain is .053 and .040."""
    script = Path(__file__).parents[2] / "experiments/few_labels/run.py"
    flags = "--seeds 0 --rates 3e-3 --pretraining-steps 200 --steps 40".split()
    # Programs optimized, and one device, unlike those of other tests: this one computes.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(script), *flags], env=plain, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    found = {name: float(mean) for name, _, _, mean in rows}
    assert found["from scratch"] > 0.65
    assert found["from the autoencoder"] > found["from scratch"] + 0.01  # rounding moves both
