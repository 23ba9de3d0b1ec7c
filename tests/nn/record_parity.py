"""Asks torchvision, timm and transformers what their networks give; see `parity.py`.

pip install -e '.[parity]' && python -m tests.nn.record_parity
"""

import contextlib
import importlib.util
import itertools
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from tests.nn.parity import CLASSES, RECORD, ROWS, image, thin, weights


def define_missing_operators():
    """Lets torchvision be imported beside a torch that it was not compiled for."""
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    for file in folder.glob("_C*.so"):
        # Where they load they must do so first: an operator that is there twice ends the process.
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(file))
    text = (folder / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r"torchvision::(\w+)", text))):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library


operators = define_missing_operators()

import timm.models as timm  # noqa: E402
import torchvision.models as torchvision  # noqa: E402
import transformers as hf  # noqa: E402
from timm.models import efficientnet as timm_efficientnet  # noqa: E402
from timm.models import mobilenetv3 as timm_mobilenetv3  # noqa: E402
from timm.models.resnet import BasicBlock, Bottleneck  # noqa: E402


def peers():
    """{name: (network, modules whose outputs are the stages, their layout)}."""
    resnet = dict(layers=(1, 2, 1, 1), channels=(8, 16, 32, 64), stem_width=8, num_classes=CLASSES)
    plain = dict(layers=(1, 2, 1, 1), num_classes=CLASSES)  # its stem has 64 channels, always
    layers = [f"layer{i}" for i in (1, 2, 3, 4)]
    factors = dict(channel_multiplier=0.25, depth_multiplier=0.6, num_classes=CLASSES)
    tf = dict(pad_type="same", bn_eps=1e-3)
    ends = [f"blocks.{i}" for i in (0, 1, 2, 4, 6)]
    vit = dict(patch_size=8, embed_dim=12, depth=4, num_heads=3, num_classes=CLASSES)
    blocks = [f"blocks.{i}" for i in range(4)]
    hf_vit = dict(
        image_size=32, patch_size=8, hidden_size=12, num_hidden_layers=4, num_attention_heads=3,
        num_labels=CLASSES,
    )  # fmt: skip
    swin = dict(embed_dim=8, depths=[2, 2], num_heads=[2, 4])

    Block = torchvision.efficientnet.MBConvConfig
    stages = [
        Block(e, k, s, i, o, n, width_mult=0.25, depth_mult=0.6)
        for e, k, s, i, o, n in (
            (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2),
            (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4),
            (6, 3, 1, 192, 320, 1),
        )
    ]  # fmt: skip
    rows = torchvision.mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small")[0]
    rows = [rows[i] for i in ROWS]
    for before, row in itertools.pairwise(rows):
        row.input_channels = before.out_channels

    Next = torchvision.convnext.CNBlockConfig
    convnext = [Next(8, 12, 1), Next(12, 16, 1), Next(16, 20, 2), Next(20, None, 1)]
    gap = dict(class_token=False, global_pool="avg", fc_norm=False)
    registers = dict(reg_tokens=3, init_values=1e-5, no_embed_class=True)
    return {
        "timm resnet18": (timm.ResNet(BasicBlock, **plain), layers, "nchw"),
        "timm resnet50d": (
            timm.ResNet(
                Bottleneck, **resnet | dict(stem_width=4), stem_type="deep", avg_down=True
            ), layers, "nchw",
        ),
        "timm resnext50": (
            timm.ResNet(Bottleneck, cardinality=2, base_width=32, **plain), layers, "nchw",
        ),
        "hf resnet50": (
            hf.ResNetForImageClassification(hf.ResNetConfig(
                embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 1, 1],
                num_labels=CLASSES,
            )), [f"resnet.encoder.stages.{i}" for i in range(4)], "nchw",
        ),
        "torchvision wide_resnet50": (
            torchvision.ResNet(
                torchvision.resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES,
                width_per_group=128,
            ), layers, "nchw",
        ),
        "timm convnext": (
            timm.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), num_classes=CLASSES),
            [f"stages.{i}" for i in range(4)], "nchw",
        ),
        "torchvision convnext": (
            torchvision.ConvNeXt(convnext, num_classes=CLASSES),
            [f"features.{i}" for i in (1, 3, 5, 7)], "nchw",
        ),
        "hf convnext": (
            hf.ConvNextForImageClassification(hf.ConvNextConfig(
                hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], num_labels=CLASSES,
            )), [f"convnext.encoder.stages.{i}" for i in range(4)], "nchw",
        ),
        "timm efficientnet": (
            timm_efficientnet._gen_efficientnet("efficientnet_b0", **factors), ends, "nchw",
        ),
        "timm tf_efficientnet": (
            timm_efficientnet._gen_efficientnet("tf_efficientnet_b0", **factors, **tf),
            ends, "nchw",
        ),
        "timm tf_efficientnet_lite": (
            timm_efficientnet._gen_efficientnet_lite("tf_efficientnet_lite0", **factors, **tf),
            ends, "nchw",
        ),
        "torchvision efficientnet": (
            torchvision.EfficientNet(stages, dropout=0.0, num_classes=CLASSES),
            [f"features.{i}" for i in (1, 2, 3, 5, 7)], "nchw",
        ),
        "hf efficientnet": (
            hf.EfficientNetForImageClassification(hf.EfficientNetConfig(
                width_coefficient=0.5, depth_coefficient=0.6, num_labels=CLASSES, hidden_dim=640,
            )), [f"efficientnet.encoder.blocks.{i}" for i in (0, 2, 4, 8, 12)], "nchw",
        ),
        "timm mobilenetv3": (
            timm_mobilenetv3._gen_mobilenet_v3(
                "mobilenetv3_small_100", num_classes=CLASSES
            ), ["bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.4"], "nchw",
        ),
        "torchvision mobilenetv3": (
            torchvision.MobileNetV3(rows, last_channel=1024, num_classes=CLASSES),
            [f"features.{i}" for i in (0, 1, 2, 4, 5)], "nchw",
        ),
        "timm vit": (timm.VisionTransformer((32, 48), **vit), blocks, (4, 6)),
        "timm vit mean": (timm.VisionTransformer(32, **vit, **gap), blocks, (4, 4)),
        "timm vit mean norm": (
            timm.VisionTransformer(32, **vit, global_pool="avg"), blocks, (4, 4),
        ),
        "timm vit registers": (timm.VisionTransformer(32, **vit, **registers), blocks, (4, 4)),
        "torchvision vit": (
            torchvision.VisionTransformer(32, 8, 4, 3, 12, 48, num_classes=CLASSES),
            [f"encoder.layers.encoder_layer_{i}" for i in range(4)], (4, 4),
        ),
        "hf vit": (
            hf.ViTForImageClassification(hf.ViTConfig(**hf_vit, intermediate_size=48)),
            VIT_LAYERS, (4, 4),
        ),
        "hf vit resized": (
            hf.ViTForImageClassification(hf.ViTConfig(**hf_vit, intermediate_size=48)),
            VIT_LAYERS, (6, 3),
        ),
        "hf vit in memory": (
            hf.ViTForImageClassification(hf.ViTConfig(**hf_vit, intermediate_size=48)),
            VIT_LAYERS, (4, 4),
        ),
        "hf dinov2 registers": (
            hf.Dinov2WithRegistersModel(
                hf.Dinov2WithRegistersConfig(**hf_vit, mlp_ratio=4, num_register_tokens=2)
            ), [f"encoder.layer.{i}" for i in range(4)], (4, 4),
        ),
        "timm swin": (
            timm.SwinTransformer(64, 4, window_size=4, num_classes=CLASSES, **swin),
            ["layers.0", "layers.1"], "nhwc",
        ),
        "torchvision swin": (
            torchvision.SwinTransformer([4, 4], window_size=[4, 4], num_classes=CLASSES, **swin),
            ["features.1", "features.3"], "nhwc",
        ),
        "hf swin": (
            hf.SwinForImageClassification(hf.SwinConfig(
                image_size=(64, 56), window_size=4, num_labels=CLASSES, **swin,
            )), [f"swin.encoder.layers.{i}.blocks.1" for i in range(2)], [(16, 14), (8, 7)],
        ),
        "hf swin in memory": (
            hf.SwinForImageClassification(hf.SwinConfig(
                image_size=(64, 56), window_size=4, num_labels=CLASSES, **swin,
            )), [f"swin.encoder.layers.{i}.blocks.1" for i in range(2)], [(16, 14), (8, 7)],
        ),
    }  # fmt: skip


VIT_LAYERS = [f"vit.layers.{i}" for i in range(4)]


def record(peer, network, stages, layout):
    """({name: shape} as the network is saved, {name: array of all that it gives})."""
    network = network.eval()
    is_hf = isinstance(network, hf.PreTrainedModel)
    if is_hf and "in memory" not in peer:  # in its files, names are not always the program's
        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(folder)
            file = Path(folder) / "model.safetensors"
            saved = safetensors.numpy.load_file(file)
            arrays = saved | weights({n: a.shape for n, a in saved.items() if a.dtype.kind == "f"})
            safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"})
            network = type(network).from_pretrained(folder).eval()
    else:
        saved = {name: array.numpy() for name, array in network.state_dict().items()}
        arrays = weights({n: a.shape for n, a in saved.items() if a.dtype.kind == "f"})
        network.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()}, strict=False)
    shapes = {name: array.shape for name, array in saved.items()}

    given = {}

    def keep(stage):
        def hook(module, arguments, output):
            output = output[0] if isinstance(output, tuple) else output
            given[f"stage{stage + 1}"] = output

        return hook

    modules = dict(network.named_modules())
    for stage, name in enumerate(stages):
        modules[name].register_forward_hook(keep(stage))
    pixels = torch.from_numpy(image(peer)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        if peer == "hf vit resized":
            output = network(pixels, interpolate_pos_encoding=True)
        else:
            output = network(pixels)
    for number, (name, value) in enumerate(given.items()):
        if layout == "nchw":
            value = value.permute(0, 2, 3, 1)
        elif layout != "nhwc":
            grid = layout[number] if isinstance(layout, list) else layout
            value = value[:, -grid[0] * grid[1] :].unflatten(1, grid)
        given[name] = value.numpy()
    logits = getattr(output, "logits", None) if is_hf else output
    if logits is not None:
        given["logits"] = logits.numpy()
    return shapes, given


def main():
    """Writes the record."""
    arrays = {}
    for peer, (network, stages, layout) in peers().items():
        shapes, given = record(peer, network, stages, layout)
        text = json.dumps({name: list(shape) for name, shape in shapes.items()})
        arrays[f"{peer}/shapes"] = np.frombuffer(text.encode(), np.uint8)
        for name, value in given.items():
            arrays[f"{peer}/{name}"] = thin(value)
        sizes = {name: (value.shape, float(abs(value).max())) for name, value in given.items()}
        print(peer, sizes)
    np.savez_compressed(RECORD, **arrays)
    print(RECORD, RECORD.stat().st_size)

    whole = torch.arange(24.0).reshape(4, 6)
    weights_of_all_kinds = torch.nn.Module().state_dict() | {
        "module.whole": whole,
        "module.transposed": whole.T,
        "module.part": whole[1:3, ::2],
        "module.parameter": torch.nn.Parameter(whole[0] - 2.5),
        "module.expanded": torch.tensor([1.5]).expand(3),
        "module.empty": torch.zeros(0, 3),
        "module.scalar": torch.tensor(7),
        "module.half": whole[0].half(),
        "module.bfloat16": whole[0].bfloat16(),
        "module.double": whole[0].double(),
        "module.bool": whole[0] > 2,
        "module.byte": whole[0].byte(),
    }
    root = {"epoch": 3, "state_dict": weights_of_all_kinds, "optimizer": {"lr": [0.1, None, True]}}
    torch.save(root, RECORD.with_name("torch_zip.pth"))
    torch.save(root, RECORD.with_name("torch_legacy.pth"), _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
