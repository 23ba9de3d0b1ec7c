"""From a source to batches: shuffle, transform, stack, pad, share among processes, resume.

The epochs of a run form one row of examples, and the place in that row is an example's *position*:
a source of n examples fills n positions per epoch, each epoch in an order of its own. Global batch
b is the positions b * batch_size .. (b + 1) * batch_size - 1. All that is random about an example
(its place, its augmentation, its replacement when it is bad) is a function of (seed, position). So
batch b is the same however many threads, worker processes or hosts read it, and resuming needs one
number: b.
"""

import atexit
import dataclasses
import math
import pathlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Literal

import grain
import numpy as np
from absl import flags

from cvjax.checks import check_between, check_choice, check_count
from cvjax.data.resilient import BadExample, Budget, Reader
from cvjax.data.sources import Example, Source, example_id
from cvjax.data.transforms import Transform
from cvjax.errors import InputError

Batch = dict[str, np.ndarray]

_running: weakref.WeakSet[Iterator[Batch]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends all threads and workers before Python ends, also where nobody closed an iteration."""
    for iterator in list(_running):
        iterator.close()


class Loader:
    """Batches of a source.

    A batch has every field of the records, stacked to [batch, ...], and `valid`, bool [batch]:
    False for the padding of the last batch and for an example that stands in for a bad one. The
    field `image`, and each whose name begins with `image_`, is float32 if it was uint8, divided by
    255; float images stay as they are.

    Args:
        source: the records (see `cvjax.data.sources`).
        batch_size: examples in a global batch, over all processes.
        seed: of the order, the transforms and the replacements.
        shuffle: a new order each epoch; False keeps the order of the source.
        epochs: how often the source is gone through; None is endless.
        transforms: each is called as `transform(example, rng)` and returns a new example; in order.
        last: what becomes of the last batch of the last epoch if it is not full: "drop" or "pad".
            Between epochs nothing is dropped: a batch may hold the end of one and the start of the
            next.
        process_index: this process among `process_count`. It gets rows
            [index * batch_size / count, (index + 1) * batch_size / count) of each global batch.
        process_count: how many processes share the batches.
        threads: how many make batches side by side; for files on a disk or a network. 0 is one
            thread in the background, which is best for data in memory.
        processes: worker processes that make batches, with `threads` each; for costly decoding.
        prefetch: batches made in advance (by each worker); 0 makes each when it is asked for.
        retries: further attempts at reading an example after a failed one.
        backoff: seconds before the first of these; doubled before each next one.
        bad_budget: share of the examples that may be bad before the run stops. The first five are
            forgiven, unless it is 0, which allows none.
        bad_examples: a file to which each bad example is added as a JSON line. Processes other than
            the first add their number to the file's name.

    Raises:
        InputError: the source is empty, or a number makes no sense.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        transforms: Sequence[Transform] = (),
        last: Literal["drop", "pad"] = "drop",
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 0,
        processes: int = 0,
        prefetch: int = 2,
        retries: int = 3,
        backoff: float = 0.05,
        bad_budget: float = 0.05,
        bad_examples: str | pathlib.Path | None = None,
    ):
        check_count(1, batch_size=batch_size, process_count=process_count)
        check_count(0, threads=threads, processes=processes)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InputError(f"seed is {seed!r}; it must be a whole number, 0 .. 2^63 - 1")
        check_count(0, prefetch=prefetch, retries=retries)
        check_between(0, math.inf, backoff=backoff, bad_budget=bad_budget)
        if epochs is not None:  # endless
            check_count(1, epochs=epochs)
        check_choice(("drop", "pad"), last=last)
        check_between(0, process_count - 1, process_index=process_index)
        if batch_size % process_count:
            raise InputError(
                f"batch_size={batch_size} cannot be shared equally by {process_count} processes"
            )
        for method in ("__len__", "__getitem__"):
            if not hasattr(source, method):
                raise InputError(f"the source {type(source).__name__} has no {method}")
        if not len(source):
            raise InputError(f"the source {type(source).__name__} has no examples")
        if epochs is None:
            batches = sys.maxsize // batch_size
        else:
            batches = _batches(epochs * len(source), batch_size, last)
        if not batches:
            raise InputError(
                f"batch_size={batch_size} is more than all {epochs * len(source)} examples: "
                "lower it, or pad the batch with last='pad'"
            )
        if bad_examples and process_index:
            path = pathlib.Path(bad_examples)
            bad_examples = path.with_stem(f"{path.stem}-{process_index}")
        self._batches = batches
        self._endless = epochs is None
        self._batches_per_epoch = max(1, _batches(len(source), batch_size, last))
        self._threads, self._processes, self._prefetch = threads, processes, prefetch
        self._bad_budget, self._bad_examples = bad_budget, bad_examples
        self._maker = _BatchMaker(
            reader=Reader(source, seed, retries, backoff),
            transforms=tuple(transforms),
            order=_order(len(source), seed, shuffle),
            batch_size=batch_size,
            rows=range(
                process_index * batch_size // process_count,
                (process_index + 1) * batch_size // process_count,
            ),
            total=sys.maxsize if epochs is None else epochs * len(source),
        )

    def __len__(self) -> int:
        """Returns the number of batches of all epochs; raises TypeError for an endless loader."""
        if self._endless:
            raise TypeError("an endless loader has no length; see batches_per_epoch")
        return self._batches

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one epoch alone: the full ones, or with `last="pad"` all; at least 1."""
        return self._batches_per_epoch

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yields the batches start, start + 1, ..., as if the earlier ones had been read.

        Each batch holds this process's rows: [batch_size / process_count, ...].

        Raises:
            InputError: too many examples are bad, or examples of one batch do not fit together.
        """
        generator = self._iterate(start)
        _running.add(generator)
        return generator

    def _iterate(self, start: int) -> Iterator[Batch]:
        batches = grain.MapDataset.range(min(start, self._batches), self._batches).map(self._maker)
        iterator = iter(self._pipeline(batches))
        budget = Budget(self._bad_budget, self._bad_examples)
        try:
            for batch, seen, bad in iterator:
                budget.add(seen, bad)
                if self._processes:
                    # Out of the workers' shared memory, which does not outlive this iteration.
                    batch = {name: np.array(value) for name, value in batch.items()}
                yield batch
        finally:
            iterator.close()

    def _pipeline(self, batches: grain.MapDataset) -> grain.IterDataset:
        """Decides who makes the batches: the caller, threads, or worker processes."""
        threads = self._threads
        if not self._processes and self._prefetch:
            threads = max(1, threads)
        options = grain.ReadOptions(threads, max(self._prefetch, threads))
        dataset = batches.to_iter_dataset(options)
        if not self._processes:
            return dataset
        # Grain reads its flags here, which nobody has parsed in a notebook or under pytest.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(self._processes, max(1, self._prefetch))
        return dataset.mp_prefetch(workers)


@dataclasses.dataclass(frozen=True)
class _BatchMaker:
    """The number of a global batch -> (this process's rows, how many are real, the bad ones)."""

    reader: Reader
    transforms: tuple[Transform, ...]
    order: grain.MapDataset  # position -> index into the source
    batch_size: int
    rows: range
    total: int  # positions in all epochs

    def __call__(self, number: int) -> tuple[Batch, int, list[BadExample]]:
        first = number * self.batch_size
        real = range(first + self.rows.start, min(first + self.rows.stop, self.total))
        # Padding repeats the last row, or the last example of all where every row is padding.
        read = [self._read(position) for position in real or [self.total - 1]]
        bad = [one for _, _, one in read[: len(real)] if one]
        valid = [one is None for _, _, one in read[: len(real)]]
        valid += [False] * (len(self.rows) - len(real))
        read += [read[-1]] * (len(self.rows) - len(read))
        batch = _stack([name for name, _, _ in read], [example for _, example, _ in read])
        return {**batch, "valid": np.array(valid)}, len(real), bad

    def _read(self, position: int) -> tuple[str, Example, BadExample | None]:
        """Returns the name, the transformed example and what was wrong at one position."""
        index = self.order[position]
        example, bad = self.reader.read(index, position)
        name = example_id(self.reader.source, bad.replaced_by if bad else index)
        if self.transforms:
            rng = np.random.default_rng((self.reader.seed, position))
            for transform in self.transforms:
                try:
                    example = transform(example, rng)
                except Exception as error:  # A mistake in the transform, not in the data.
                    error.add_note(f"in {transform} of example {name}")
                    raise
        return name, example, bad


def _batches(examples: int, batch_size: int, last: str) -> int:
    return -(-examples // batch_size) if last == "pad" else examples // batch_size


def _order(examples: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """Returns the endless row of indices into the source: epoch after epoch, each in its order."""
    indices = grain.MapDataset.range(examples)
    if not shuffle:
        return indices
    # Grain shuffles epoch e with seed + e: spread the seeds, or 1 would be 0 an epoch later.
    return indices.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def _stack(names: Sequence[str], examples: Sequence[Example]) -> Batch:
    """Stacks each field and makes uint8 images float32 in [0, 1]; raises InputError on a misfit."""
    for name, example in zip(names, examples, strict=True):
        if example.keys() != examples[0].keys():
            raise InputError(
                f"example {names[0]} has the fields {', '.join(examples[0])}, "
                f"but example {name} has {', '.join(example)}"
            )
    batch = {}
    for field in examples[0]:
        column = [np.asarray(example[field]) for example in examples]
        for name, value in zip(names, column, strict=True):
            if (value.shape, value.dtype.kind) != (column[0].shape, column[0].dtype.kind):
                raise InputError(
                    f"the {field} of example {names[0]} is {_describe(column[0])}, but of example "
                    f"{name} {_describe(value)}: a batch needs one shape; give the source an "
                    "image_size=, or add a transform that resizes"
                )
        batch[field] = np.stack(column)
    for field, value in batch.items():
        is_image = field == "image" or field.startswith("image_")
        if is_image and value.dtype == np.uint8 and value.ndim > 3:
            batch[field] = np.divide(value, np.float32(255), dtype=np.float32)
    return batch


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
