"""Whole batches inside jit: exact shares, partners that are valid, edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvjax.data.transforms import batched, mixing
from cvjax.errors import InputError

MIXES = {
    "mixup": partial(mixing.mixup, alpha=0.5),
    "cutmix": mixing.cutmix,
    "either": mixing.mixup_or_cutmix,
}


def constant_images(batch, height=12, width=9):
    """Image i is i everywhere: what is pasted where can be read off."""
    return np.broadcast_to(np.float32(range(batch))[:, None, None, None], (batch, height, width, 2))


# Few shapes: it is the compilation that takes time.
@pytest.mark.parametrize(
    "name, shape",
    [("mixup", (1, 1)), ("cutmix", (12, 9)), ("cutmix", (1, 8)), ("either", (5, 5))],
)
def test_the_share_is_what_is_really_its_own_and_targets_follow(name, shape):
    batch = 6
    images = constant_images(batch, *shape)
    targets = np.eye(4, dtype=np.float32)[np.arange(batch) % 4] * 0.9 + 0.025
    mix = jax.jit(MIXES[name])
    kinds = set()
    for seed in range(40):
        mixed = mix(images, jax.random.key(seed))
        partner, share = np.asarray(mixed.partner), np.asarray(mixed.share)
        assert sorted(partner) == list(range(batch)) and (partner != np.arange(batch)).all()
        assert (share >= 0).all() and (share <= 1).all() and share.dtype == np.float32
        result = np.asarray(mixed.images)[..., 0]
        is_pasted = np.isin(result, range(batch)).all()
        kinds.add(bool(is_pasted))
        for i in range(batch):
            if is_pasted and name != "mixup":
                pasted = result[i] == partner[i]
                assert (pasted | (result[i] == i)).all()
                rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
                assert pasted.sum() == len(rows) * len(columns)
                if len(rows):
                    assert len(rows) == np.ptp(rows) + 1 and len(columns) == np.ptp(columns) + 1
                np.testing.assert_allclose(share[i], 1 - pasted.mean(), atol=1e-6)
            else:
                blend = share[i] * i + (1 - share[i]) * partner[i]
                np.testing.assert_allclose(result[i], blend, atol=1e-5)
        mixed_targets = np.asarray(mixed.targets(targets))
        np.testing.assert_allclose(mixed_targets.sum(axis=1), 1, atol=1e-6)
        expected = share[:, None] * targets + (1 - share[:, None]) * targets[partner]
        np.testing.assert_allclose(mixed_targets, expected, atol=1e-6)
    assert name != "either" or kinds == {True, False}


def test_images_of_whole_numbers_are_mixed_as_numbers():
    images = np.random.default_rng(0).integers(256, size=(4, 3, 3, 1), dtype=np.uint8)
    for mix in (mixing.mixup, mixing.cutmix):
        found, expected = (mix(x, jax.random.key(0)) for x in (images, np.float32(images)))
        np.testing.assert_array_equal(found.images, expected.images)


def test_rectangles_of_cutmix_are_clipped_at_every_edge_and_reach_the_corners():
    images = constant_images(512)
    mixed = jax.jit(mixing.cutmix)(images, jax.random.key(0))
    result, partner = np.asarray(mixed.images)[..., 0], np.asarray(mixed.partner)
    pasted = result == partner[:, None, None]
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert pasted[:, corner[0], corner[1]].any()
    np.testing.assert_allclose(mixed.share, 1 - pasted.mean(axis=(1, 2)), atol=1e-6)
    # Beta(1, 1) is uniform: 1 - share has mean 1/2 before what is outside is lost.
    assert 0.2 < 1 - np.asarray(mixed.share).mean() < 0.5


def test_images_of_half_precision_are_mixed_by_the_share_of_their_targets():
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(16, 3, 3, 1)), jnp.bfloat16)
    mixed = jax.jit(mixing.mixup)(images, jax.random.key(0))
    own, share = images.astype(jnp.float32), mixed.share[:, None, None, None]
    exact = share * own + (1 - share) * own[mixed.partner]
    assert mixed.images.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits; with a share that is rounded, too, it is three times that.
    np.testing.assert_allclose(np.float32(mixed.images), exact, rtol=2**-8, atol=0)


def test_shares_of_mixup_are_from_the_beta_distribution():
    for alpha in (0.1, 5.0):
        mix = partial(mixing.mixup, alpha=alpha)
        share = jax.jit(mix)(np.zeros((4000, 1, 1, 1), np.float32), jax.random.key(0)).share
        share = np.asarray(share)
        assert np.isfinite(share).all()
        np.testing.assert_allclose(share.mean(), 0.5, atol=0.03)
        np.testing.assert_allclose(share.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.08)


@pytest.mark.parametrize("name", ["cutmix", "either"])
def test_what_is_not_valid_is_nobodys_partner(name):
    images = constant_images(8).copy()
    valid = np.array([True, False, True, True, False, True, False, True])
    images[~valid] = np.nan
    targets = np.where(valid[:, None], np.eye(8, dtype=np.float32), np.nan)
    mix = jax.jit(MIXES[name])
    for seed in range(20):
        mixed = mix(images, jax.random.key(seed), valid)
        partner = np.asarray(mixed.partner)
        assert valid[partner[valid]].all() and (partner[valid] != np.flatnonzero(valid)).all()
        np.testing.assert_array_equal(partner[~valid], np.flatnonzero(~valid))
        assert np.isfinite(np.asarray(mixed.images)[valid]).all()
        assert np.isfinite(np.asarray(mixed.targets(targets))[valid]).all()
    # One alone stays itself; none at all is no error.
    for alone in (np.arange(8) == 3, np.zeros(8, bool)):
        mixed = mix(constant_images(8), jax.random.key(0), alone)
        np.testing.assert_array_equal(mixed.partner, range(8))
        np.testing.assert_allclose(mixed.images, constant_images(8), rtol=1e-6)


def test_a_batch_on_several_devices_is_mixed_as_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    mix = jax.jit(mixing.mixup_or_cutmix)
    images = constant_images(16).copy()
    for seed in range(3):
        whole = mix(images, jax.random.key(seed))
        shared = mix(jax.device_put(images, rows), jax.random.key(seed))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), whole, shared)


def test_every_other_image_is_as_likely_a_partner():
    draw = jax.jit(jax.vmap(lambda key: mixing._partners(key, jnp.zeros((4, 1)), None)))
    partners = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    for i in range(4):
        counts = np.bincount(partners[:, i], minlength=4)
        assert counts[i] == 0 and (np.abs(np.delete(counts, i) - 1000) < 110).all()


BATCHED = {
    "flip": batched.random_flip,
    "crop": partial(batched.random_crop, padding=2),
    "crop with zeros": partial(batched.random_crop, padding=2, fill=-1.0),
    "cutout": partial(batched.cutout, size=4, fill=-1.0),
    "erasing": partial(batched.random_erasing, p=1.0, fill=-1.0),
    "erasing with noise": partial(batched.random_erasing, fill="noise"),
    "all": partial(
        batched.in_order,
        a=batched.random_flip,
        b=batched.random_crop,
        c=batched.cutout,
        d=batched.random_vertical_flip,
    ),
}


@pytest.mark.parametrize("name", BATCHED)
def test_shape_and_type_stay_and_the_key_decides(name):
    transform = jax.jit(BATCHED[name])
    for shape, dtype in (((3, 1, 1, 1), jnp.float32), ((4, 7, 10, 3), jnp.bfloat16)):
        images = np.random.default_rng(0).uniform(size=shape).astype(dtype)
        results = [np.asarray(transform(images, jax.random.key(seed % 6))) for seed in range(12)]
        for one, other in zip(results[:6], results[6:], strict=True):
            assert one.shape == shape and one.dtype == dtype
            assert one.tobytes() == other.tobytes()
    assert len({result.tobytes() for result in results}) > 1


def test_flips_crops_and_covers_do_what_they_say():
    images = np.random.default_rng(0).uniform(size=(64, 9, 8, 2)).astype(np.float32)
    for flip, mirror in (
        (batched.random_flip, images[:, :, ::-1]),
        (batched.random_vertical_flip, images[:, ::-1]),
    ):
        flipped = np.asarray(jax.jit(flip)(images, jax.random.key(0)))
        is_mirrored = (flipped == mirror).all(axis=(1, 2, 3))
        assert (is_mirrored | (flipped == images).all(axis=(1, 2, 3))).all()
        assert 16 < is_mirrored.sum() < 48

    for fill, mode in (("reflect", dict(mode="reflect")), (7.0, dict(constant_values=7.0))):
        crop = jax.jit(partial(batched.random_crop, padding=3, fill=fill))
        moved = np.asarray(crop(images, jax.random.key(1)))
        places = set()
        for image, result in zip(np.asarray(images), moved, strict=True):
            padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), **mode)
            found = [
                (top, left)
                for top in range(7)
                for left in range(7)
                if (padded[top : top + 9, left : left + 8] == result).all()
            ]
            assert len(found) == 1
            places.update(found)
        assert len(places) > 25 and {0, 6} <= {top for top, _ in places}

    cutout = jax.jit(partial(batched.cutout, size=4, fill=-1.0))
    holes = np.asarray(cutout(images, jax.random.key(2))) == -1.0
    assert (holes.any(axis=3) == holes.all(axis=3)).all()
    areas = holes[..., 0].sum(axis=(1, 2))
    assert areas.max() == 16 and areas.min() >= 4

    settings = dict(p=0.7, scale=(0.2, 0.4), ratio=(0.5, 2.0), fill=-1.0)
    erase = jax.jit(partial(batched.random_erasing, **settings))
    erased = np.asarray(erase(np.ones((300, 40, 30, 1), np.float32), jax.random.key(3)))
    covered = (erased == -1.0).mean(axis=(1, 2, 3))
    assert 0.6 < (covered > 0).mean() < 0.8
    assert ((covered == 0) | ((covered > 0.18) & (covered < 0.42))).all()


@pytest.mark.parametrize(
    "transform, message",
    [
        (partial(batched.random_flip, p=-1), "p is -1"),
        (partial(batched.random_crop, padding=-1), "padding is -1"),
        (partial(batched.random_crop, fill="mirror"), "fill is 'mirror'"),
        (partial(batched.random_erasing, fill="zero"), "fill is 'zero'"),
        (partial(batched.random_erasing, scale=(0.5, 0.1)), "smaller number"),
        (partial(mixing.mixup, alpha=0), "alpha is 0"),
        (partial(mixing.cutmix, alpha=-1), "alpha is -1"),
        (partial(mixing.mixup_or_cutmix, p_cutmix=3), "p_cutmix is 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(transform, message):
    with pytest.raises(InputError, match=message):
        jax.jit(transform)(np.zeros((2, 4, 4, 1), np.float32), jax.random.key(0))
