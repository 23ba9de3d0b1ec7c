import functools

import flax.linen as nn
import jax
import optax
import pytest
from ml_collections import ConfigDict

from cvjax.build import build
from cvjax.config import buildable, differences, load_json, override, read, save_json
from cvjax.errors import InputError
from cvjax.nn.resnet import ResNet


class Tiny(nn.Module):
    """A backbone of one's own, outside the package."""

    num_classes: int = 10
    width: int = 4

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.num_classes)(nn.Dense(self.width)(x.mean((1, 2))))


def test_a_class_is_called_and_a_function_bound():
    built = build(
        dict(
            model=dict(type="nn.resnet.ResNet", depth=34, stage_sizes=(1, 2)),
            transform=dict(type="optax.adamw", weight_decay=0.05),
            several=[dict(type="nn.resnet.ResNet"), 3],
            plain=dict(a=1),
        )
    )
    assert built["model"] == ResNet(depth=34, stage_sizes=(1, 2))
    assert isinstance(built["transform"], functools.partial)
    assert built["transform"].func is optax.adamw
    assert built["several"] == [ResNet(), 3] and built["plain"] == {"a": 1}


def test_nested_objects_are_built_first():
    config = dict(type="classification.task.Classification", model=dict(type="nn.resnet.ResNet"))
    assert build(config).model == ResNet()


def test_a_backbone_from_outside_the_package(tmp_path):
    root = __file__.rsplit("/tests/", 1)[0]
    config = override(
        read(f"{root}/configs/classification.py:tiny"),
        [("task.model.width", "7"), ("task.model.type", "tests.test_build.Tiny")],
    )
    built = build(buildable(config))
    assert built["task"].model == Tiny(num_classes=10, width=7)
    variables = jax.eval_shape(
        built["task"].init, jax.random.key(0), {"image": jax.numpy.zeros((2, 28, 28, 1)),
        "valid": jax.numpy.ones(2, bool)},
    )  # fmt: skip
    assert variables[0]["model"]["Dense_1"]["kernel"].shape == (1, 7)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(type="nn.resnet.ResNt"), "did you mean ResNet"),
        (dict(type="nn.resnt.ResNet"), "did you mean nn.resnet"),
        (dict(type="nn.resnet.ResNet", dept=3), "did you mean depth"),
        (dict(type="classification.task.Classification"), "config.model is missing"),
        (dict(a=dict(b=dict(type="ResNet"))), "config.a.b.type"),
        (dict(type="data.sources.digits.Digits", split="all"), "config: "),
    ],
)
def test_errors_name_the_place(config, message):
    with pytest.raises(InputError, match=message):
        build(config)


def test_overrides_keep_the_type_and_a_new_type_takes_its_own_fields():
    root = __file__.rsplit("/tests/", 1)[0]
    config = read(f"{root}/configs/diffusion.py")
    changed = override(
        config,
        [
            ("optimizer.learning_rate.init_value", "1"),
            ("task.network.multipliers", "[1, 2, 3]"),
            ("data.train.path", "some/where"),
            ("data.train.type", "data.sources.folder.Folder"),
            ("ema.network.decay", "0.5"),
        ],
    )
    assert changed.optimizer.learning_rate.init_value == 1.0
    assert isinstance(changed.optimizer.learning_rate.init_value, float)
    assert changed.task.network.multipliers == (1, 2, 3)
    assert changed.data.train.to_dict() == dict(
        type="data.sources.folder.Folder", path="some/where"
    )
    assert config.data.train.split == "train", "the config that was read is not touched"


def test_fields_keep_their_order():
    """Transforms and stages are applied as they were written, also after a flag."""
    config = ConfigDict(dict(transforms=dict(zoom=dict(a=1), flip=dict(b=2), crop=dict(c=3))))
    assert list(buildable(config)["transforms"]) == ["zoom", "flip", "crop"]
    changed = override(config, [("transforms.flip.b", "5")])
    assert list(buildable(changed)["transforms"]) == ["zoom", "flip", "crop"]
    assert buildable(changed)["transforms"]["flip"] == {"b": 5}


def test_json_round_trip(tmp_path):
    root = __file__.rsplit("/tests/", 1)[0]
    config = read(f"{root}/configs/classification.py")
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps(save_json(config)))
    again = load_json(path)
    assert again.to_dict() == config.to_dict()
    assert build(again.to_dict())["task"] == build(buildable(config))["task"]
    again.steps = 3
    assert differences(save_json(config), save_json(again)) == ["steps: 930 was, 3 is"]
