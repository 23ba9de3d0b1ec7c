"""Sources: records on disk or in memory, by number.

A source is anything with `len(source)` and `source[i]`, where a record is a dict of numpy arrays
and scalars, by convention `{"image": uint8 [height, width, channels], "label": int32 scalar}`.
Reading a record may raise: the loader knows what to do then (see `cvjax.data.resilient`). A source
can be pickled, because worker processes get a copy.

A source may also have `class_names: tuple[str, ...]` and `example_id(i) -> str`, which names record
i (a file path, say) in messages.
"""

from typing import Any, Protocol

import numpy as np

Example = dict[str, Any]  # arrays and scalars, by the name of the field


class Source(Protocol):
    """Records by number; the whole interface that the loader needs."""

    def __len__(self) -> int:
        """Returns the number of records."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Returns record `index`, 0 <= index < len; may raise anything that reading can raise."""
        ...


def example_id(source: Source, index: int) -> str:
    """Returns the name of a record for messages: the source's own, or else its number."""
    return source.example_id(index) if hasattr(source, "example_id") else str(index)


def frozen(array: np.ndarray) -> np.ndarray:
    """Returns a read-only view, so that no transform can write into the source's memory."""
    view = array.view()
    view.flags.writeable = False
    return view
