"""What a person gives is checked once, and the line says what it must be."""

import numpy as np
import pytest

from cvjax.checks import check_unit
from cvjax.data.ranges import check_unit_images
from cvjax.data.sources.arrays import Arrays
from cvjax.errors import InputError
from cvjax.evaluation.extractor import unit

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
