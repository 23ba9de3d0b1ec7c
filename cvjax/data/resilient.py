"""Reading from a store that fails now and then, and from files of which some are broken.

A read that fails is tried again, and waits longer each time. An example that stays bad is replaced
by another one, so that the shape of a batch and the order of all other examples stay as they were,
and it is noted in a file. When more examples are bad than the budget allows, the run stops.

All of this depends on nothing but (seed, position), so threads, worker processes and resuming
change nothing. A read that hangs cannot be interrupted in Python: to time out, a store must raise
TimeoutError by itself.
"""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from cvjax.data.sources import Example, Source, example_id
from cvjax.errors import InputError

log = logging.getLogger("cvjax")

_REPLACEMENTS = 10  # reads of other examples before a position is given up
_FORGIVEN = 5  # bad examples that never stop a run: a share of a handful says nothing


@dataclasses.dataclass(frozen=True)
class BadExample:
    """One line of the file of bad examples."""

    position: int  # in the stream of examples, counted from the start of the run
    index: int  # in the source
    id: str
    error: str
    replaced_by: int  # another index in the source


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads examples of a source, with retries and replacements.

    Attributes:
        source: where the examples are.
        seed: of the choice of replacements.
        retries: further attempts after a failed one.
        backoff: seconds before the first of these; doubled before each next one.
    """

    source: Source
    seed: int
    retries: int
    backoff: float

    def read(self, index: int, position: int) -> tuple[Example, BadExample | None]:
        """Returns the example `index`, or a replacement and what was wrong.

        The replacement is chosen by the position, whatever else was read before.
        Raises InputError when ten replacements in a row are bad too.
        """
        try:
            return self._attempt(index), None
        except Exception as error:
            first = error
        name = example_id(self.source, index)
        rng = np.random.default_rng((self.seed, position))
        for other in rng.integers(len(self.source), size=_REPLACEMENTS).tolist():
            try:
                example = self._attempt(other)
            except Exception:
                continue
            return example, BadExample(position, index, name, _line(first), other)
        raise InputError(
            f"example {name} cannot be read ({_line(first)}), nor can {_REPLACEMENTS} others that "
            "were tried in its place: check the path and the store"
        ) from first

    def _attempt(self, index: int) -> Example:
        """Reads and checks one example; raises the last error when all attempts fail."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                example = self.source[index]
                break
            except (ValueError, TypeError):
                raise  # The bytes came and are wrong: reading them again would change nothing.
            except Exception:
                if attempt == self.retries:
                    raise
        check_example(example)
        return example


class Budget:
    """Counts bad examples, notes each in a file, and stops the run when there are too many.

    Args:
        share: of the examples seen so far that may be bad. The first five are forgiven whatever
            the share, except that a share of 0 forgives none.
        path: one JSON line is added to this file per bad example, unless the file already has a
            line for that position (which was then written before the run resumed). None: no file.
    """

    def __init__(self, share: float, path: str | pathlib.Path | None):
        self._share = share
        self._path = pathlib.Path(path) if path else None
        self._noted = _positions(self._path)
        self._seen = 0
        self._bad: list[BadExample] = []

    def add(self, seen: int, bad: Sequence[BadExample]) -> None:
        """Counts `seen` more examples, `bad` among them; raises InputError if that is too many."""
        self._seen += seen
        for one in bad:
            self._bad.append(one)
            if len(self._bad).bit_count() == 1:  # 1, 2, 4, ...
                log.warning("%d bad so far, %s: %s", len(self._bad), one.id, one.error)
        self._note([one for one in bad if one.position not in self._noted])
        allowed = max(_FORGIVEN, self._share * self._seen) if self._share else 0
        if len(self._bad) > allowed:
            first = "; ".join(f"{one.id}: {one.error}" for one in self._bad[:3])
            raise InputError(
                f"{len(self._bad)} of the {self._seen} examples read are bad, more than "
                f"bad_budget={self._share:g} allows; the first: {first}"
                + (f" (all are in {self._path})" if self._path else "")
            )

    def _note(self, bad: Sequence[BadExample]) -> None:
        if not self._path or not bad:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in bad)
        self._noted.update(one.position for one in bad)


def check_example(example: Example) -> None:
    """Raises ValueError unless `example` is a record: numbers by name, an image being [h, w, c]."""
    if not isinstance(example, dict) or not example:
        raise ValueError(f"a record is a dict of arrays, not {type(example).__name__}")
    for name, value in example.items():
        dtype = value.dtype if isinstance(value, np.ndarray) else np.asarray(value).dtype
        if dtype.kind not in "biufcUS":
            raise ValueError(f"the field {name} is {type(value).__name__} with dtype {dtype}")
    if "image" in example:
        image = np.asarray(example["image"])
        if (
            image.ndim != 3
            or not image.size
            or not (image.dtype == np.uint8 or image.dtype.kind == "f")
        ):
            raise ValueError(
                f"an image is uint8 or float [height, width, channels], not {image.dtype} "
                f"{list(image.shape)}"
            )


def _line(error: Exception) -> str:
    """Returns an error as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _positions(path: pathlib.Path | None) -> set[int]:
    """Returns the positions that the file has lines for, and mends a last line that was cut off."""
    if not path or not path.exists():
        return set()
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    positions = set()
    for line in whole.splitlines():
        try:
            positions.add(json.loads(line)["position"])
        except (ValueError, KeyError, TypeError):
            continue  # damaged: it says of no position that it was noted
    return positions
