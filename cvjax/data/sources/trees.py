"""Trees in aerial photographs: real detection from files that come with the package deepforest."""

import dataclasses
import functools
import importlib.util
import pathlib

import numpy as np

from cvjax.checks import check_at_least, check_choices
from cvjax.data.sources import Example
from cvjax.data.sources.instances import LeftOut, read_image, record
from cvjax.data.sources.voc_xml import read_objects
from cvjax.data.transforms import fields
from cvjax.errors import InputError

# Two sites each, with 611 and 340 trees; 0.1 m are a pixel.
_PHOTOGRAPHS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "SOAP_061"),
    "test": ("2019_YELL_2_541000_4977000_image_crop", "OSBS_029"),
}
_NAMES = ("Tree", "Alive", "Dead")  # as the files call them: all are trees here
_LEAST_SEEN = 0.5  # of a tree's box in a window of the test, else it does not count


@dataclasses.dataclass(frozen=True)
class Trees:
    """Windows of four photographs with 951 trees in boxes; two of them are for the test.

    B. Weinstein et al.: A remote sensing derived data set of 100 million individual tree crowns
    (https://doi.org/10.7554/eLife.62922), images of the National Ecological Observatory Network;
    `pip install --no-deps deepforest` brings them, nothing of it is imported. Records are those of
    `cvjax.data.sources.instances`, of [window, window, 3]. "train" has `count` windows anywhere,
    each a function of (seed, index) alone; "test" has those that lie side by side, in which a tree
    of whose box less than half is seen has `ignore`.

    Attributes:
        split: "train" or "test".
        window: the side in pixels, at most 400.
        count: windows of "train".
        seed: of their places.
        max_instances: rows of a record. It is said how many trees are left out for that.
        path: the folder of the photographs; None is that of the installed package.

    Raises:
        InputError: the package is not installed, a file is missing or damaged, no such split, or a
            number that makes no sense.
    """

    split: str = "train"
    window: int = 192
    count: int = 10_000
    seed: int = 0
    max_instances: int = 48
    path: str | pathlib.Path | None = None

    class_names = ("tree",)

    def __post_init__(self) -> None:
        check_choices(self, split=_PHOTOGRAPHS)
        check_at_least(self, window=1, max_instances=1, count=1, seed=0)
        if self.window > 400:
            raise InputError(f"window={self.window}: a window is at most 400 pixels")
        folder = _folder() if self.path is None else pathlib.Path(self.path).expanduser()
        files = tuple(str(folder / name) for name in _PHOTOGRAPHS[self.split])
        places = []
        for number, file in enumerate(files):
            height, width = _photograph(file)["image"].shape[:2]
            rows = range(0, height - self.window + 1, self.window)
            columns = range(0, width - self.window + 1, self.window)
            places += [(number, top, left) for top in rows for left in columns]
        object.__setattr__(self, "_files", files)
        object.__setattr__(self, "_places", tuple(places))
        object.__setattr__(self, "_left_out", LeftOut(f"trees ({self.split})", self.max_instances))

    def __len__(self) -> int:
        return self.count if self.split == "train" else len(self._places)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is not in 0..{len(self) - 1}")
        number, top, left = self._place(index)
        whole = _photograph(self._files[number])
        part = fields.crop(whole, top, left, self.window, self.window)
        boxes = part["boxes"]
        is_cut = part["area"] < _LEAST_SEEN * part["box_whole"]
        self._left_out.add(len(boxes))
        return record(
            part["image"],
            boxes,
            np.zeros(len(boxes)),
            ignore=is_cut if self.split == "test" else None,
            rows=self.max_instances,
        )

    def example_id(self, index: int) -> str:
        """Returns the file, and the upper left corner of the window."""
        number, top, left = self._place(index)
        return f"{self._files[number]}.png at x {left}, y {top}"

    def _place(self, index: int) -> tuple[int, int, int]:
        """The number of the photograph, and the window's top and left."""
        if self.split == "test":
            return self._places[index]
        rng = np.random.default_rng((self.seed, index))
        # Each photograph as often as windows fit into it side by side.
        number = self._places[int(rng.integers(len(self._places)))][0]
        height, width = _photograph(self._files[number])["image"].shape[:2]
        top, left = (int(rng.integers(side - self.window + 1)) for side in (height, width))
        return number, top, left


def _folder() -> pathlib.Path:
    spec = importlib.util.find_spec("deepforest")  # Does not import it, nor torch with it.
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the photographs come with a package: pip install --no-deps deepforest==2.1.0"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "data"


@functools.lru_cache(maxsize=8)
def _photograph(file: str) -> Example:
    """A photograph with all its boxes, read once by each process."""
    try:
        content = pathlib.Path(f"{file}.xml").read_bytes()
        truth = read_objects(content, _NAMES)
        image = read_image(f"{file}.png", 3, 2**26, truth.size)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}.xml: {error}") from error
    if truth.faults:
        raise InputError(f"{file}.xml: {truth.faults[0]}")
    boxes = truth.boxes.astype(np.float32)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return {"image": image, "boxes": boxes, "area": area, "box_whole": area}
