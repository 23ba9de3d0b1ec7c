import itertools
import subprocess
import sys

import numpy as np
import pytest

from cvjax.data.loader import Loader
from cvjax.errors import InputError
from tests.data.stores import Counting, Failing, add_noise, image_of


def take(loader, count, start=0):
    return list(itertools.islice(loader.iterate(start), count))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


def test_a_batch_is_float_images_labels_and_valid():
    (batch,) = take(Loader(Counting(256), 256, shuffle=False), 1)
    assert batch["image"].shape == (256, 1, 1, 1) and batch["image"].dtype == np.float32
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    np.testing.assert_array_equal(batch["image"].ravel(), expected)
    assert batch["label"].dtype == np.int32
    assert batch["valid"].dtype == bool and batch["valid"].all()


def test_float_images_stay_as_they_are():
    source = Failing(2, {i: {"image": np.full((2, 2, 1), 0.25, np.float32)} for i in range(2)})
    (batch,) = take(Loader(source, 2), 1)
    assert (batch["image"] == 0.25).all() and batch["image"].dtype == np.float32


def test_each_epoch_is_another_permutation_and_runs_on_across_the_border():
    stream = labels(take(Loader(Counting(10), 4), 15))
    epochs = stream.reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_seeds_give_different_orders_and_the_same_seed_the_same():
    first, again, other = (labels(take(Loader(Counting(50), 10, seed=s), 20)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    # Nor is one seed's run another's, some epochs later.
    assert not {tuple(e) for e in first.reshape(4, 50)} & {tuple(e) for e in other.reshape(4, 50)}


def test_without_shuffle_the_order_is_that_of_the_source():
    np.testing.assert_array_equal(
        labels(take(Loader(Counting(3), 2, shuffle=False), 3)), [0, 1, 2, 0, 1, 2]
    )


@pytest.mark.parametrize("transforms", [(), (add_noise,)])
def test_resuming_at_every_batch_equals_the_uninterrupted_stream(transforms):
    loader = Loader(Counting(7), 3, transforms=transforms)
    whole = take(loader, 8)
    for start in range(8):
        assert_same(take(loader, 8 - start, start), whole[start:])


def test_processes_together_read_the_same_global_batches():
    options = dict(transforms=(add_noise,), epochs=3, last="pad")
    whole = list(Loader(Counting(9), 8, **options).iterate())
    assert len(whole) == 4 and not whole[-1]["valid"][3:].any()
    for count in (1, 2, 4):
        parts = [
            list(Loader(Counting(9), 8, process_index=i, process_count=count, **options).iterate())
            for i in range(count)
        ]
        joined = [
            {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
            for shards in zip(*parts, strict=True)
        ]
        assert_same(joined, whole)


@pytest.mark.parametrize(
    "options", [{"prefetch": 0}, {"threads": 3}, {"processes": 2}, {"processes": 1, "threads": 2}]
)
def test_threads_and_worker_processes_change_nothing(options):
    plain = Loader(Counting(20), 4, transforms=(add_noise,))
    other = Loader(Counting(20), 4, transforms=(add_noise,), **options)
    iterator = other.iterate(2)
    assert_same(list(itertools.islice(iterator, 6)), take(plain, 6, start=2))
    iterator.close()


def test_drop_leaves_out_the_rest_and_pad_fills_the_last_batch():
    drop = Loader(Counting(10), 4, epochs=1, shuffle=False)
    assert len(drop) == drop.batches_per_epoch == 2
    np.testing.assert_array_equal(labels(drop.iterate()), np.arange(8))

    pad = Loader(Counting(10), 4, epochs=1, shuffle=False, last="pad")
    batches = list(pad.iterate())
    assert len(pad) == pad.batches_per_epoch == len(batches) == 3
    np.testing.assert_array_equal(batches[-1]["valid"], [True, True, False, False])
    np.testing.assert_array_equal(batches[-1]["label"], [8, 9, 9, 9])
    assert sum(batch["valid"].sum() for batch in batches) == 10


def test_epochs_are_joined_before_the_last_batch_is_dropped():
    loader = Loader(Counting(10), 4, epochs=2)
    assert len(loader) == 5 and len(list(loader.iterate())) == 5
    assert list(loader.iterate(start=5)) == list(loader.iterate(start=9)) == []


def test_an_endless_loader_has_no_length():
    loader = Loader(Counting(10), 64)
    assert loader.batches_per_epoch == 1
    with pytest.raises(TypeError, match="endless"):
        len(loader)
    assert take(loader, 2)[1]["image"].shape == (64, 1, 1, 1)


def test_transforms_are_applied_in_order_and_draw_anew_each_epoch():
    seen = []

    def remember(example, rng):
        seen.append(rng.random())
        return {**example, "label": example["label"] * 2}

    def add_one(example, rng):
        return {**example, "label": example["label"] + 1}

    loader = Loader(Counting(4), 4, shuffle=False, transforms=(remember, add_one), prefetch=0)
    batches = take(loader, 3)
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], [1, 3, 5, 7])
    assert len(set(seen)) == 12


def test_a_mistake_in_a_transform_is_not_taken_for_a_bad_example():
    def broken(example, rng):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        take(Loader(Counting(4), 2, transforms=(broken,)), 1)
    assert "of example" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "source, options, message",
    [
        (Counting(0), {}, "no examples"),
        (Counting(9), {"batch_size": 0}, "batch_size is 0; it must be a whole number, at least 1"),
        (Counting(9), {"batch_size": 3, "process_count": 2}, "shared equally by 2"),
        (Counting(9), {"process_index": 1}, "process_index is 1"),
        (Counting(9), {"last": "dorp"}, "it can be .drop. or .pad."),
        (Counting(9), {"epochs": 0}, "epochs is 0"),
        (Counting(9), {"retries": -1}, "retries is -1"),
        (Counting(1), {"epochs": 1}, "batch_size=2 is more than all 1 examples"),
    ],
)
def test_arguments_that_make_no_sense(source, options, message):
    with pytest.raises(InputError, match=message):
        Loader(source, **{"batch_size": 2, **options})


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"processes": 1}])
def test_images_of_different_shapes_name_both_and_the_remedy(options):
    source = Failing(3, {1: {"image": image_of(5), "label": np.int32(1)}})
    with pytest.raises(InputError, match=r"item-0 .*\[1, 1, 1\].*item-1 .*\[5, 5, 1\].*image_size"):
        take(Loader(source, 3, shuffle=False, **options), 1)


def test_records_with_different_fields_name_both():
    source = Failing(2, {1: {"image": image_of(1)}})
    with pytest.raises(InputError, match="item-0 has the fields image, label, but example item-1"):
        take(Loader(source, 2, shuffle=False), 1)


def test_python_can_end_in_the_midst_of_an_iteration():
    program = (
        "from cvjax.data.loader import Loader; from tests.data.stores import Counting;"
        "batches = Loader(Counting(9), 2).iterate(); batch = next(batches)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
