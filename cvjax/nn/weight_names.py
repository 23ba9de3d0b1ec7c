"""How others name the parameters of the networks that are in `cvjax.nn`.

A naming is a row of rules (pattern, ours): a regular expression for a name of theirs, without its
last part (weight, bias, ...) where that says what kind of array it is, and the path of our module.
In ours, \\1 is a group of the pattern, <1> the number in that group plus one, and block_[1.2] a
block that they number within its stage and we from the first to the last.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from cvjax.nn import weight_names_detection as detection
from cvjax.nn import weight_names_transformers as transformers

Arrays = dict[str, np.ndarray]
# Their last part: our leaves that it may be, in the collection params unless it says so.
LEAVES = {
    "weight": ("params/{}/kernel", "params/{}/scale"),
    "bias": ("params/{}/bias",),
    "running_mean": ("batch_stats/{}/mean",),
    "running_var": ("batch_stats/{}/var",),
}
# Transposed convolutions: their kernels have the channels that come in before those that go out.
TRANSPOSED = r".*/(conv5_mask|kps_score_lowres)/kernel"
NO_WEIGHTS = r".*\.(num_batches_tracked|relative_position_index|attn_mask)|.*mask_token"


class Naming(NamedTuple):
    """Whose names, the rules, and a function that first makes them regular."""

    name: str
    rules: tuple[tuple[str, str], ...]
    prepare: Callable[[Iterable[str]], dict[str, str]] | None = None


def translate(naming: Naming, arrays: Arrays, paths: Iterable[str]) -> dict[str, str]:
    """{our path: their name} for those that have a path among `paths`."""
    paths = set(paths)
    regular = naming.prepare(arrays) if naming.prepare else {}
    modules = {}
    for name in arrays:
        stem, _, leaf = regular.get(name, name).rpartition(".")
        if leaf in LEAVES:
            modules[name] = _rename(naming.rules, stem), LEAVES[leaf]
        else:
            modules[name] = _rename(naming.rules, regular.get(name, name)), ("params/{}",)
    numbers = [re.findall(r"\[(.*)\]", module) for module, _ in modules.values() if module]
    blocks = sorted({number[0] for number in numbers if number}, key=_numbers)
    found = {}
    for name, (module, leaves) in modules.items():
        if module is None:
            continue
        module = re.sub(r"\[(.*)\]", lambda match: str(blocks.index(match[1])), module)
        for leaf in leaves:
            if leaf.format(module) in paths:
                found[leaf.format(module)] = name
    return found


def fused(arrays: Arrays) -> Arrays:
    """With separate queries, keys and values put together, and in_proj_weight as in_proj.weight."""
    pattern = r"(.+)\.(?:(query|key|value)|([qkv]_proj))\.(weight|bias)"
    result = {}
    for name, array in arrays.items():
        if match := re.fullmatch(pattern, name):
            ours = ("query", "key", "value") if match[3] is None else ("q_proj", "k_proj", "v_proj")
            parts = [f"{match[1]}.{part}.{match[4]}" for part in ours]
            shapes = {arrays[part].shape[1:] for part in parts if part in arrays}
            if not all(part in arrays for part in parts) or len(shapes) > 1 or not array.ndim:
                result[name] = array
            elif name == parts[0]:
                whole = np.concatenate([arrays[part] for part in parts])
                result[f"{match[1]}.query_key_value.{match[4]}"] = whole
        else:
            result[re.sub(r"\.in_proj_(weight|bias)$", r".in_proj.\1", name)] = array
    return result


def _rename(rules: Iterable[tuple[str, str]], name: str) -> str | None:
    for pattern, ours in rules:
        if match := re.fullmatch(pattern, name):
            plus_one = re.sub(r"<(\d)>", lambda number: str(int(match[int(number[1])]) + 1), ours)
            return match.expand(plus_one)
    return None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


_RESNET = (
    ("conv1", "stem_conv"),
    ("bn1", "stem_norm"),
    (r"conv1\.0", "stem_conv1"),
    (r"conv1\.1", "stem_norm1"),
    (r"conv1\.3", "stem_conv2"),
    (r"conv1\.4", "stem_norm2"),
    (r"conv1\.6", "stem_conv"),
    (r"layer(\d)\.(\d+)\.conv(\d)", r"stage\1_\2/conv\3"),
    (r"layer(\d)\.(\d+)\.bn(\d)", r"stage\1_\2/norm\3"),
    ("fc", "head"),
)
_RESNET_HF = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution", "stem_conv"),
    (r"(?:resnet\.)?embedder\.embedder\.normalization", "stem_norm"),
    *(
        (rf"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.{theirs}", rf"stage<1>_\2/{ours}")
        for theirs, ours in (
            (r"layer\.(\d)\.convolution", "conv<3>"),
            (r"layer\.(\d)\.normalization", "norm<3>"),
            (r"shortcut\.convolution", "shortcut_conv"),
            (r"shortcut\.normalization", "shortcut_norm"),
        )
    ),
    (r"classifier\.1", "head"),
)

_CONVNEXT_TIMM = (
    (r"stem\.0", "stem_conv"),
    (r"stem\.1", "stem_norm"),
    (r"stages\.(\d)\.downsample\.0", "stage<1>_norm"),
    (r"stages\.(\d)\.downsample\.1", "stage<1>_conv"),
    *(
        (rf"stages\.(\d)\.blocks\.(\d+)\.{theirs}", rf"stage<1>_\2/{ours}")
        for theirs, ours in (
            ("conv_dw", "depthwise_conv"),
            ("norm", "norm"),
            (r"mlp\.fc1", "hidden"),
            (r"mlp\.fc2", "output"),
            ("gamma", "layer_scale"),
        )
    ),
    (r"head\.norm", "head_norm"),
    (r"head\.fc", "head"),
)
_CONVNEXT_TORCHVISION = (
    (r"features\.0\.0", "stem_conv"),
    (r"features\.0\.1", "stem_norm"),
    *(
        (rf"features\.{2 * stage - 1}\.(\d+)\.{theirs}", rf"stage{stage}_\1/{ours}")
        for stage in (1, 2, 3, 4)
        for theirs, ours in (
            (r"block\.0", "depthwise_conv"),
            (r"block\.2", "norm"),
            (r"block\.3", "hidden"),
            (r"block\.5", "output"),
            ("layer_scale", "layer_scale"),
        )
    ),
    *(
        (rf"features\.{2 * stage - 2}\.{theirs}", f"stage{stage}_{ours}")
        for stage in (2, 3, 4)
        for theirs, ours in ((0, "norm"), (1, "conv"))
    ),
    (r"classifier\.0", "head_norm"),
    (r"classifier\.2", "head"),
)
_CONVNEXT_HF = (
    (r"(?:convnext\.)?embeddings\.patch_embeddings", "stem_conv"),
    (r"(?:convnext\.)?embeddings\.layernorm", "stem_norm"),
    (r"(?:convnext\.)?encoder\.stages\.(\d)\.downsampling_layer\.0", "stage<1>_norm"),
    (r"(?:convnext\.)?encoder\.stages\.(\d)\.downsampling_layer\.1", "stage<1>_conv"),
    *(
        (rf"(?:convnext\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.{theirs}", rf"stage<1>_\2/{ours}")
        for theirs, ours in (
            ("dwconv", "depthwise_conv"),
            ("layernorm", "norm"),
            ("pwconv1", "hidden"),
            ("pwconv2", "output"),
            ("layer_scale_parameter", "layer_scale"),
        )
    ),
    (r"(?:convnext\.)?layernorm", "head_norm"),
    ("classifier", "head"),
)

_INVERTED_RESIDUAL_TIMM = (
    ("conv_stem", "stem_conv"),
    ("bn1", "stem_norm"),
    *(
        (rf"blocks\.(\d+)\.(\d+)\.{theirs}", rf"block_[\1.\2]/{ours}")
        for theirs, ours in (
            ("conv_pw", "expand_conv"),
            ("bn1", "expand_norm"),
            ("conv_dw", "depthwise_conv"),
            ("bn2", "depthwise_norm"),
            (r"se\.conv_reduce", "squeeze/reduce"),
            (r"se\.conv_expand", "squeeze/expand"),
            ("conv_pwl", "project_conv"),
            ("bn3", "project_norm"),
        )
    ),
)
_EFFICIENTNET_TIMM = (
    *_INVERTED_RESIDUAL_TIMM,
    ("conv_head", "head_conv"),
    ("bn2", "head_norm"),
    ("classifier", "head"),
)
_MOBILENET_TIMM = (
    *_INVERTED_RESIDUAL_TIMM,
    (r"blocks\.\d+\.0\.conv", "head_conv"),
    (r"blocks\.\d+\.0\.bn1\.last", "head_norm"),
    ("conv_head", "head_hidden"),
    ("classifier", "head"),
)
_INVERTED_RESIDUAL_TORCHVISION = (
    (r"features\.0\.0", "stem_conv"),
    (r"features\.0\.1", "stem_norm"),
    *(
        (rf"features\.([\d.]+)\.block\.{theirs}\.{part}", rf"block_[\1]/{theirs}_{ours}")
        for theirs in ("expand", "depthwise", "project")
        for part, ours in ((0, "conv"), (1, "norm"))
    ),
    (r"features\.([\d.]+)\.block\.\d\.fc1", r"block_[\1]/squeeze/reduce"),
    (r"features\.([\d.]+)\.block\.\d\.fc2", r"block_[\1]/squeeze/expand"),
    (r"features\.\d+\.0", "head_conv"),
    (r"features\.\d+\.1", "head_norm"),
)
_EFFICIENTNET_TORCHVISION = (*_INVERTED_RESIDUAL_TORCHVISION, (r"classifier\.1", "head"))
_MOBILENET_TORCHVISION = (
    *_INVERTED_RESIDUAL_TORCHVISION,
    (r"classifier\.0", "head_hidden"),
    (r"classifier\.3", "head"),
)
_EFFICIENTNET_HF = (
    (r"(?:efficientnet\.)?embeddings\.convolution", "stem_conv"),
    (r"(?:efficientnet\.)?embeddings\.batchnorm", "stem_norm"),
    *(
        (rf"(?:efficientnet\.)?encoder\.blocks\.(\d+)\.{theirs}", rf"block_[\1]/{ours}")
        for theirs, ours in (
            (r"expansion\.expand_conv", "expand_conv"),
            (r"expansion\.expand_bn", "expand_norm"),
            (r"depthwise_conv\.depthwise_conv", "depthwise_conv"),
            (r"depthwise_conv\.depthwise_norm", "depthwise_norm"),
            (r"squeeze_excite\.reduce", "squeeze/reduce"),
            (r"squeeze_excite\.expand", "squeeze/expand"),
            (r"projection\.project_conv", "project_conv"),
            (r"projection\.project_bn", "project_norm"),
        )
    ),
    (r"(?:efficientnet\.)?encoder\.top_conv", "head_conv"),
    (r"(?:efficientnet\.)?encoder\.top_bn", "head_norm"),
    ("classifier", "head"),
)
# https://github.com/lukemelas/EfficientNet-PyTorch and what descends from it.
_EFFICIENTNET_PYTORCH = (
    ("_conv_stem", "stem_conv"),
    ("_bn0", "stem_norm"),
    *(
        (rf"_blocks\.(\d+)\.{theirs}", rf"block_[\1]/{ours}")
        for theirs, ours in (
            ("_expand_conv", "expand_conv"),
            ("_bn0", "expand_norm"),
            ("_depthwise_conv", "depthwise_conv"),
            ("_bn1", "depthwise_norm"),
            ("_se_reduce", "squeeze/reduce"),
            ("_se_expand", "squeeze/expand"),
            ("_project_conv", "project_conv"),
            ("_bn2", "project_norm"),
        )
    ),
    ("_conv_head", "head_conv"),
    ("_bn1", "head_norm"),
    ("_fc", "head"),
)

_INCEPTION = (
    (r"Conv2d_(\w+)\.(conv|bn)", r"conv2d_\1/\2"),
    (r"Mixed_(\w+)\.(\w+)\.(conv|bn)", r"mixed_\1/\2/\3"),
    ("fc", "head"),
)


def _shortcuts(first: int) -> tuple[tuple[str, str], ...]:
    """The convolution of a ResNet's shortcut is the first or, after a mean, the second layer."""
    prefix = r"layer(\d)\.(\d+)\.downsample\."
    return (
        (rf"{prefix}{first}", r"stage\1_\2/shortcut_conv"),
        (rf"{prefix}{first + 1}", r"stage\1_\2/shortcut_norm"),
    )


def _regular_timm(names: Iterable[str]) -> dict[str, str]:
    """A block without expansion has the same names one earlier; so has the last of MobileNetV3."""
    names = list(names)
    regular = {}
    for name in names:
        match = re.fullmatch(r"(blocks\.\d+\.\d+)\.([^.]+)(\..*)?", name)
        if match is None:
            continue
        block, layer, rest = match[1], match[2], match[3] or ""
        if f"{block}.conv.weight" in names:
            layer = {"bn1": "bn1.last"}.get(layer, layer)
        elif f"{block}.conv_pwl.weight" not in names:
            layer = {"bn1": "bn2", "conv_pw": "conv_pwl", "bn2": "bn3"}.get(layer, layer)
        regular[name] = f"{block}.{layer}{rest}"
    return regular


def _regular_torchvision(names: Iterable[str]) -> dict[str, str]:
    """The layers of a block are numbered, and which is which depends on how many there are."""
    pattern = re.compile(r"(features\.[\d.]+\.block)\.(\d)(\.[01]\.\w+)")
    blocks: dict[str, list[int]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            numbers = blocks.setdefault(match[1], [])
            if int(match[2]) not in numbers:
                numbers.append(int(match[2]))
    regular = {}
    for name in names:
        if match := pattern.fullmatch(name):
            numbers = sorted(blocks[match[1]])
            layers = ("expand", "depthwise", "project")[-len(numbers) :]
            regular[name] = f"{match[1]}.{layers[numbers.index(int(match[2]))]}{match[3]}"
    return regular


_BODY = tuple(
    (rf"backbone\.body\.{theirs}", f"encoder/backbone/{ours}")
    for theirs, ours in (*_RESNET, *_shortcuts(0))
)
_BACKBONE_DETR = tuple(
    (rf"model\.backbone\.(?:conv_encoder\.)?model\.{theirs}", f"backbone/{ours}")
    for theirs, ours in (*_RESNET, *_shortcuts(0), *_RESNET_HF)
)


def _regular_detr(names: Iterable[str]) -> dict[str, str]:
    """A table of vectors is no kernel, though it is called a weight."""
    return {"model.query_position_embeddings.weight": "query_positions"}


NAMINGS = (
    Naming("torchvision's or timm's ResNet", (*_RESNET, *_shortcuts(0))),
    Naming("timm's ResNet-D", (*_RESNET, *_shortcuts(1))),
    Naming("Hugging Face's ResNet", _RESNET_HF),
    Naming("timm's ConvNeXt", _CONVNEXT_TIMM),
    Naming("torchvision's ConvNeXt", _CONVNEXT_TORCHVISION),
    Naming("Hugging Face's ConvNeXt", _CONVNEXT_HF),
    Naming("timm's EfficientNet", _EFFICIENTNET_TIMM, _regular_timm),
    Naming("torchvision's EfficientNet", _EFFICIENTNET_TORCHVISION, _regular_torchvision),
    Naming("Hugging Face's EfficientNet", _EFFICIENTNET_HF),
    Naming("EfficientNet-PyTorch's EfficientNet", _EFFICIENTNET_PYTORCH),
    Naming("timm's MobileNetV3", _MOBILENET_TIMM, _regular_timm),
    Naming("torchvision's MobileNetV3", _MOBILENET_TORCHVISION, _regular_torchvision),
    Naming("torchvision's or pytorch-fid's Inception v3", _INCEPTION),
    Naming("timm's vision transformer", transformers.VIT_TIMM),
    Naming("torchvision's vision transformer", transformers.VIT_TORCHVISION),
    Naming("Hugging Face's vision transformer", transformers.VIT_HF),
    Naming("timm's Swin transformer", transformers.SWIN_TIMM),
    Naming("Microsoft's Swin transformer", transformers.SWIN_MICROSOFT),
    Naming("torchvision's Swin transformer", transformers.SWIN_TORCHVISION),
    Naming("Hugging Face's Swin transformer", transformers.SWIN_HF),
    Naming("torchvision's RetinaNet", (*_BODY, *detection.RETINANET)),
    Naming("torchvision's FCOS", (*_BODY, *detection.FCOS)),
    Naming("Hugging Face's DETR", (*_BACKBONE_DETR, *detection.DETR_HF), _regular_detr),
    Naming("torchvision's R-CNN", (*_BODY, *detection.RCNN)),
)
