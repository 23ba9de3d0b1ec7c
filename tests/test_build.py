import functools
import importlib
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cvjax.build import build, describe
from cvjax.classification.task import Classification
from cvjax.config import buildable, differences, load_json, override, read, save_json
from cvjax.errors import InputError
from cvjax.nn.resnet import ResNet
from cvjax.train.optimizer import Optimizer


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
        (dict(type="classification.losses.class_balanced"), "config.counts is missing"),
        (dict(type="nn.resnet.ResNet", dtype="int32"), "config.dtype is 'int32'"),
        (dict(type="nn.resnet.ResNet", dtype=None), "config.dtype is None"),
        (dict(type="nn.resnet.ResNet", width=None), "config.width is None; it must be a whole num"),
        (
            dict(type="nn.resnet.ResNet", stage_sizes=("a",)),
            r"must be of type tuple\[int, ...\]",
        ),
        (
            dict(type="nn.fpn.Pyramid", backbone=None, fpn=None),
            "backbone is None; it must be of type",
        ),
        (
            dict(type="nn.fpn.Pyramid", backbone=dict(type="optax.adam"), fpn=None),
            "backbone is func",
        ),
        (
            dict(type="train.power_averages.tracked", transform=3),
            "transform is 3; it must be",
        ),
        (dict(type="my_lab.parts.Tiny"), "no module my_lab.parts; one of your own must be beside"),
        (
            dict(type="data.transforms.in_order", flip=3),
            "config.flip is 3; it must be of type Call",
        ),
        (dict(type="optax.adamw", b1=None), "config.b1 is None; it must be"),
        (dict(type="segmentation.task.measure", weights=dict(a=None)), "weights is {'a': None}"),
        (dict(type="nn.resnet.ResNet", stem=None), "config.stem is None; it must be of type str"),
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


def test_one_of_several_objects_is_taken_away():
    root = __file__.rsplit("/tests/", 1)[0]
    config = read(f"{root}/configs/segmentation.py")
    flags = ["task.losses.dice", "task.weights", "evaluators.segmentation"]
    changed = override(config, [(flag, "None") for flag in flags])
    assert list(changed.task.losses) == ["cross_entropy"] and not changed.evaluators
    assert list(build(buildable(changed.task)).losses) == ["cross_entropy"]
    changed = override(read(f"{root}/configs/cifar10.py"), [("task.augment.cutout", "None")])
    assert set(changed.task.augment) == {"type", "crop", "flip"}
    # A field is None where it has that value, also one that was a text.
    assert override(config, [("best", "None")]).best is None
    assert override(config, [("data.test", "None")]).data.test is None
    for field in ("type", "weight"):
        inner = (f"task.losses.dice.{field}", "x")
        message = f"takes away what --config.{inner[0]} is a field of"
        for flags in ([("task.losses.dice", "None"), inner], [inner, ("task", "None")]):
            with pytest.raises(InputError, match=message):
                override(config, flags)


def test_an_object_where_there_was_none():
    root = __file__.rsplit("/tests/", 1)[0]
    config = read(f"{root}/configs/classification.py:tiny")
    mix = ("task.mix.type", "data.transforms.mixing.mixup")
    changed = override(config, [("task.mix.alpha", "0.4"), mix, ("ema.type", "optax.ema")])
    assert buildable(changed)["task"]["mix"] == {"type": mix[1], "alpha": 0.4}
    assert buildable(changed)["ema"] == {"type": "optax.ema"}
    assert build(buildable(changed)["task"]).mix.keywords == {"alpha": 0.4}
    begin = [("initialize.type", "train.restore.load_params"), ("initialize.path", "a")]
    changed = override(config, [*begin, ("parallel", "None")])
    assert dict(changed.initialize) == {"type": begin[0][1], "path": "a"}
    assert changed.parallel is None  # and no text
    with pytest.raises(InputError, match="did you mean mix?"):
        override(config, [("task.mixx.type", "data.transforms.mixing.mixup")])


def test_flags_add_transforms_and_evaluators():
    root = __file__.rsplit("/tests/", 1)[0]
    usual = "data.transforms.defaults.detection_eval"
    flip = "data.transforms.geometry.random_flip"
    flags = [
        ("data.test_transforms.usual.size", "128"),
        ("data.test_transforms.usual.type", usual),
        ("data.transforms.second.type", usual),
        ("data.transforms.first.type", flip),
        ("evaluators.x.type", "detection.evaluate.CocoEvaluator"),
        ("evaluators.x.num_classes", "10"),
    ]
    recipe = read(f"{root}/configs/retinanet.py:tiny")
    changed = buildable(override(recipe, flags))
    assert changed["data"]["test_transforms"] == {"usual": {"type": usual, "size": 128}}
    assert list(changed["data"]["transforms"]) == ["second", "first"]
    assert list(changed["evaluators"]) == ["coco", "x"]
    assert changed["evaluators"]["x"]["num_classes"] == 10
    del recipe.evaluators  # absent as in other recipes
    assert list(buildable(override(recipe, flags))["evaluators"]) == ["x"]
    stages = override(
        read(f"{root}/configs/stages.py:tiny"), [(f"stages.masks.{flags[4][0]}", usual)]
    )
    assert buildable(stages)["stages"]["masks"]["evaluators"]["x"] == {"type": usual}

    for wrong, message in [
        ("data.test_transform.usual.type", "did you mean test_transforms"),
        ("data.trian.type", "did you mean train"),
        ("evaluator.x.type", "did you mean evaluators"),
        ("evaluators.type", "no such field"),
        ("data.transforms.type", r"config\.data\.transforms\.<name>\.type adds one"),
        ("data.test_transforms.usual.size", "a new object needs its type"),
        ("evaluators.x.num_clases", "did you mean num_classes"),
    ]:
        with pytest.raises(InputError, match=message):
            override(recipe, [*flags[4:], (wrong, usual)] if "num" in wrong else [(wrong, usual)])
    with pytest.raises(InputError, match="no such field"):  # none of a run's: nobody would read it
        override(stages, [("evaluators.x.type", usual)])


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
    path = tmp_path / "config.json"
    path.write_text(json.dumps(save_json(config)))
    again = load_json(path)
    assert again.to_dict() == config.to_dict()
    assert build(again.to_dict())["task"] == build(buildable(config))["task"]
    again.steps = 3
    assert differences(save_json(config), save_json(again)) == ["steps: 930 was, 3 is"]


@pytest.mark.parametrize("content", [b"[1, 2]", b"{", b"\xff\xfe", b""])
def test_a_saved_config_that_is_none(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_json(path)


def test_what_describe_gives_builds_the_same_again(tmp_path):
    task = Classification(
        model=ResNet(depth=50, num_classes=3, stage_sizes=(1, 2), dtype=jnp.bfloat16),
        mean=(0.1, 0.2, 0.3),
        std=np.float32(0.5),
    )
    optimizer = Optimizer(
        transform=functools.partial(optax.sgd, momentum=0.9),
        weight_decay=((".*/kernel", 0.1), (".*", 0.0)),
    )
    described = describe(dict(task=task, optimizer=optimizer, several=[Tiny(width=2), None]))
    assert described["task"]["type"] == "classification.task.Classification"
    assert described["task"]["model"]["depth"] == 50
    (tmp_path / "config.json").write_text(json.dumps(described))
    built = build(load_json(tmp_path / "config.json").to_dict())
    assert built["task"].model == task.model.clone(dtype="bfloat16")
    assert (built["task"].mean, built["task"].std) == (task.mean, 0.5)
    assert built["optimizer"].transform.func is optax.sgd
    assert built["optimizer"].transform.keywords == {"momentum": 0.9}
    assert built["optimizer"].weight_decay == optimizer.weight_decay
    assert list(built["several"]) == [Tiny(width=2), None]
    assert describe(built) == describe(dict(built))


def test_a_class_that_can_no_longer_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "lab_of_last_year.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass Net:\n    width: int = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import lab_of_last_year

    described = describe(dict(model=lab_of_last_year.Net(width=5)))
    assert described["model"] == {"type": "lab_of_last_year.Net", "width": 5}
    (tmp_path / "lab_of_last_year.py").unlink()
    monkeypatch.delitem(sys.modules, "lab_of_last_year")
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="lab_of_last_year"):
        build(described)


@pytest.mark.parametrize(
    "thing", [lambda x: x, jnp.ones(2), object()], ids=["lambda", "array", "-"]
)
def test_what_has_no_name_is_not_described(thing):
    class Local:
        pass

    with pytest.raises(InputError, match=r"config\.a\.0 is .* cannot be built again"):
        describe({"a": [thing]})
    with pytest.raises(InputError, match="cannot be built again"):
        describe(Local)
