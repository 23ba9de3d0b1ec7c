"""The evaluator of generated images, with a small classifier in place of a trained one."""

import copy
import functools
import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike
from PIL import Image

from cvjax.build import build
from cvjax.data.sources.arrays import Arrays
from cvjax.errors import InputError
from cvjax.evaluation import frechet_distance, nearest_distances
from cvjax.evaluation.extractor import Extractor
from cvjax.evaluation.samples import Real, SampleQuality, real_features
from cvjax.nn.inception import InceptionV3
from experiments.frechet import run as frechet

SIDE = 4


class Tiny(nn.Module):
    """A convolution whose mean output is both the features and, times a matrix, the logits."""

    channels: int = 3
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.conv = nn.Conv(self.channels, (3, 3), dtype=self.dtype)
        self.head = nn.Dense(2, dtype=self.dtype)

    def features(self, x, *, train=False):
        return {"early": x, "late": nn.relu(self.conv(x))}

    def __call__(self, x, *, train=False):
        return self.head(self.features(x)["late"].mean((1, 2)))


def seeded(params, state, seed):
    """Weights by seed, for `initialize`; biased so that features differ."""
    rng = np.random.default_rng(seed)
    fresh = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)  # noqa: E731
    leaves = {layer: {n: fresh(x) for n, x in of.items()} for layer, of in params["model"].items()}
    return {"model": leaves}, state, "table"


@pytest.fixture(scope="module")
def extractor():
    return Extractor("toy", Tiny(), functools.partial(seeded, seed=0), (SIDE, SIDE, 1))


def source(count, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, SIDE, SIDE, 1), np.uint8)
    return Arrays({"image": images, "label": rng.integers(0, 2, count).astype(np.int32)})


def all_of(records):
    return np.stack([records[i]["image"] for i in range(len(records))])


def test_features_are_the_mean_of_the_last_map(extractor):
    images = all_of(source(230))
    features, probabilities = extractor(images)
    variables = extractor.variables
    x = (images / 255 - 0.5) / 0.5
    late = Tiny().apply(variables, x, method="features")["late"]
    np.testing.assert_allclose(features, late.mean((1, 2)), rtol=1e-5, atol=1e-6)
    logits = np.asarray(Tiny().apply(variables, x), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
    np.testing.assert_allclose(extractor(images / 255)[0], features, rtol=1e-5)
    np.testing.assert_allclose(extractor(images[3:4])[0][0], features[3], rtol=1e-5)
    # Images of another size are scaled: a larger one of one colour has the features of a small one.
    flat = np.full((1, SIDE, SIDE, 1), 51, np.uint8)
    larger = np.full((1, 3 * SIDE, 2 * SIDE, 1), 51, np.uint8)
    np.testing.assert_allclose(extractor(flat)[0], extractor(larger)[0], rtol=1e-5)


def test_fingerprint_is_of_all_that_matters(extractor):
    make = lambda seed=0, **fields: Extractor(  # noqa: E731
        **{"name": "toy", "model": Tiny(), "image_shape": (SIDE, SIDE, 1)} | fields,
        initialize=functools.partial(seeded, seed=seed),
    )
    prints = [make().fingerprint()] + [
        other.fingerprint()
        for other in (make(seed=1), make(name="b"), make(mean=0.4), make(model=Tiny(4)))
    ]
    assert len(set(prints)) == 5 and extractor.fingerprint() == prints[0]


def test_real_features_are_kept_until_something_changes(extractor, tmp_path, monkeypatch):
    calls = []
    call = Extractor.__call__
    monkeypatch.setattr(
        Extractor, "__call__", lambda self, x: (calls.append(len(x)), call(self, x))[1]
    )
    first = real_features(extractor, source(20), tmp_path)
    again = real_features(extractor, source(20), tmp_path)
    assert calls == [20] and len(list(tmp_path.iterdir())) == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    other = Extractor("toy", Tiny(), functools.partial(seeded, seed=1), (SIDE, SIDE, 1))
    assert not np.allclose(real_features(other, source(20), tmp_path).features, first.features)
    real_features(extractor, source(20, seed=1), tmp_path)
    assert calls == [20, 20, 20] and len(list(tmp_path.iterdir())) == 3
    for file in tmp_path.iterdir():  # all damaged: made anew, and no unfinished file is left
        file.write_bytes(file.read_bytes()[:100])
    repaired = real_features(extractor, source(20), tmp_path)
    np.testing.assert_array_equal(repaired.features, first.features)
    assert calls == [20] * 4 and all(one.match("toy-*.npz") for one in tmp_path.iterdir())
    real_features(extractor, source(20), None)
    assert calls == [20] * 5
    for file in tmp_path.iterdir():  # the others are too short; a bit that says it is encrypted
        content = bytearray(file.read_bytes())
        if len(content) == 100:
            continue
        content[content.index(b"PK\1\2") + 8] ^= 1
        file.write_bytes(content)
    repaired = real_features(extractor, source(20), tmp_path)
    np.testing.assert_array_equal(repaired.features, first.features)


def test_features_in_half_precision_are_kept_too(tmp_path):
    make = functools.partial(seeded, seed=0)
    half = Extractor("toy", Tiny(dtype=jnp.bfloat16), make, (SIDE, SIDE, 1))
    first, again = (real_features(half, source(20), tmp_path) for _ in range(2))
    for one, other in zip(first[1:3], again[1:3], strict=True):
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_a_write_that_fails_leaves_no_half_file(extractor, tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        real_features(extractor, source(20), tmp_path)
    assert not list(tmp_path.iterdir())


def test_scores_of_real_images_are_their_own_floor(extractor):
    train, held_out = source(60), source(30, seed=1)
    quality = SampleQuality(extractor, train, held_out, neighbours=3)
    mine = copy.deepcopy(quality)  # as `fit` does for each evaluation
    assert mine.extractor is extractor
    images = all_of(held_out) / np.float32(255)
    labels = np.array([held_out[i]["label"] for i in range(30)])
    for part, valid in ((slice(0, 20), 20), (slice(20, 30), 10)):
        padded = np.concatenate([images[part], np.full((3, SIDE, SIDE, 1), np.nan)])
        names = np.concatenate([labels[part], [7, 7, 7]])
        mine.add({"sample": padded, "label": names}, {"valid": np.arange(valid + 3) < valid})
    found = mine.result()
    assert not quality.images and list(quality.floors) == [30]  # for the next evaluation
    assert mine.train is quality.train
    for name in ("FD-toy", "KD-toy", "precision", "recall", "score", "agreement", "nearest"):
        assert found[name] == pytest.approx(found[f"{name}_real"], rel=1e-4, abs=1e-5), name
    assert found["count"] == found["count_real"] == 30
    # By hand: features of mean variance 1, and the nearest of 60 images by a loop.
    real, fake = (extractor(all_of(s))[0].astype(float) for s in (train, held_out))
    scale = np.sqrt(real.var(0).mean())
    assert found["FD-toy"] == pytest.approx(frechet_distance(real / scale, fake / scale), rel=1e-4)
    loops = [np.linalg.norm(all_of(train) / 255 - x, axis=(1, 2)).min() for x in images]
    assert found["nearest"] == pytest.approx(np.median(loops), rel=1e-5)
    # Of the Inception network's classes no label says anything.
    fid = copy.copy(quality)
    fid.extractor = types.SimpleNamespace(is_fid=True, name="inception")
    some = Real(images, *extractor(images), labels)
    assert "agreement" in quality._compare(some) and "agreement" not in fid._compare(some)
    wrong = quality.score(images, 1 - labels)
    assert wrong["agreement"] == pytest.approx(1 - found["agreement"])
    assert wrong["agreement_real"] == found["agreement_real"]


def test_the_floor_is_of_all_classes_where_one_comes_after_the_other(extractor):
    """As in folders of classes: the first ones would be of one class."""
    images = np.concatenate([np.full((40, SIDE, SIDE, 1), v, np.uint8) for v in (10, 240)])
    images += np.random.default_rng(0).integers(0, 10, images.shape, np.uint8)
    held_out = Arrays({"image": images, "label": np.repeat([0, 1], 40).astype(np.int32)})
    quality = SampleQuality(extractor, source(60), held_out, neighbours=3)
    labels = []
    compare = quality._compare
    quality._compare = lambda some: labels.append(some.labels) or compare(some)
    quality.score(images[::4], np.repeat([0, 1], 10))
    assert 5 <= labels[1].sum() <= 15 and len(labels[1]) == 20


def test_copies_and_collapse_show(extractor):
    train, held_out = source(60), source(30, seed=1)
    quality = SampleQuality(extractor, train, held_out, neighbours=3)
    copies = quality.score(all_of(train)[:30])
    assert copies["nearest"] == 0 < copies["nearest_real"] and "agreement" not in copies
    one = quality.score(np.repeat(all_of(held_out)[:1], 30, 0))
    assert one["classes"] == 1 and one["score"] == pytest.approx(1, abs=1e-6)
    assert one["FD-toy"] > 3 * one["FD-toy_real"] and one["recall"] < 0.2


def test_nearest_distances():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(300, 5)), rng.normal(size=(270, 5))  # more than one part
    loops = [np.linalg.norm(real - x, axis=1).min() for x in fake]
    np.testing.assert_allclose(nearest_distances(real, fake), loops, rtol=1e-9)
    np.testing.assert_allclose(nearest_distances(real, real[:3]), 0, atol=1e-6)


def test_a_config_makes_the_extractor_with_weights_from_a_file(extractor, tmp_path):
    arrays = {"/".join(path): np.asarray(x) for path, x in flatten(extractor.variables).items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    config = {
        "type": "evaluation.extractor.Extractor",
        "name": "toy",
        "model": {"type": "tests.evaluation.test_samples.Tiny"},
        "initialize": {
            "type": "nn.pretrained.load_pretrained", "path": str(tmp_path / "weights.npz")
        },
        "image_shape": (SIDE, SIDE, 1),
    }  # fmt: skip
    built = build(config)
    images = all_of(source(10))
    for one, other in zip(built(images), extractor(images), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    # A head of other classes, as torchvision's Inception has for the FID, would be a random one.
    arrays["params/head/kernel"] = np.zeros((3, 5), np.float32)
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(InputError, match=r"all weights of the model, but of params/head/kernel"):
        build(config)


def flatten(tree, path=()):
    if not hasattr(tree, "items"):
        return {path: tree}
    return {k: v for key, below in tree.items() for k, v in flatten(below, (*path, key)).items()}


def test_what_cannot_be_is_said(extractor, tmp_path):
    quality = SampleQuality(extractor, source(20), source(20, 1))
    images = all_of(source(20))
    with pytest.raises(InputError, match="values from 0 to 255"):
        quality.score(images.astype(np.float32))
    with pytest.raises(InputError, match="values from nan to nan"):
        quality.score(images * np.nan)
    with pytest.raises(InputError, match=r"images are \[2, 4, 1\], real ones \[4, 4, 1\]"):
        quality.score(images[:, :2])
    with pytest.raises(InputError, match="FID is of the Inception network alone"):
        Extractor("FID", Tiny(), seeded)
    with pytest.raises(InputError, match="have 3 channels; features 'toy' are of 1"):
        extractor(np.repeat(images, 3, -1))
    with pytest.raises(InputError, match=r"the task predicts latent; output='sample'"):
        quality.add({"latent": images}, {"valid": np.ones(20, bool)})
    for few in (0, 4):
        message = f"there are {few} images; with neighbours=5 there must be at least 6"
        with pytest.raises(InputError, match=message):
            quality.score(images[:few])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cache .*file/cache' cannot be made"):
        SampleQuality(extractor, source(20), source(20), tmp_path / "file" / "cache")
    with pytest.raises(InputError, match="std is 0; images are divided by it"):
        Extractor("toy", Tiny(), functools.partial(seeded, seed=0), std=0)
    with pytest.raises(InputError, match=r"label, .* extractor 'toy', is 999"):
        quality.score(images, np.full(20, 999))
    with pytest.raises(InputError, match=r"labels are \[19\]; they must be \[20\]"):
        quality.score(images, np.zeros(19, int))
    images, labels = images[:8], np.zeros(8, int)
    records = [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)]
    for field in ("image", "label"):
        some = [*records[:7], {name: x for name, x in records[7].items() if name != field}]
        with pytest.raises(InputError, match=f"record 7 of the real images has no field {field}"):
            real_features(extractor, some, None)
    with pytest.raises(InputError, match="is a file; it must be a folder"):
        real_features(extractor, records, __file__)
    with pytest.raises(InputError, match="no images were added"):
        quality.result()
    with pytest.raises(InputError, match="there are 5 held-out images; with neighbours=5"):
        SampleQuality(extractor, source(20), source(5))
    with pytest.raises(InputError, match="neighbours is 0; it must be a whole number, at least 1"):
        SampleQuality(extractor, source(20), source(20), neighbours=0)
    with pytest.raises(InputError, match="the source is empty"):
        SampleQuality(extractor, source(20), [])
    small = [{"image": source(20)[i]["image"][1:]} for i in range(20)]
    with pytest.raises(InputError, match="held-out ones .* must be alike"):
        SampleQuality(extractor, source(20), small)


def test_only_the_network_of_the_fid_says_fid(monkeypatch):
    monkeypatch.setattr(InceptionV3, "init", lambda self, *args: {"params": {}})
    keep = lambda params, state: (params, state, "")  # noqa: E731
    seen = (299, 299, 3)
    assert Extractor("x", InceptionV3(), keep, seen).name == "inception"
    for model, fields in (
        (InceptionV3(), dict(image_shape=(80, 80, 3))), (InceptionV3(), dict(mean=0.0)),
        (InceptionV3(num_classes=10), {}), (InceptionV3(variant="torchvision"), {}),
    ):  # fmt: skip
        one = Extractor("x", model, keep, **{"image_shape": seen, **fields})
        assert one.name == "x" and not one.is_fid
    other = Extractor("torchvision", InceptionV3(variant="torchvision"), keep)
    assert other.name == "torchvision" and not other.is_fid


def test_images_of_a_folder(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
    for number, picture in enumerate(pictures):
        for folder in (tmp_path / "flat", tmp_path / "classes" / str(number % 2)):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{number}.png")
    images, labels = frechet.images_in(tmp_path / "flat", 1)
    np.testing.assert_array_equal(images[..., 0], pictures)
    assert labels is None
    for classes, expected in ((("1", "5", "0"), [2, 2, 0, 0]), (("1", "2"), None), ((), None)):
        images, labels = frechet.images_in(tmp_path / "classes", 3, classes)
        np.testing.assert_array_equal(images[..., 2], pictures[[0, 2, 1, 3]])
        assert labels is None if expected is None else labels.tolist() == expected
    (tmp_path / "mixed" / "0").mkdir(parents=True)
    with pytest.raises(InputError, match="0 has no images"):
        frechet.images_in(tmp_path / "mixed", 1)
    Image.fromarray(pictures[0]).save(tmp_path / "mixed" / "0.png")
    with pytest.raises(InputError, match="has images and folders, '0' say"):
        frechet.images_in(tmp_path / "mixed", 1)
    with pytest.raises(InputError, match="there is no folder .*0.png"):
        frechet.images_in(tmp_path / "mixed" / "0.png", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no images"):
        frechet.images_in(tmp_path / "empty", 1)
    # Grey levels of 16 bits are those of `Folder`, and hidden files are no images.
    (tmp_path / "deep").mkdir()
    Image.fromarray(pictures[0].astype(np.uint16) * 257).save(tmp_path / "deep" / "0.png")
    (tmp_path / "deep" / "._0.png").write_bytes(b"no picture")
    images, _ = frechet.images_in(tmp_path / "deep", 1)
    np.testing.assert_array_equal(images[0, ..., 0], pictures[0])
    Image.fromarray(pictures[0, :3]).save(tmp_path / "flat" / "9.png")
    with pytest.raises(InputError, match="must all have one size"):
        frechet.images_in(tmp_path / "flat", 1)
    (tmp_path / "flat" / "8.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"8.png cannot be read"):
        frechet.images_in(tmp_path / "flat", 1)
    wrong = {
        "--inceptoin=weights.pth": r"no such flag \(did you mean --inception",
        "--config.task.guidance": "has no value; write --config.task.guidance=...",
    }
    for flag, message in wrong.items():
        with pytest.raises(InputError, match=f"{flag}:? {message}"):
            frechet.main_of([f"--images={tmp_path / 'flat'}", flag])
    with pytest.raises(InputError, match="--config.seed changes a run"):
        frechet.main_of([f"--images={tmp_path / 'flat'}", "--config.seed=1"])


def test_real_images_become_as_large_as_those_that_are_scored(tmp_path, extractor, monkeypatch):
    rng = np.random.default_rng(0)
    for name, side in (("train", 9), ("test", 7), ("fake", SIDE)):
        (tmp_path / name / "class").mkdir(parents=True)
        for number in range(8):
            picture = rng.integers(0, 256, (side, side + side % 2, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / name / "class" / f"{number}.png")
    colour = Extractor("toy", Tiny(), functools.partial(seeded, seed=0), (SIDE, SIDE, 3))
    monkeypatch.setattr(frechet, "judge", lambda *_: colour)
    folders = [f"--{flag}={tmp_path / name}" for flag, name in
               (("train", "train"), ("held_out", "test"), ("images", "fake"))]  # fmt: skip
    found = frechet.main_of([*folders, f"--cache={tmp_path / 'cache'}"])
    assert found["count"] == found["count_real"] == 8 and np.isfinite(found["FD-toy"])
