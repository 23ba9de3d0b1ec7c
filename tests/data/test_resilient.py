import itertools
import json

import numpy as np
import pytest
from PIL import Image

from cvjax.data.loader import Loader
from cvjax.data.sources.folder import Folder
from cvjax.errors import InputError
from tests.data.stores import Failing, Flaky, Numbered

EXAMPLES, BATCH, BATCHES = 200, 20, 15  # one epoch and a half


def write_images(root):
    rng = np.random.default_rng(0)
    for i in range(EXAMPLES):
        path = root / "ab"[i % 2] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"processes": 2}])
def test_a_flaky_store_gives_the_clean_stream_where_it_is_good(tmp_path, options):
    for name in ("clean", "broken"):
        write_images(tmp_path / name)
    clean, broken = Folder(tmp_path / "clean"), Folder(tmp_path / "broken")
    for index, keep in ((3, 0.9), (90, 0.3), (91, 0.0)):  # Two are cut off, one is empty.
        path = tmp_path / "broken" / broken.example_id(index)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    wrong = {130: None, 131: np.array([object()])}
    bad = {3, 90, 91, 130, 131}

    file = tmp_path / "bad_examples.jsonl"
    expected = list(itertools.islice(Loader(Numbered(clean), BATCH).iterate(), BATCHES))
    flaky = Loader(Flaky(broken, wrong), BATCH, backoff=0.001, bad_examples=file, **options)
    found = list(itertools.islice(flaky.iterate(), BATCHES))

    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        valid = batch["valid"]
        np.testing.assert_array_equal(valid, ~np.isin(other["index"], list(bad)))
        for name in batch:
            np.testing.assert_array_equal(batch[name][valid], other[name][valid])
        assert not np.isin(batch["index"][~valid], list(bad)).any()

    stream = np.concatenate([batch["index"] for batch in expected])
    replaced = np.concatenate([batch["index"] for batch in found])
    positions = np.flatnonzero(np.isin(stream, list(bad)))
    assert len(positions) >= len(bad)  # Each once in the first epoch.
    noted = lines(file)
    assert [one["position"] for one in noted] == positions.tolist()
    assert [one["index"] for one in noted] == stream[positions].tolist()
    assert [one["replaced_by"] for one in noted] == replaced[positions].tolist()
    assert all(one["id"] == broken.example_id(one["index"]) for one in noted)
    assert all("cannot decode" in one["error"] for one in noted if one["index"] < 100)


def test_after_a_resume_no_line_is_written_twice_and_none_is_lost(tmp_path):
    source = Failing(40, {5: ValueError("damaged"), 25: ValueError("damaged")})
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    uninterrupted = list(Loader(source, 4, epochs=2, bad_examples=whole).iterate())
    list(itertools.islice(Loader(source, 4, epochs=2, bad_examples=resumed).iterate(), 13))
    resumed.write_text(resumed.read_text() + '{"position": 1')  # Killed while it wrote.
    again = list(Loader(source, 4, epochs=2, bad_examples=resumed).iterate(start=7))
    assert len(lines(whole)) == 4
    assert lines(resumed) == lines(whole)
    for batch, other in zip(again, uninterrupted[7:], strict=True):
        np.testing.assert_array_equal(batch["label"], other["label"])
        np.testing.assert_array_equal(batch["valid"], other["valid"])


def test_each_process_has_its_own_file_and_together_they_have_every_line(tmp_path):
    source = Failing(20, {3: ValueError("damaged"), 11: ValueError("damaged")})
    options = dict(epochs=1, shuffle=False, process_count=2, bad_examples=tmp_path / "bad.jsonl")
    for index in range(2):
        list(Loader(source, 4, process_index=index, **options).iterate())
    found = lines(tmp_path / "bad-1.jsonl")
    assert [one["index"] for one in found] == [3, 11]
    assert not (tmp_path / "bad.jsonl").exists()


def test_padding_is_neither_counted_nor_noted(tmp_path):
    source = Failing(5, {4: ValueError("damaged")})
    file = tmp_path / "bad.jsonl"
    loader = Loader(source, 4, epochs=1, shuffle=False, last="pad", bad_examples=file)
    assert [batch["valid"].tolist() for batch in loader.iterate()] == [[True] * 4, [False] * 4]
    assert [one["position"] for one in lines(file)] == [4]


def test_errors_of_the_store_are_retried_and_damage_is_not():
    source = Failing(30, {0: OSError("busy"), 1: ValueError("damaged"), 2: None})
    next(Loader(source, 3, shuffle=False, retries=2, backoff=0, prefetch=0).iterate())
    assert source.reads[0] >= 3
    assert source.reads[1] < 3 and source.reads[2] < 3


def test_waits_are_doubled_and_bounded(monkeypatch):
    waits = []
    monkeypatch.setattr("cvjax.data.resilient.time.sleep", waits.append)
    source = Failing(9, {0: TimeoutError("hung up")})
    next(Loader(source, 1, shuffle=False, backoff=0.5, prefetch=0).iterate())
    assert waits[:3] == [0.5, 1.0, 2.0]
    assert len(waits) % 3 == 0  # The same for a replacement, should it fail.


def test_one_bad_example_at_the_start_does_not_stop_a_run():
    source = Failing(100, {0: ValueError("damaged")})
    batch = next(Loader(source, 2, shuffle=False, bad_budget=0.001).iterate())
    assert batch["valid"].tolist() == [False, True]


def test_more_bad_examples_than_the_budget_stop_the_run(tmp_path):
    source = Failing(100, {i: ValueError("damaged") for i in range(0, 100, 5)})
    loader = Loader(source, 10, shuffle=False, bad_examples=tmp_path / "bad.jsonl")
    batches = loader.iterate()
    next(batches), next(batches)
    message = (
        r"6 of the 30 examples read are bad, more than bad_budget=0.05 allows; the first: "
        r"item-0: ValueError: damaged; item-5: .*bad.jsonl"
    )
    with pytest.raises(InputError, match=message) as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert len(lines(tmp_path / "bad.jsonl")) == 6


def test_a_generous_budget_bears_with_the_same():
    source = Failing(100, {i: ValueError("damaged") for i in range(0, 100, 5)})
    batches = list(Loader(source, 10, epochs=3, bad_budget=0.3).iterate())
    assert sum(batch["valid"].sum() for batch in batches) == 3 * 80


def test_a_budget_of_zero_allows_none():
    source = Failing(100, {0: ValueError("damaged")})
    with pytest.raises(InputError, match="1 of the 2"):
        next(Loader(source, 2, shuffle=False, bad_budget=0).iterate())


@pytest.mark.parametrize("options", [{}, {"processes": 1}])
def test_a_dead_store_stops_at_once(options):
    source = Failing(1000, {i: OSError("no route to host") for i in range(1000)})
    message = "item-0 cannot be read .OSError: no route to host.*10 others"
    with pytest.raises(InputError, match=message):
        next(Loader(source, 64, shuffle=False, backoff=0.001, **options).iterate())


def test_a_keyboard_interrupt_is_not_an_error_of_the_data():
    with pytest.raises(KeyboardInterrupt):
        next(Loader(Failing(1, {0: KeyboardInterrupt()}), 1, prefetch=0).iterate())


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        {"image": None},
        {"image": np.zeros((4, 4), np.uint8)},
        {"image": np.zeros((0, 4, 1), np.uint8)},
        {"image": np.zeros((4, 4, 1), np.int64)},
        {"label": np.array([None])},
        {"label": [1, "two", None]},
    ],
)
def test_what_is_no_record_counts_as_bad(record):
    batch = next(Loader(Failing(50, {0: record}), 2, shuffle=False).iterate())
    assert batch["valid"].tolist() == [False, True]
