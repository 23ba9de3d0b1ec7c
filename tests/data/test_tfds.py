import logging
import pathlib
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

import cvjax.data.sources.tfds as tfds_sources
import main
from cvjax.data.loader import Loader
from cvjax.data.sources.tfds import Tfds, TfdsDetection
from cvjax.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")


def picture(i):
    return np.full((4, 5, 3), i, np.uint8)


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Five images that nobody has to download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 5, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        # Pillow images: arrays would be encoded by TensorFlow.
        for i in range(5):
            yield i, {"image": Image.fromarray(picture(i)), "label": i % 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    TinyPictures(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def test_a_prepared_dataset_is_read_without_tensorflow(data_dir):
    before = "tensorflow" in sys.modules  # Another test may have needed it.
    source = Tfds("tiny_pictures", data_dir=data_dir)
    assert len(source) == 5 and source.class_names == ("even", "odd")
    for one in (source, pickle.loads(pickle.dumps(source))):
        records = sorted((one[i] for i in range(5)), key=lambda record: record["image"].max())
        for i, record in enumerate(records):
            np.testing.assert_array_equal(record["image"], picture(i))
            assert record["image"].dtype == np.uint8
            assert record["label"] == i % 2 and record["label"].dtype == np.int32
    assert ("tensorflow" in sys.modules) == before


def test_parts_of_a_split_other_keys_and_worker_processes(data_dir):
    assert len(Tfds("tiny_pictures:1.0.0", split="train[:40%]", data_dir=data_dir)) == 2
    assert set(Tfds("tiny_pictures", data_dir=data_dir, label_key=None)[0]) == {"image"}
    loader = Loader(Tfds("tiny_pictures", data_dir=data_dir), 5, epochs=1, processes=1)
    (batch,) = loader.iterate()
    assert sorted((batch["image"][:, 0, 0, 0] * 255).round()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "mnist"}, r"mnist is not prepared here; .*tfds.builder\('mnist', data_dir='"),
        ({"name": "tiny_pictures:2.0.0"}, "tiny_pictures:2.0.0 is not prepared"),
        ({"name": "tiny_pictures", "split": "tset"}, r"split='tset' of tiny_pictures: .*train"),
        ({"name": "tiny_pictures", "image_key": "picture"}, "no feature 'picture'"),
        ({"name": "tiny_pictures", "label_key": "lable"}, "did you mean label"),
    ],
)
def test_datasets_that_cannot_be_used(data_dir, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        Tfds(**fields, data_dir=data_dir)
    assert "\n" not in str(caught.value)


def test_the_command_in_the_message_is_python(data_dir):
    with pytest.raises(InputError, match="mnist is not prepared here") as caught:
        Tfds("mnist", data_dir=data_dir)
    command = str(caught.value).split('python -c "')[1].removesuffix('"')
    compile(command, "command", "exec")
    assert "file_format='array_record').download_and_prepare()" in command


def test_a_dataset_in_another_format_says_how_to_prepare_it(data_dir, monkeypatch):
    def refuse(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", refuse)
    with pytest.raises(InputError, match=r"not as ArrayRecord files; .*array_record"):
        Tfds("tiny_pictures", data_dir=data_dir)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'cvjax\[tfds\]'"):
        Tfds("mnist")


def test_mock_data(data_dir):
    """What TensorFlow Datasets offers for tests, random records, is a source as it is."""
    with tfds.testing.mock_data(num_examples=7, data_dir=data_dir):
        source = tfds.data_source("tiny_pictures", data_dir=data_dir)["train"]
        batch = next(Loader(source, 4, seed=1).iterate())
    assert len(source) == 7 and batch["image"].shape == (4, 4, 5, 3) and batch["valid"].all()
    assert batch["image"].dtype == np.float32
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1


def test_a_prepared_dataset_under_main(data_dir, tmp_path, capfd):
    """Two classes of 4 x 5 colour pictures, by flags alone, trained and as data path."""
    sets = [
        flag
        for name in ("train", "test")
        for flag in (
            f"--config.data.{name}.type=data.sources.tfds.Tfds",
            f"--config.data.{name}.name=tiny_pictures",
            f"--config.data.{name}.data_dir={data_dir}",
            f"--config.data.{name}.split=train",
        )
    ]
    config = pathlib.Path(__file__).parents[2] / "configs/classification.py"
    flags = [f"--config={config}:tiny", f"--workdir={tmp_path / 'run'}", *sets]
    assert main.main([*flags, "--config.task.type=train.noop.NoOp"]) == 0
    assert "examples/s" in capfd.readouterr().err and not (tmp_path / "run").exists()
    assert main.main([*flags, "--config.task.model.num_classes=2"]) == 0
    assert (tmp_path / "run/metrics.jsonl").exists()


def feature(**more):
    names = tfds.features.ClassLabel(names=["cat", "dog", "hen"])
    one = {"bbox": tfds.features.BBoxFeature(), "label": names, **more}
    return tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(None, None, 3)),
        "objects": tfds.features.Sequence(one),
    })  # fmt: skip


# ymin, xmin, ymax, xmax of images of 8 x 20 pixels; the numbers of objects are 0, 1 and 2.
BOXES = [(0.0, 0.25, 0.5, 1.0), (0.25, 0.0, 1.0, 0.1)]


class TinyObjects(tfds.core.GeneratorBasedBuilder):
    """Three images in the format of "coco", or of "voc"."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="coco", version="1.0.0"),
        tfds.core.BuilderConfig(name="voc", version="1.0.0"),
        tfds.core.BuilderConfig(name="bad", version="1.0.0"),
    ]  # fmt: skip

    def _info(self):
        if self.builder_config.name == "coco":
            more = {"area": np.int64, "is_crowd": np.bool_, "id": np.int64}
        else:
            more = {"is_truncated": np.bool_, "is_difficult": np.bool_}
        return tfds.core.DatasetInfo(builder=self, features=feature(**more))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            objects = []
            for k, box in enumerate(BOXES[:i]):
                if self.builder_config.name == "bad":
                    box = (0.5, 0.5, 0.5, 0.7)
                one = {"bbox": tfds.features.BBox(*box), "label": 2 - k}
                if self.builder_config.name == "coco":
                    one |= {"area": 7 + k, "is_crowd": k == 1, "id": k}
                else:
                    one |= {"is_truncated": True, "is_difficult": k == 1}
                objects.append(one)
            image = Image.fromarray(np.full((8, 20, 3), i + 1, np.uint8))
            yield i, {"image": image, "objects": objects}


@pytest.fixture(scope="module")
def objects_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("objects")
    for name in ("coco", "voc", "bad"):
        TinyObjects(config=name, data_dir=path, file_format="array_record").download_and_prepare()
    return path


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_boxes_of_a_prepared_dataset(objects_dir, kind):
    source = TfdsDetection(f"tiny_objects/{kind}", data_dir=objects_dir, max_instances=3)
    assert len(source) == 3 and source.class_names == ("cat", "dog", "hen")
    for one in (source, pickle.loads(pickle.dumps(source))):
        records = sorted((one[i] for i in range(3)), key=lambda record: record["image"].max())
        for i, record in enumerate(records):
            assert record["image"].shape == (8, 20, 3) and (record["image"] == i + 1).all()
            assert record["box_valid"].tolist() == [k < i for k in range(3)]
            # 8 high, 20 wide: y and x change places.
            expected = np.array([[5, 0, 20, 4], [0, 2, 2, 8], [0, 0, 0, 0]], np.float32)
            expected[i:] = 0
            np.testing.assert_allclose(record["boxes"], expected, rtol=1e-6)
            assert record["box_label"].tolist() == ([2, 1, 0] if i == 2 else [2 * (i > 0), 0, 0])
            is_second = [False, i == 2, False]
            for name, is_there in (("crowd", "coco"), ("ignore", "voc")):
                assert record[name].tolist() == (is_second if kind == is_there else 3 * [False])
            areas = [7, 8] if kind == "coco" else [60, 12]
            np.testing.assert_allclose(record["area"][:i], areas[:i], rtol=1e-6)
    batch = next(Loader(source, 3).iterate())
    assert batch["boxes"].shape == (3, 3, 4) and batch["image"].shape == (3, 8, 20, 3)


@pytest.mark.parametrize("options", [{}, dict(first_pixel=1), dict(first_pixel=0)])
def test_the_first_pixel_of_voc_is_one(objects_dir, options, monkeypatch):
    """TFDS divides xmin and ymin as they stand in VOC's files, where the first pixel is 1."""
    opened = tfds_sources._open
    monkeypatch.setattr(tfds_sources, "_open", lambda _, *rest: opened("tiny_objects/voc", *rest))
    source = TfdsDetection("voc/2007", data_dir=objects_dir, max_instances=3, **options)
    (full,) = (one for one in (source[i] for i in range(3)) if one["image"].max() == 3)
    first = options.get("first_pixel", 1)
    expected = [[5 - first, -first, 20, 4], [-first, 2 - first, 2, 8]]
    np.testing.assert_allclose(full["boxes"][:2], expected, rtol=1e-6)
    with pytest.raises(InputError, match="first_pixel is 2; it must be 0, 1 or None"):
        TfdsDetection("voc/2007", data_dir=objects_dir, first_pixel=2)


def test_boxes_are_scaled_counted_and_checked(objects_dir, caplog):
    options = dict(data_dir=objects_dir, image_size=10, max_instances=1)
    source = TfdsDetection("tiny_objects/coco", **options)
    with caplog.at_level(logging.WARNING, "cvjax"):
        records = [source[i] for i in range(3)]
    assert {record["image"].shape for record in records} == {(10, 10, 3)}
    (full,) = (record for record in records if record["image"].max() == 3)
    np.testing.assert_allclose(full["boxes"], [[2.5, 0, 10, 2]], rtol=1e-6)
    np.testing.assert_allclose(full["area"], [7 / 4], rtol=1e-6)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "tiny_objects/coco (train): 1 images have more than max_instances=1 objects" in said
    bad = TfdsDetection("tiny_objects/bad", data_dir=objects_dir)
    number = next(i for i in range(3) if bad._data[i]["image"].max() == 2)
    with pytest.raises(InputError, match=rf"record {number}, object 0: its box .* has no area"):
        bad[number]
    skipping = TfdsDetection("tiny_objects/bad", data_dir=objects_dir, on_bad="skip")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cvjax"):
        records = [skipping[i] for i in [0, 1, 2, 0, 1, 2]]
    assert not any(record["box_valid"].any() for record in records)
    assert len(skipping.skipped) == 3, "each is listed once"
    assert any(f"record {number}, object 0: its box" in line for line in skipping.skipped)
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == [
        f"tiny_objects/bad (train): {count} are bad and left out:" for count in (1, 2)
    ]
    with pytest.raises(InputError, match="on_bad is 'skp'; it can be"):
        TfdsDetection("tiny_objects/bad", data_dir=objects_dir, on_bad="skp")
    with pytest.raises(InputError, match="max_instances is 0"):
        TfdsDetection("tiny_objects/coco", data_dir=objects_dir, max_instances=0)


def test_a_dataset_without_boxes(data_dir):
    with pytest.raises(InputError, match="tiny_pictures has no feature 'objects'"):
        TfdsDetection("tiny_pictures", data_dir=data_dir)
