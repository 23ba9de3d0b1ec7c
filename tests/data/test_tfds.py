import pathlib
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

import main
from cvjax.data.loader import Loader
from cvjax.data.sources.tfds import Tfds
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
    with pytest.raises(InputError) as caught:
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
