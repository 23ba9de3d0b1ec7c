"""What a person gives is checked once, and the line says what it must be."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from cvjax.checks import (
    check_at_least,
    check_channels,
    check_labels,
    check_unit,
    check_unit_images,
)
from cvjax.data.sources.arrays import Arrays
from cvjax.errors import InputError
from cvjax.evaluation.extractor import unit


@dataclass
class Counted:
    copies: int | None = None
    sizes: tuple[int, ...] = (1,)
    ratio: float = 1.0


TAKERS = {
    "a function of images": check_unit,
    "a task": lambda x: check_unit_images({"image": x, "valid": np.ones(len(x), bool)}),
    "a source": lambda x: Arrays({"image": x}),
    "an evaluator": unit,
}


@pytest.mark.parametrize("taker", TAKERS.values(), ids=TAKERS)
def test_images_are_in_0_to_1_but_for_rounding(taker):
    """Bicubic scaling ends at 1.0000001: who trains takes what who evaluates takes."""
    image = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 2, 2, 3)
    for rounded in (image, image * np.float32(1.0000001), image - np.float32(1e-6)):
        taker(rounded)
    taker(image[:0])
    for wrong in (255 * image, 2 * image - 1, image * 1.01, image * np.nan):
        with pytest.raises(InputError, match="images have values from"):
            taker(wrong)
    with pytest.raises(InputError, match="dtype int32"):
        taker(image.astype(np.int32))


@pytest.mark.parametrize(
    "value, message",
    [
        (0, "copies is 0; it must be at least 1"),
        (np.nan, "copies is nan; it must be at least 1"),
        ("3", "copies is '3'; it must be a number"),
        (True, "copies is True; it must be a number"),
        ((2, True), r"copies\[1\] is True; it must be a number"),
        ((2, 0.5), r"copies\[1\] is 0.5; it must be at least 1"),
        ([], r"copies is \[\]; it must have at least one number"),
    ],
)
def test_a_field_is_a_number_and_large_enough(value, message):
    for fine in (None, 1, np.int64(1), 1e9, (1, 2), [np.float32(1)]):
        check_at_least(SimpleNamespace(copies=fine), copies=1)
    with pytest.raises(InputError, match=f"SimpleNamespace: {message}"):
        check_at_least(SimpleNamespace(copies=value), copies=1)


def test_a_field_of_integers_has_whole_numbers():
    for fine in (1.5, 2):
        check_at_least(Counted(ratio=fine), ratio=1)
    for wrong in ({"copies": 2.0}, {"sizes": (2, 1.5)}):
        with pytest.raises(InputError, match=".* is .*; it must be a whole number, at least 1"):
            check_at_least(Counted(**wrong), **dict.fromkeys(wrong, 1))


@pytest.mark.parametrize("std", [0.0, (0.5, 0.0, 0.5), -1.0, np.nan])
def test_nothing_is_divided_by_a_std_of_0(std):
    batch = {"image": np.zeros((2, 4, 4, 3))}
    check_channels(batch, mean=0.0, std=0.5)
    with pytest.raises(InputError, match="std is .*: it must be above 0"):
        check_channels(batch, mean=0.0, std=std)


def test_names_of_classes_are_no_labels():
    with pytest.raises(InputError, match=r"label is .*'b'.*; classes are numbers, 0..1$"):
        check_labels(np.array(["b", "a"]), 2)
