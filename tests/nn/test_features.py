"""The maps of a backbone in order, and of patches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.errors import InputError
from cvjax.nn.features import Patches, ordered_features


class Plain(nn.Module):
    """A backbone of one's own: it takes no `valid`, and names its maps in another order."""

    strides = {"whole": 8, "a": 2, "b": 4, "again": 4}

    @nn.compact
    def features(self, x, *, train=False):
        maps = {}
        for name in ("a", "again", "b", "whole"):
            stride = self.strides[name]
            maps[name] = nn.Conv(4, (stride, stride), strides=stride, name=name)(x)
        return {name: maps[name] for name in ("b", "whole", "a", "again")}


class Reader(nn.Module):
    backbone: nn.Module

    @nn.compact
    def __call__(self, x, valid=None):
        return ordered_features(self.backbone, x, valid=valid)


def test_maps_come_in_the_order_of_their_strides():
    maps, variables = Reader(Plain()).init_with_output(
        jax.random.key(0), jnp.ones((2, 16, 16, 3)), jnp.ones(2, bool)
    )
    assert [x.shape[1] for x in maps] == [8, 4, 4, 2]
    named = Plain().apply(
        {"params": variables["params"]["backbone"]}, jnp.ones((2, 16, 16, 3)), method="features"
    )
    for x, name in zip(maps, ("a", "b", "again", "whole"), strict=True):
        np.testing.assert_array_equal(x, named[name])


class Look(nn.Module):
    """Its only map is the image that it sees."""

    strides = {"image": 1}

    @nn.compact
    def features(self, x, *, train=False, valid=None):
        return {"image": x}


@pytest.mark.parametrize("size", [(6, 9), (5, 7), (1, 1), (4, 8)])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_stack_squares_of_pixels_and_fill_up_with_zeros(size, patch):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    backbone = Patches(Look(), patch)
    found = backbone.apply({}, x, method="features", valid=jnp.ones(2, bool))["image"]
    rows, columns = (-(-side // patch) for side in size)
    assert found.shape == (2, rows, columns, patch**2 * 3)
    padded = np.pad(
        x, ((0, 0), (0, rows * patch - size[0]), (0, columns * patch - size[1]), (0, 0))
    )
    for i, j in np.ndindex(rows, columns):
        square = padded[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        np.testing.assert_array_equal(found[:, i, j], square.reshape(2, -1))
    assert backbone.strides == {"image": patch}


def test_patches_of_a_backbone_that_takes_no_valid():
    backbone = Patches(Plain(), 2)
    assert backbone.strides == {"whole": 16, "a": 4, "b": 8, "again": 8}
    maps, _ = Reader(backbone).init_with_output(
        jax.random.key(0), jnp.ones((2, 33, 16, 3)), jnp.ones(2, bool)
    )
    assert [x.shape[1] for x in maps] == [9, 5, 5, 3]
    with pytest.raises(InputError, match="patch is 0"):
        Patches(Look(), 0)
