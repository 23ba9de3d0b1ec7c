"""Readers of images with masks, and the archive that is unpacked once."""

import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from cvjax.data import archive
from cvjax.data.archive import unpack_once
from cvjax.data.loader import Loader
from cvjax.data.sources import example_id
from cvjax.data.sources.masks import Masks, PairReader
from cvjax.data.sources.voc import VOC_CLASSES, VocSegmentation
from cvjax.errors import InputError

ROOT = Path(__file__).parents[2]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def classes(height, width, seed=0):
    values = np.array([0, 1, 15, 20, 255], np.uint8)
    return np.random.default_rng(seed).choice(values, size=(height, width))


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image = image.copy()
        image.putpalette(np.random.default_rng(1).integers(256, size=768, dtype=np.uint8).tobytes())
        assert image.mode == "P"
    image.save(path, **options)


SIZES = {"2007_000032": (9, 12), "2007_000039": (12, 9), "2007_000063": (10, 10)}


def make_voc(root, names=SIZES):
    for seed, name in enumerate(names):
        save(root / "JPEGImages" / f"{name}.jpg", picture(*SIZES[name], seed), quality=95)
        save(root / "SegmentationClass" / f"{name}.png", classes(*SIZES[name], seed), "P")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    first, *rest = names
    (lists / "train.txt").write_text("\n".join(rest) + "\n\n")
    (lists / "val.txt").write_text(f"{first} \r\n")
    return root


def make_archive(path, mode="w"):
    root = make_voc(path.parent / "content" / "VOCdevkit" / "VOC2012")
    with tarfile.open(path, mode) as file:
        file.add(root.parent, "VOCdevkit")
    return path


@pytest.fixture
def extractions(monkeypatch):
    """How often an archive was unpacked."""
    calls, extract = [], tarfile.TarFile.extractall

    def counted(self, *arguments, **options):
        calls.append(self.name)
        return extract(self, *arguments, **options)

    monkeypatch.setattr(tarfile.TarFile, "extractall", counted)
    return calls


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# VOC


def test_voc_masks_are_the_palette_indices(tmp_path):
    root = make_voc(tmp_path / "VOC2012")
    source = VocSegmentation(root)
    assert len(source) == 2 and example_id(source, 0) == "2007_000039"
    for number, seed in ((0, 1), (1, 2)):
        record = source[number]
        size = list(SIZES.values())[seed]
        assert record["image"].shape == (*size, 3) and record["image"].dtype == np.uint8
        assert record["mask"].dtype == np.uint8
        np.testing.assert_array_equal(record["mask"], classes(*size, seed))
    assert [example_id(VocSegmentation(root, "val"), 0)] == ["2007_000032"]
    assert source.class_names == VOC_CLASSES and len(VOC_CLASSES) == 21
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[1]["mask"], source[1]["mask"])


def test_lists_of_voc_with_a_second_column_a_mark_of_utf_8_and_spaces_in_names(tmp_path):
    root = make_voc(tmp_path)
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        file = root / folder / f"2007_000032.{suffix}"
        file.rename(file.with_stem("a street"))
    text = "\ufeffa street  -1\n2007_000039 1\n"
    (root / "ImageSets" / "Segmentation" / "dog_val.txt").write_text(text, "utf-8")
    source = VocSegmentation(root, "dog_val")
    assert [example_id(source, i) for i in range(2)] == ["a street", "2007_000039"]
    # A name that ends as such a column does.
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        file = root / folder / f"a street.{suffix}"
        file.with_stem("a street 1").write_bytes(file.read_bytes())
    text = "a street\na street 1\na street 1  -1\na street 0\n"
    (root / "ImageSets" / "Segmentation" / "dog_val.txt").write_text(text, "utf-8")
    source = VocSegmentation(root, "dog_val")
    names = ["a street", "a street 1", "a street 1", "a street"]
    assert [example_id(source, i) for i in range(4)] == names


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012", "TrainVal/VOCdevkit/VOC11"])
def test_voc_is_found_below_the_path(tmp_path, below):
    make_voc(tmp_path / below)
    assert len(VocSegmentation(tmp_path)) == 2


def test_voc_sets_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        VocSegmentation(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no ImageSets/Segmentation"):
        VocSegmentation(tmp_path)
    root = make_voc(tmp_path / "VOC2012")
    with pytest.raises(InputError, match=r"split='trian' .*did you mean train"):
        VocSegmentation(root, "trian")
    (root / "JPEGImages" / "2007_000039.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of the 2 files .*2007_000039.jpg"):
        VocSegmentation(root)
    (root / "ImageSets" / "Segmentation" / "none.txt").write_text("\n")
    with pytest.raises(InputError, match="names no images"):
        VocSegmentation(root, "none")
    make_voc(tmp_path / "VOC2007")
    with pytest.raises(InputError, match="has several sets"):
        VocSegmentation(tmp_path)


def test_pairs_are_padded_or_scaled_to_one_size(tmp_path):
    root = make_voc(tmp_path / "VOC2012")
    plain, padded = VocSegmentation(root), VocSegmentation(root, pad_to=12)
    for i in range(2):
        h, w = plain[i]["mask"].shape
        record = padded[i]
        np.testing.assert_array_equal(record["image"][:h, :w], plain[i]["image"])
        np.testing.assert_array_equal(record["mask"][:h, :w], plain[i]["mask"])
        outside = np.ones((12, 12), bool)
        outside[:h, :w] = False
        assert (record["mask"][outside] == 255).all() and not record["image"][outside].any()
    batch = next(Loader(padded, 2).iterate())
    assert batch["image"].dtype == np.float32 and batch["image"].max() <= 1
    assert batch["mask"].dtype == np.uint8 and batch["mask"].shape == (2, 12, 12)
    with pytest.raises(ValueError, match=r"9 x 12 pixels, more than pad_to=11"):
        VocSegmentation(root, pad_to=11)[0]
    with pytest.raises(InputError, match="give only one"):
        VocSegmentation(root, pad_to=11, image_size=4)

    scaled = VocSegmentation(root, image_size=6)[0]
    assert scaled["image"].shape == (6, 6, 3) and scaled["mask"].shape == (6, 6)
    assert set(np.unique(scaled["mask"])) <= {0, 1, 15, 20, 255}


def test_scaling_keeps_the_mask_on_the_image(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 24:44] = 7
    save(tmp_path / "images" / "a.png", (mask[..., None] > 0) * np.full(3, 255, np.uint8))
    save(tmp_path / "masks" / "a.png", mask)
    record = Masks(tmp_path, image_size=20)[0]
    # The edges lie between the pixels of both: what is bright is what is labelled.
    np.testing.assert_array_equal(record["image"][..., 0] > 127, record["mask"] == 7)


def test_the_archive_of_voc_as_the_data_of_a_run(tmp_path, monkeypatch, capfd, extractions):
    monkeypatch.chdir(tmp_path)
    make_archive(tmp_path / "VOCtrainval.tar")
    flags = [f"--config={ROOT / 'configs/segmentation.py'}:tiny"]
    flags.append("--config.task.type=train.noop.NoOp")
    for data in ("--config.data.train", "--config.data.test"):
        flags += [
            f"{data}.type=data.sources.voc.VocSegmentation", f"{data}.split=train",
            f"{data}.path={tmp_path / 'VOCtrainval.tar'}", f"{data}.image_size=9",
        ]  # fmt: skip
    assert main.main(flags) == 0
    assert "waited for data" in capfd.readouterr().err
    assert len(extractions) == 1


# The archive


def test_the_folder_of_an_archive_is_named_after_it():
    for name, folder in {
        "VOC.tar": "VOC",
        "VOC.tar.gz": "VOC",
        "VOC.tgz": "VOC",
        "my.target.tar": "my.target",
        "my.tar.photos.tar.xz": "my.tar.photos",
        "my.target": "my.target-unpacked",
        ".tar": ".tar-unpacked",
    }.items():
        assert archive._beside(Path("a") / name) == Path("a") / folder


@pytest.mark.parametrize("mode, name", [("w", "VOC.tar"), ("w:gz", "VOC.tar.gz"), ("w:xz", "VOC")])
def test_an_archive_is_unpacked_once_and_never_again(tmp_path, mode, name, extractions):
    path = make_archive(tmp_path / "data" / name, mode)
    folder = tmp_path / "data" / ("VOC" if "." in name else "VOC-unpacked")
    for _ in range(3):
        source = VocSegmentation(path)
    assert len(extractions) == 1
    assert (folder / archive.MARKER).is_file()
    made = make_voc(tmp_path / "made")
    np.testing.assert_array_equal(source[0]["mask"], VocSegmentation(made)[0]["mask"])
    assert not [other for other in names_in(path.parent) if "unpacking" in other]

    path.unlink()  # It is not needed any more.
    assert len(VocSegmentation(path)) == 2 and len(extractions) == 1


def test_processes_that_come_together_unpack_once(tmp_path):
    path = make_archive(tmp_path / "VOC.tar")
    code = (
        "import sys, tarfile, time; from cvjax.data.archive import unpack_once\n"
        "extract = tarfile.TarFile.extractall\n"
        "def slow(*a, **k): print('unpacking'); time.sleep(0.5); extract(*a, **k)\n"
        "tarfile.TarFile.extractall = slow\n"
        "print(len(list(unpack_once(sys.argv[1]).rglob('*.png'))))"
    )
    run = [sys.executable, "-c", code, str(path)]
    started = [subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=60)[0].split() for process in started]
    assert sorted(printed) == [["3"], ["3"], ["unpacking", "3"]]


@pytest.mark.parametrize("member", [1, 5, 9])
def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_whole(tmp_path, member, extractions):
    path = make_archive(tmp_path / "data" / "VOC.tar")
    code = (
        "import os, signal, sys, tarfile; from cvjax.data.archive import unpack_once\n"
        "one, count = tarfile.TarFile._extract_one, 0\n"
        "def killed(*a, **k):\n"
        "    global count; count += 1; one(*a, **k)\n"
        f"    if count == {member}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tarfile.TarFile._extract_one = killed\n"
        "unpack_once(sys.argv[1])"
    )
    died = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "data" / "VOC").exists()
    assert ".VOC.unpacking" in names_in(path.parent), "it was in the middle"
    source = VocSegmentation(path)
    assert len(source) == 2 and len(extractions) == 1 and source[1]["mask"].shape == (10, 10)
    assert ".VOC.unpacking" not in names_in(path.parent)


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    path = make_archive(tmp_path / "data" / "VOC.tar")
    one, members = tarfile.TarFile._extract_one, []

    def interrupted(*arguments, **options):
        members.append(one(*arguments, **options))
        if len(members) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "_extract_one", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack_once(path)
    left = names_in(path.parent)
    assert left == [".VOC.lock", "VOC.tar", "content"]
    assert len(VocSegmentation(path)) == 2


def entry(name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    info.size = len(content) if info.isreg() else 0
    return info, io.BytesIO(content)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_damaged_archive_is_not_taken_for_a_whole_one(tmp_path, kind):
    """The checksum comes last, behind what tarfile reads."""
    path, content = tmp_path / f"VOC.tar.{kind}", np.random.default_rng(0).bytes(50_000)
    with tarfile.open(path, f"w:{kind}") as file:
        file.addfile(*entry("VOC/file", content))
    whole = path.read_bytes()
    for place in (1, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(InputError, match=f"VOC.tar.{kind} cannot be unpacked") as caught:
            unpack_once(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert (unpack_once(path) / "VOC/file").read_bytes() == content


HOSTILE = {
    "above": [entry("../evil")],
    "far above": [entry("a/../../evil")],
    "link out": [entry("link", type=tarfile.SYMTYPE, linkname="/etc")],
    "through a link": [
        entry("link", type=tarfile.SYMTYPE, linkname=".."), entry("link/evil"),
    ],
    "hard link out": [entry("link", type=tarfile.LNKTYPE, linkname="../secret")],
    "device": [entry("device", type=tarfile.CHRTYPE)],
    "pipe": [entry("pipe", type=tarfile.FIFOTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    home = tmp_path / "data"
    home.mkdir()
    with tarfile.open(home / "VOC.tar", "w") as file:
        file.addfile(*entry("good"))
        for info, content in HOSTILE[name]:
            content.seek(0)
            file.addfile(info, content)
    with pytest.raises(InputError, match=r"VOC.tar is refused"):
        unpack_once(home / "VOC.tar")
    assert names_in(home) == [".VOC.lock", "VOC.tar"]
    assert names_in(tmp_path) == ["data", "secret"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_that_are_cut_off_or_damaged(tmp_path, mode):
    whole = make_archive(tmp_path / "VOC.tar", mode).read_bytes()
    step = 512 if mode == "w" else len(whole) // 10
    end = len(whole.rstrip(b"\0")) if mode == "w" else len(whole)
    for length in range(0, end - step, step * (3 if mode == "w" else 1)):
        (tmp_path / "VOC.tar").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"VOC.tar cannot be unpacked"):
            unpack_once(tmp_path / "VOC.tar")
        assert not (tmp_path / "VOC").exists()
    (tmp_path / "VOC.tar").write_text("no archive")
    with pytest.raises(InputError, match=r"VOC.tar cannot be unpacked"):
        unpack_once(tmp_path / "VOC.tar")


def test_folders_that_are_something_else(tmp_path):
    path = make_archive(tmp_path / "VOC.tar")
    (tmp_path / "VOC").mkdir()
    with pytest.raises(InputError, match="VOC is there but was not unpacked"):
        unpack_once(path)
    (tmp_path / "VOC").rmdir()
    unpack_once(path)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(InputError, match="unpacked from another archive"):
        unpack_once(path)
    assert unpack_once(path, tmp_path / "other" / "place") == tmp_path / "other" / "place"
    with pytest.raises(InputError, match="does not exist"):
        unpack_once(tmp_path / "none.tar")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot unpack into"):
        unpack_once(path, tmp_path / "file" / "below")


# Folders of masks


def make_masks(root, mode=None):
    for seed, (stem, suffix) in enumerate((("b", ".jpg"), ("a", ".png"), ("deep/c", ".PNG"))):
        save(root / "images" / f"{stem}{suffix}", picture(6, 8, seed))
        save(root / "masks" / f"{stem}.png", classes(6, 8, seed), mode)
    (root / "images" / ".hidden.png").write_text("x")
    (root / "images" / ".tool").mkdir()
    (root / "images" / ".tool" / "copy.png").write_text("x")
    (root / "masks" / "notes.txt").write_text("x")
    return root


@pytest.mark.parametrize("mode", [None, "P"])
def test_files_of_equal_names_are_pairs(tmp_path, mode):
    source = Masks(make_masks(tmp_path, mode), class_names=("ground", "thing"))
    assert len(source) == 3 and source.class_names == ("ground", "thing")
    for i, seed in enumerate((1, 0, 2)):
        np.testing.assert_array_equal(source[i]["mask"], classes(6, 8, seed))
        if seed:
            np.testing.assert_array_equal(source[i]["image"], picture(6, 8, seed))
    assert source.example_id(2) == str(tmp_path / "images" / "deep" / "c.PNG")
    assert len(pickle.loads(pickle.dumps(source))) == 3
    assert Masks(tmp_path, channels=1)[0]["image"].shape == (6, 8, 1)


def test_masks_of_two_and_of_many_levels(tmp_path):
    make_masks(tmp_path)
    two = classes(6, 8) == 0
    Image.fromarray(two).save(tmp_path / "masks" / "a.png")
    many = classes(6, 8).astype(np.uint16)
    Image.fromarray(many).save(tmp_path / "masks" / "b.png")
    source = Masks(tmp_path)
    np.testing.assert_array_equal(source[0]["mask"], two)
    np.testing.assert_array_equal(source[1]["mask"], many)
    Image.fromarray(many + 1).save(tmp_path / "masks" / "b.png")
    with pytest.raises(
        ValueError, match=r"b.png: a mask has classes in 0..255, but this has .*256"
    ):
        source[1]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_has_the_numbers_that_were_put_in(tmp_path, bits):
    """Which Pillow spreads over 0..255 when it reads them; it cannot write such files."""
    numbers = (np.arange(32) % 2**bits).reshape(2, 16).astype(np.uint8)
    planes = np.unpackbits(numbers[..., None], axis=-1)[..., -bits:].reshape(2, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in planes)
    header = struct.pack(">IIBBBBB", 16, 2, bits, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )
    (tmp_path / "mask.png").write_bytes(content)
    Image.new("RGB", (16, 2)).save(tmp_path / "image.png")
    found = PairReader().read(tmp_path / "image.png", tmp_path / "mask.png")["mask"]
    np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("is_black_zero", [0, 1])
def test_grey_of_a_tiff_has_the_numbers_that_were_put_in(tmp_path, bits, is_black_zero):
    numbers = (np.arange(32) % 2**bits).reshape(2, 16).astype(np.uint8)
    planes = np.unpackbits(numbers[..., None], axis=-1)[..., -bits:].reshape(2, -1)
    rows = b"".join(np.packbits(row).tobytes() for row in planes)
    tags = {256: 16, 257: 2, 258: bits, 259: 1}  # width, height, bits, not compressed
    tags |= {262: is_black_zero, 273: 110, 278: 2, 279: len(rows)}  # where two rows are
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "mask.tif").write_bytes(content + bytes(110 - len(content)) + rows)
    Image.new("RGB", (16, 2)).save(tmp_path / "image.png")
    found = PairReader().read(tmp_path / "image.png", tmp_path / "mask.tif")["mask"]
    np.testing.assert_array_equal(found, numbers)


def test_a_mask_is_turned_as_its_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for name in ("image", "mask"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", exif=exif)
    read = PairReader(channels=1).read(tmp_path / "image.png", tmp_path / "mask.png")
    np.testing.assert_array_equal(read["mask"], pixels[::-1, ::-1])
    np.testing.assert_array_equal(read["image"][..., 0], read["mask"])


def test_a_photograph_is_turned_upright_before_it_meets_its_mask(tmp_path):
    make_masks(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "images" / "b.jpg", picture(8, 6), exif=exif)
    assert Masks(tmp_path)[1]["image"].shape == (6, 8, 3)


def test_pairs_that_do_not_fit(tmp_path):
    make_masks(tmp_path)
    source = Masks(tmp_path)
    save(tmp_path / "masks" / "a.png", picture(6, 8))
    with pytest.raises(ValueError, match=r"masks/a.png: .*but this is RGB"):
        source[0]
    save(tmp_path / "masks" / "a.png", classes(6, 7))
    with pytest.raises(ValueError, match=r"a.png is 8 x 6 pixels, but .* is 7 x 6"):
        source[0]
    (tmp_path / "masks" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot decode .*a.png: it is no image$"):
        source[0]
    with pytest.raises(ValueError, match="max_pixels=40"):
        Masks(tmp_path, max_pixels=40)[1]
    os.unlink(tmp_path / "masks" / "a.png")
    with pytest.raises(OSError, match="a.png"):
        source[0]


def test_folders_of_masks_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="none does not exist"):
        Masks(tmp_path / "none")
    with pytest.raises(InputError, match="there must be images/ and masks/"):
        Masks(tmp_path)
    make_masks(tmp_path)
    for field in ("image_size", "pad_to"):
        with pytest.raises(InputError, match=f"{field} is 0"):
            Masks(tmp_path, **{field: 0})
    with pytest.raises(InputError, match="channels is 2"):
        Masks(tmp_path, channels=2)
    save(tmp_path / "images" / "a.jpg", picture(6, 8))
    with pytest.raises(InputError, match=r"a.jpg and .*a.png have one name"):
        Masks(tmp_path)
    (tmp_path / "images" / "a.jpg").rename(tmp_path / "images" / "d.jpg")
    with pytest.raises(
        InputError, match=r"1 files have no partner in .*masks, the first is .*d.jpg"
    ):
        Masks(tmp_path)
    (tmp_path / "images" / "d.jpg").rename(tmp_path / "masks" / "e.png")
    with pytest.raises(InputError, match=r"no partner in .*images, the first is .*e.png"):
        Masks(tmp_path)
