import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np
import optax
import pytest

from cvjax.data.loader import Loader
from cvjax.errors import InputError
from cvjax.train import loop
from cvjax.train.evaluation import evaluate
from cvjax.train.guards import DirectoryLock, NonFiniteError
from cvjax.train.loop import fit
from cvjax.train.noop import NoOp
from cvjax.train.optimizer import Optimizer
from cvjax.train.restore import load_params, load_state
from cvjax.train.task import example_keys, first_row
from cvjax.train.writers import read_json_lines
from tests.train.toys import Adversarial, Linear, Network, Regression


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_fit_as_in_a_notebook():
    result = fit(
        Regression(), Linear(), steps=40, batch_size=16, optimizer=optax.adam(3e-2),
        eval_data=Linear(20), log_every=10,
    )  # fmt: skip
    losses = [row["train/loss"] for row in result.history if "train/loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.5 * losses[0]
    assert result.history[-1]["step"] == 40 and result.history[-1]["eval/loss"] < losses[0]
    assert int(result.state.step) == 40 and result.received is None


def test_evaluation_is_exact_with_a_short_last_batch():
    """21 examples in batches of 8: the mean over examples, not over batches."""
    task = Regression()
    state = fit(task, Linear(), steps=1, batch_size=8, optimizer=optax.sgd(0.0)).state
    found, _ = evaluate(task, state, Linear(21), batch_size=8)
    examples = [Linear(21)[i] for i in range(21)]
    x, y = (np.stack([example[name] for example in examples]) for name in "xy")
    outputs = task.model.apply({"params": state.params["model"]}, x)
    np.testing.assert_allclose(found["loss"], np.mean(np.sum((outputs - y) ** 2, -1)), rtol=1e-5)


def test_averages_of_parameters_are_there_and_are_evaluated():
    task = Regression()
    state = fit(task, Linear(), steps=5, batch_size=8, optimizer=optax.sgd(0.1), ema=0.9).state
    assert set(state.ema) == {"model"}
    of_average, of_average_alone, of_last = (
        evaluate(task, state, Linear(21), batch_size=8)[0]["loss"]
        for state in (state, state.replace(params=state.ema, ema={}), state.replace(ema={}))
    )
    assert of_average == of_average_alone != of_last


class Count:
    """Counts what is valid; a fresh copy at each evaluation."""

    def __init__(self):
        self.seen = 0

    def add(self, outputs, batch):
        self.seen += int(batch["valid"].sum())

    def result(self):
        return {"seen": float(self.seen)}

    def pictures(self):
        return {"share": np.full((2, 2, 1), self.seen / 21)}


def negated(example, rng):
    return {**example, "x": -example["x"]}


def test_held_out_examples_have_transforms_of_their_own():
    task, options = Regression(), dict(batch_size=8)
    state = fit(task, Linear(), steps=1, optimizer=optax.sgd(0.0), **options).state
    plain, changed, training = (
        evaluate(task, state, Linear(21), loader=loader, **options)[0]["loss"]
        for loader in ({}, {"eval_transforms": (negated,)}, {"transforms": (negated,)})
    )
    assert plain == training != changed


def test_evaluators_start_afresh():
    result = fit(
        Regression(), Linear(), steps=4, batch_size=8, optimizer=optax.sgd(0.1), evaluate_every=2,
        eval_data=Linear(21), evaluators={"count": Count()},
    )  # fmt: skip
    seen = [row["eval/count/seen"] for row in result.history if "eval/count/seen" in row]
    assert seen == [21.0, 21.0]


class Checks(Regression):
    def check(self, batch):
        if not np.isfinite(batch["x"]).all():
            raise InputError("x is not finite")


class Broken(Linear):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "x": np.full(3, np.nan, np.float32)}


def test_held_out_data_that_the_task_cannot_take_is_refused_before_the_first_step(tmp_path):
    options = dict(steps=4, batch_size=8, optimizer=optax.sgd(0.1), workdir=tmp_path / "run")
    with pytest.raises(InputError, match="x is not finite"):
        fit(Checks(), Linear(), eval_data=Broken(9), **options)
    assert not (tmp_path / "run").exists()


class Wider(Linear):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "x": np.zeros(5, np.float32)}


def test_held_out_data_of_another_width_is_one_line(tmp_path):
    options = dict(steps=4, batch_size=8, optimizer=optax.sgd(0.1), workdir=tmp_path / "run")
    with pytest.raises(InputError, match=r"evaluators.x is 3; it must have add and result"):
        fit(Regression(), Linear(), evaluators={"x": 3}, **options)
    with pytest.raises(InputError, match=r"the source set has no __getitem__"):
        fit(Regression(), {1, 2}, **options)
    with pytest.raises(InputError, match=r"training and held-out examples: x \[3\] and \[5\]$"):
        fit(Regression(), Linear(), eval_data=Wider(9), **options)
    assert not (tmp_path / "run").exists()


class Refuses(Regression):
    """Has a mistake that only the traced `method` tells."""

    method: ClassVar[str] = ""

    def loss(self, *arguments):
        return super().loss(*arguments) if self.method != "loss" else self.refuse()

    def predict(self, *arguments):
        return super().predict(*arguments) if self.method != "predict" else self.refuse()

    def visualize(self, *arguments):
        return super().visualize(*arguments) if self.method != "visualize" else self.refuse()

    def refuse(self):
        raise InputError(f"{self.method} refuses")


@pytest.mark.parametrize("method", ["loss", "predict", "visualize"])
def test_what_is_refused_when_it_is_traced_is_told_before_there_is_a_directory(
    tmp_path, monkeypatch, method
):
    monkeypatch.setattr(Refuses, "method", method)
    with pytest.raises(InputError, match=f"{method} refuses"):
        fit(
            Refuses(), Linear(), steps=1, batch_size=8, optimizer=optax.sgd(0.1),
            eval_data=Linear(9), evaluators={"count": Count()}, workdir=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


class Draws(Regression):
    """Predicts noise: a number for each example, by its place."""

    def predict(self, params, model_state, batch, rng):
        keys = example_keys(rng, len(batch["valid"]), first_row(batch))
        each = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        return {"each": each, "index": batch["index"]}


class Keeps(Count):
    seen: ClassVar[dict] = {}

    def add(self, outputs, batch):
        for name, value in outputs.items():
            Keeps.seen.setdefault(name, []).extend(value[batch["valid"]].tolist())

    def result(self):
        return {}

    def pictures(self):
        return {}


def test_what_is_drawn_for_an_example_does_not_depend_on_the_batch_size():
    state, found = fit(Draws(), Linear(), steps=1, batch_size=8, optimizer=optax.sgd(0.1)).state, []
    for size in (8, 16):
        Keeps.seen.clear()
        evaluate(Draws(), state, Linear(21), batch_size=size, evaluators={"keeps": Keeps()})
        found.append({name: list(values) for name, values in Keeps.seen.items()})
    assert found[0]["each"] == found[1]["each"] and len(set(found[0]["each"])) == 21
    assert found[0]["index"] == found[1]["index"] == list(range(21))


class NeedsMask(Count):
    def add(self, outputs, batch):
        return batch["mask"]


def test_a_field_that_an_evaluator_misses_is_named_before_training(tmp_path):
    options = dict(batch_size=8, evaluators={"iou": NeedsMask()})
    message = r"evaluators\.iou: it needs a field 'mask' .there are: .*x"
    training = dict(steps=1, optimizer=optax.sgd(0.1), workdir=tmp_path / "run")
    with pytest.raises(InputError, match=message):
        fit(Regression(), Linear(), eval_data=Linear(8), **training, **options)
    assert not (tmp_path / "run").exists()
    state = fit(Regression(), Linear(), steps=1, batch_size=8, optimizer=optax.sgd(0.1)).state
    with pytest.raises(InputError, match=message):
        evaluate(Regression(), state, Linear(8), **options)


class Fails(Count):
    def result(self):
        raise InputError("no such class")


def test_what_was_trained_is_not_lost_when_it_cannot_be_evaluated(tmp_path):
    options = dict(
        steps=4, batch_size=8, optimizer=optax.sgd(0.1), evaluate_every=2, eval_data=Linear(21),
        workdir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(InputError, match="no such class"):
        fit(Regression(), Linear(), evaluators={"fails": Fails()}, **options)
    steps = [row["step"] for row in fit(Regression(), Linear(), **options).history]
    assert steps[0] == 2 and "train/loss" in fit(Regression(), Linear(), **options).history[0]
    assert [step for step in steps if step > 2] == [4, 4]


def test_the_last_evaluation_is_made_up_for(tmp_path):
    options = dict(
        steps=2, batch_size=8, optimizer=optax.sgd(0.1), eval_data=Linear(21),
        workdir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(InputError, match="no such class"):
        fit(Regression(), Linear(), evaluators={"fails": Fails()}, **options)
    for _ in range(2):  # the second time there is nothing left to do
        result = fit(Regression(), Linear(), evaluators={"count": Count()}, **options)
        evaluated = [row for row in result.history if "eval/count/seen" in row]
        assert int(result.state.step) == 2 and [row["step"] for row in evaluated] == [2]


def test_evaluators_have_names():
    with pytest.raises(InputError, match=r"evaluators is \[1\]; it must be a dictionary"):
        fit(Regression(), Linear(), steps=1, batch_size=8, evaluators=[1])


def test_evaluators_give_numbers_and_need_held_out_data(caplog):
    class Text(Count):
        def result(self):
            return {"best": "cat"}

    options = dict(steps=1, batch_size=8, optimizer=optax.sgd(0.1), evaluators={"text": Text()})
    with pytest.raises(InputError, match=r"evaluators\.text gave 'cat' for best; .* a number"):
        fit(Regression(), Linear(), eval_data=Linear(21), **options)
    fit(Regression(), Linear(), **options)
    assert "there are evaluators, but no held-out data" in caplog.text


def test_pictures_of_evaluators_stand_beside_those_of_the_task(tmp_path):
    fit(
        Regression(), Linear(), steps=1, batch_size=8, optimizer=optax.sgd(0.1),
        eval_data=Linear(21), evaluators={"count": Count()}, workdir=tmp_path / "run",
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "run/pictures").iterdir()] == ["share_0000001.png"]


def test_a_best_that_is_not_evaluated_is_said_and_nothing_is_lost(tmp_path):
    options = dict(
        steps=4, batch_size=8, optimizer=optax.sgd(0.1), evaluate_every=2, eval_data=Linear(21),
        workdir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(InputError, match="best is 'lss', which is not evaluated .did you mean"):
        fit(Regression(), Linear(), best="lss", **options)
    assert not (tmp_path / "run").exists()
    evaluators = {"count": Count()}  # what it finds is known when it has run
    with pytest.raises(InputError, match="best is 'count/x', which was not evaluated"):
        fit(Regression(), Linear(), best="count/x", evaluators=evaluators, **options)
    assert int(fit(Regression(), Linear(), best="loss", **options).state.step) == 4
    steps = [row["step"] for row in read_json_lines(tmp_path / "run/metrics.jsonl")]
    assert steps[0] == 2 and steps[-1] == 4  # it went on where it had stopped


def test_a_full_disk_is_one_line_and_what_was_trained_is_kept(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    options = dict(
        steps=2, batch_size=8, optimizer=optax.sgd(0.1), eval_data=Linear(21),
        evaluators={"count": Count()}, workdir=tmp_path / "run",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("cvjax.draw.save_png", full)
        with pytest.raises(InputError, match="run cannot be written: .*No space left"):
            fit(Regression(), Linear(), **options)
    assert int(fit(Regression(), Linear(), **options).state.step) == 2


def test_a_disk_that_is_full_when_a_run_goes_on_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    options = dict(batch_size=8, optimizer=optax.sgd(0.1), workdir=tmp_path / "run", config={})
    fit(Regression(), Linear(), steps=1, **options)
    monkeypatch.setattr(loop, "write_json", full)
    with pytest.raises(InputError, match="run cannot be written: .*No space left"):
        fit(Regression(), Linear(), steps=2, **options)
    assert (tmp_path / "run/checkpoints/1").exists()


def test_a_run_that_comes_second_leaves_the_first_its_new_directory(tmp_path, monkeypatch):
    """Both saw none; the second finds it locked."""
    options = dict(steps=2, batch_size=8, optimizer=optax.sgd(0.1), workdir=tmp_path / "run")
    make = loop._make_directory
    locks = []

    def first_comes_another(path):
        made = make(path)
        locks.append(DirectoryLock(path))
        return made

    monkeypatch.setattr(loop, "_make_directory", first_comes_another)
    with pytest.raises(InputError, match="in use by the run"):
        fit(Regression(), Linear(), **options)
    assert (tmp_path / "run").exists()
    locks[0].release()


def test_two_optimizers_and_accumulation_count_updates():
    optimizers = {
        "generator": Optimizer(optax.adam, 1e-3, accumulate=2),
        "discriminator": Optimizer(optax.adam, 1e-3, accumulate=2),
    }
    result = fit(Adversarial(), Linear(), steps=5, batch_size=8, optimizer=optimizers)
    assert int(result.state.step) == 10
    assert result.history[-1]["step"] == 5
    assert "learning_rate/generator" in result.history[-1]


def test_the_rate_in_the_log_is_that_of_the_groups_own_updates():
    """The discriminator takes two updates a step, each group goes down over the whole run."""
    down = functools.partial(optax.linear_schedule, 1e-3, 0.0)
    one = Optimizer(optax.adam, down)
    for optimizer, name in [(one, ""), (dict(generator=one, discriminator=one), "/discriminator")]:
        result = fit(
            Adversarial(), Linear(), steps=2, batch_size=8, optimizer=optimizer, log_every=1
        )
        rates = [row[f"learning_rate{name}"] for row in result.history]
        np.testing.assert_allclose(rates, [5e-4, 0], rtol=1e-5)


def test_accumulation_by_scan_takes_the_same_updates():
    """4 micro-batches of 8: as steps of their own, and looped over within one step."""
    results = [
        fit(
            Regression(), Linear(), steps=5, batch_size=8, log_every=1,
            optimizer=Optimizer(optax.adam, 1e-2, accumulate=4, accumulate_how=how),
        )
        for how in ("multi_steps", "scan")
    ]  # fmt: skip
    assert [int(result.state.step) for result in results] == [20, 5]
    for one, two in zip(
        leaves(results[0].state.params), leaves(results[1].state.params), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    losses = [[row["train/loss"] for row in result.history] for result in results]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_pmap_gives_what_jit_gives():
    runs = [
        fit(Regression(), Linear(), steps=10, batch_size=16, optimizer=optax.adam(1e-2), ema=0.9,
            parallel=parallel).state
        for parallel in ("jit", "pmap")
    ]  # fmt: skip
    # A mean of eight means against one mean: float32 rounding through ten steps of Adam.
    for one, two in zip(leaves(runs[0].ema), leaves(runs[1].ema), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_resuming_is_the_same_as_not_stopping(tmp_path):
    def run(workdir, steps):
        return fit(
            Regression(Network(batch_norm=True), noise=0.1), Linear(), steps=steps, batch_size=16,
            optimizer=optax.adam(1e-2), ema=0.9, workdir=workdir, tensorboard=False,
        )  # fmt: skip

    whole = run(tmp_path / "whole", 12)
    run(tmp_path / "parts", 5)
    parts = run(tmp_path / "parts", 12)
    for one, two in zip(leaves(whole.state.params), leaves(parts.state.params), strict=True):
        assert one.tobytes() == two.tobytes()
    for one, two in zip(leaves(whole.state.ema), leaves(parts.state.ema), strict=True):
        assert one.tobytes() == two.tobytes()


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    options = dict(batch_size=16, optimizer=optax.sgd(0.0), ema=0.9, tensorboard=False)
    first = fit(Regression(), Linear(), steps=2, seed=1, workdir=tmp_path / "first", **options)
    second = fit(
        Regression(), Linear(), steps=1, seed=2, workdir=tmp_path / "second",
        initialize=functools.partial(load_params, path=tmp_path / "first"), **options,
    )  # fmt: skip
    for one, two in zip(leaves(first.state.params), leaves(second.state.params), strict=True):
        np.testing.assert_array_equal(one, two)
    assert [x.shape for x in leaves(second.state.ema)] == [x.shape for x in leaves(first.state.ema)]


class Still(Regression):
    """Has no gradient."""

    def loss(self, params, state, batch, rng):
        value, others = super().loss(params, state, batch, rng)
        return 0 * value, others


def test_an_optimizer_that_keeps_parameters_starts_from_the_given_ones(tmp_path):
    """schedule_free begins with a copy: of the random ones it would go back to these."""
    optimizer = optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1)

    def initialize(params, model_state):
        return jax.tree.map(np.ones_like, params), model_state, "all ones"

    result = fit(
        Still(), Linear(), steps=1, batch_size=8, optimizer=optimizer, initialize=initialize
    )
    assert all((leaf == 1).all() for leaf in leaves(result.state.params))


def test_of_a_run_that_cannot_begin_no_new_directory_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    options = dict(steps=1, batch_size=8, optimizer=optax.sgd(0.1))
    initialize = functools.partial(load_params, path=tmp_path / "nowhere")
    for workdir in ("new/above/run", "mine/run"):
        with pytest.raises(InputError, match="nowhere"):
            fit(
                Regression(), Linear(), initialize=initialize, workdir=tmp_path / workdir, **options
            )
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


class BrokenLate(Broken):
    """The first batch of eight is as it should be."""

    def __getitem__(self, index):
        return super().__getitem__(index) if index == 17 else Linear.__getitem__(self, index)


def test_each_batch_may_be_refused_and_what_was_trained_is_kept(tmp_path):
    options = dict(batch_size=8, optimizer=optax.sgd(0.1), workdir=tmp_path / "run")
    with pytest.raises(InputError, match="x is not finite"):
        fit(Checks(), BrokenLate(200), steps=100, **options)
    state = load_state(Regression(), Linear(), tmp_path / "run", batch_size=8)
    broken = Linear()[17]["x"]
    batches = enumerate(Loader(Linear(200), 8, seed=0).iterate())
    assert int(state.step) == next(i for i, batch in batches if (batch["x"] == broken).any()) > 0
    with pytest.raises(InputError, match="x is not finite"):
        evaluate(Checks(), state, BrokenLate(24), batch_size=8)


class Worn(Linear):
    """A source that fails for good at some time."""

    reads: ClassVar[list] = []

    def __getitem__(self, index):
        Worn.reads.append(index)
        if len(Worn.reads) > 60:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_what_was_trained_is_kept_when_the_data_fails(tmp_path):
    options = dict(batch_size=8, optimizer=optax.sgd(0.1), workdir=tmp_path / "run")
    with pytest.raises(InputError, match="the disk is gone"):
        fit(Regression(), Worn(), steps=100, loader=dict(retries=0), **options)
    assert int(load_state(Regression(), Linear(), tmp_path / "run", batch_size=8).step) > 2


def test_loading_another_model_is_one_line(tmp_path):
    options = dict(steps=1, optimizer=optax.adam(0.1), tensorboard=False)
    last = fit(Regression(), Linear(), batch_size=16, workdir=tmp_path, **options).state
    with pytest.raises(InputError, match="Dense_0/bias is float32.8. there, float32.9. here"):
        load_state(Regression(Network(width=9)), Linear(), tmp_path, batch_size=16)
    with pytest.raises(InputError, match="no checkpoint"):
        load_state(Regression(), Linear(), tmp_path / "nowhere", batch_size=16)
    state = load_state(Regression(), Linear(40), tmp_path, batch_size=8)
    assert state.opt_state == {} and int(state.step) == 1
    for one, two in zip(leaves(last.params), leaves(state.params), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_step_of_ones_own():
    def step(state, batch):
        return state.replace(step=state.step + 2), {}

    result = fit(Regression(), Linear(), steps=3, batch_size=8, optimizer=optax.sgd(1.0), step=step)
    assert int(result.state.step) == 6


def test_too_many_steps_that_are_not_finite_stop_the_run():
    with pytest.raises(NonFiniteError, match="model/gradient, model/loss not finite at step 4"):
        fit(
            Regression(Network(batch_norm=True), noise=1e30), Linear(), steps=20, batch_size=8,
            optimizer=optax.sgd(0.1), max_nonfinite=3,
        )  # fmt: skip


def test_the_noop_task_runs_the_data_alone(tmp_path, capfd):
    result = fit(NoOp(), Linear(), steps=10, batch_size=8, workdir=tmp_path / "run", ema=0.9)
    assert not (tmp_path / "run").exists()
    assert {"examples_per_second", "waited_for_data"} <= set(result.history[-1])
    assert "examples/s" in capfd.readouterr().err


def test_what_cannot_be_saved_fails_before_the_first_step(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Broken(Regression):
        def init(self, rng, batch):
            params, _ = super().init(rng, batch)
            return params, {"nothing": {"at_all": jax.numpy.zeros((0,))}}

        def loss(self, params, state, batch, rng):
            value, (_, metrics) = super().loss(params, state, batch, rng)
            return value, (state.model_state, metrics)

    with pytest.raises(InputError, match="nothing"):
        fit(Broken(), Linear(), steps=1, batch_size=8, optimizer=optax.sgd(0.1),
            workdir=tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()
