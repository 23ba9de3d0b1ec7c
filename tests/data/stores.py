"""Stores for the tests, at module level so that worker processes can unpickle them."""

import collections

import numpy as np


class Counting:
    """`n` images of one pixel that holds its own number; the label is the number."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        image = np.full((1, 1, 1), index % 256, np.uint8)
        return {"image": image, "label": np.int32(index)}


class Failing(Counting):
    """As `Counting`, but `errors[index]` is raised (or returned, if it is no exception)."""

    def __init__(self, n, errors):
        super().__init__(n)
        self.errors = errors
        self.reads = collections.Counter()

    def __getitem__(self, index):
        self.reads[index] += 1
        if index not in self.errors:
            return super().__getitem__(index)
        if isinstance(self.errors[index], BaseException):
            raise self.errors[index]
        return self.errors[index]

    def example_id(self, index):
        return f"item-{index}"


class Numbered:
    """Another source, with the number of each example as one more field."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {**self.source[index], "index": np.int32(index)}

    def example_id(self, index):
        return self.source.example_id(index)


class Flaky(Numbered):
    """Fails every other time for one index in twenty; gives a wrong type for `wrong`."""

    def __init__(self, source, wrong):
        super().__init__(source)
        self.wrong = wrong
        self.reads = collections.Counter()

    def __getitem__(self, index):
        self.reads[index] += 1
        if index % 20 == 7 and self.reads[index] % 2:
            raise (OSError if index % 40 == 7 else TimeoutError)("the store is busy")
        if index in self.wrong:
            return {"image": self.wrong[index], "label": np.int32(0), "index": np.int32(index)}
        return super().__getitem__(index)


def add_noise(example, rng):
    """A transform: the label stays, the image is drawn anew."""
    return {**example, "image": rng.integers(256, size=(1, 1, 1), dtype=np.uint8)}


def image_of(size):
    """An image [size, size, 1] for a record of another shape."""
    return np.zeros((size, size, 1), np.uint8)
