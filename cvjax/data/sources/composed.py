"""Records made of several records of another source: mosaic and copy-paste for detection.

Record i is a function of (seed, i) alone, so that threads, worker processes and resuming change
nothing. Each record of the given source leads `variants` of them, which differ in all that is
drawn: an epoch is that much longer, and no picture comes twice in it.
"""

import dataclasses

import numpy as np

from cvjax.checks import Size, check_between, check_count, height_and_width
from cvjax.data.sources import Example, Source, example_id
from cvjax.data.sources.instances import LeftOut
from cvjax.data.transforms import composing, geometry
from cvjax.data.transforms.objects import padded, real_objects
from cvjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class _Composed:
    """What both have in common.

    Attributes:
        source: records with boxes, as in `cvjax.data.sources.instances`.
        size: of all images, (height, width) or the side of a square.
        p: the probability of being composed; else the record alone is scaled and cut.
        seed: of all that is drawn.
        variants: how many records each record of the source leads.
        max_instances: rows of a record; None is that of the source's. It is said how many objects
            are left out for that.

    Raises:
        InputError: a number makes no sense, or the records have no boxes.
    """

    source: Source
    size: Size = 640
    p: float = 1.0
    seed: int = 0
    variants: int = 100
    max_instances: int | None = None

    def __post_init__(self) -> None:
        height_and_width(self.size)
        check_between(0, 1, p=self.p)
        check_count(1, variants=self.variants)
        check_count(0, seed=self.seed)
        rows = self.max_instances
        check_count(1, max_instances=1 if rows is None else rows)
        name = f"{type(self).__name__} of {type(self.source).__name__}"
        object.__setattr__(self, "_left_out", LeftOut(name, rows or 0))
        for field in ("class_names", "keypoint_names"):
            if hasattr(self.source, field):
                object.__setattr__(self, field, getattr(self.source, field))

    def __len__(self) -> int:
        return self.variants * len(self.source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is not in 0..{len(self) - 1}")
        rng = np.random.default_rng((self.seed, index))
        example = self.source[index % len(self.source)]
        if "boxes" not in example:
            found = ", ".join(example)
            raise InputError(f"{type(self).__name__}: the records have no boxes, only {found}")
        rows = self.max_instances or len(example["boxes"])
        made = self._compose(example, rng) if rng.random() < self.p else self._alone(example, rng)
        made = real_objects(made)
        self._left_out.rows = rows
        self._left_out.add(len(made["boxes"]))
        return padded(made, rows)

    def example_id(self, index: int) -> str:
        """Returns the name of the first record that it is made of."""
        return example_id(self.source, index % len(self.source))

    def _draw(self, rng: np.random.Generator) -> Example:
        return self.source[int(rng.integers(len(self.source)))]


@dataclasses.dataclass(frozen=True)
class Mosaic(_Composed):
    """Four records in one image; the others are drawn from the source (`composing.mosaic`).

    Attributes:
        source, size, p, seed, variants, max_instances: see `_Composed`.
        scale: of each record; at 1 it just fits inside its part of the image.
    """

    scale: tuple[float, float] = (0.7, 1.5)

    def _compose(self, example: Example, rng: np.random.Generator) -> Example:
        others = [self._draw(rng) for _ in range(3)]
        return composing.mosaic([example, *others], rng, size=self.size, scale=self.scale)

    def _alone(self, example: Example, rng: np.random.Generator) -> Example:
        return geometry.random_scale_crop(example, rng, size=self.size, scale=self.scale)


@dataclasses.dataclass(frozen=True)
class CopyPaste(_Composed):
    """Objects of another record copied into each, both scaled and cut before.

    The scaling is the large-scale jitter of `geometry.random_scale_crop`, and each of the two is
    mirrored or not. See `composing.copy_paste`; the source must have masks.

    Attributes:
        source, size, p, seed, variants, max_instances: see `_Composed`.
        scale: of both records; at 1 each just fits inside the image.
        share: the probability of each object to be copied.
    """

    scale: tuple[float, float] = (0.1, 2.0)
    share: float = 0.5

    def _compose(self, example: Example, rng: np.random.Generator) -> Example:
        pair = [self._alone(one, rng) for one in (example, self._draw(rng))]
        return composing.copy_paste(*pair, rng, share=self.share)

    def _alone(self, example: Example, rng: np.random.Generator) -> Example:
        example = geometry.random_scale_crop(example, rng, size=self.size, scale=self.scale)
        return geometry.random_flip(example, rng)
