"""Asks torchvision and transformers what their detectors give; see `parity.py`.

pip install -e '.[parity]' && python -m tests.detection.record_parity
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from tests.detection.parity import (
    CLASSES,
    FEATURES,
    OUTPUTS,
    PUBLISHED,
    RECORD,
    SCORES,
    SIZE,
    images,
    thin,
    truth,
    weights,
)
from tests.detection.test_roi_align import slow as slow_roi_align
from tests.nn.record_parity import operators  # noqa: F401  (before torchvision)

# isort: split
import torchvision.models as models
import transformers as hf
from torchvision.models import detection
from torchvision.models.detection import fcos, keypoint_rcnn, mask_rcnn, retinanet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import boxes as box_ops
from torchvision.ops import feature_pyramid_network as fpn
from torchvision.ops import misc, poolers

WHOLE = dict(min_size=128, max_size=256, _skip_resize=True)


def nms(boxes, scores, iou_threshold):
    """Stands in for the compiled operator, which may not load."""
    kept = []
    for row in torch.argsort(scores, descending=True, stable=True).tolist():
        others = boxes[kept]
        if not kept or box_ops.box_iou(boxes[row : row + 1], others).max() <= iou_threshold:
            kept.append(row)
    return torch.tensor(kept, dtype=torch.int64)


def roi_align(features, boxes, output_size, spatial_scale, sampling_ratio, aligned=False):
    """Stands in for the compiled one; their own in Python does not leave out what is outside."""
    maps = features.permute(0, 2, 3, 1).numpy()
    pooled = [
        slow_roi_align(maps[int(i)], box, 1 / spatial_scale, output_size, sampling_ratio, aligned)
        for i, *box in boxes.numpy()
    ]
    pooled = np.asarray(pooled, np.float32).reshape(len(boxes), *output_size, features.shape[1])
    return torch.from_numpy(pooled).permute(0, 3, 1, 2)


box_ops.nms, poolers.roi_align = nms, roi_align


def backbone(first, extra, epsilon):
    norm = lambda width: misc.FrozenBatchNorm2d(width, eps=epsilon)  # noqa: E731
    body = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    layers = {f"layer{i}": str(i - first) for i in range(first, 5)}
    widths = [64 * 2 ** (i - 1) for i in range(first, 5)]
    return BackboneWithFPN(body, layers, widths, FEATURES, extra)


def peers():
    dense = fpn.LastLevelP6P7(FEATURES, FEATURES)
    sides = [(s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512)]
    anchors = detection.anchor_utils.AnchorGenerator(tuple(sides), ((0.5, 1.0, 2.0),) * 5)
    rcnn = detection.FasterRCNN(
        backbone(1, fpn.LastLevelMaxPool(), 0.0), None, **WHOLE, rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50, box_score_thresh=SCORES["rcnn"],
        box_detections_per_img=OUTPUTS, box_head=TwoMLPHead(FEATURES * 49, 64),
        box_predictor=FastRCNNPredictor(64, CLASSES + 1),
    )  # fmt: skip
    pool = lambda: poolers.MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)  # noqa: E731
    heads = rcnn.roi_heads
    heads.mask_roi_pool, heads.keypoint_roi_pool = pool(), pool()
    heads.mask_head = mask_rcnn.MaskRCNNHeads(FEATURES, (16, 16), 1)
    heads.mask_predictor = mask_rcnn.MaskRCNNPredictor(16, 16, CLASSES + 1)
    heads.keypoint_head = keypoint_rcnn.KeypointRCNNHeads(FEATURES, (16, 16))
    heads.keypoint_predictor = keypoint_rcnn.KeypointRCNNPredictor(16, 3)
    return {
        "retinanet": retinanet.RetinaNet(
            backbone(2, dense, 0.0), CLASSES, **WHOLE, anchor_generator=anchors,
            score_thresh=SCORES["retinanet"], detections_per_img=OUTPUTS,
        ),
        "fcos": fcos.FCOS(
            backbone(2, fpn.LastLevelP6P7(FEATURES, FEATURES), 1e-5), CLASSES, **WHOLE,
            score_thresh=SCORES["fcos"], detections_per_img=OUTPUTS,
        ),
        "rcnn": rcnn,
    }  # fmt: skip


def record(network):
    """({name: shape} of its weights, {name: array of all that it gives})."""
    network = network.eval()
    shapes = {name: tuple(array.shape) for name, array in network.state_dict().items()}
    arrays = weights(shapes)
    network.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()})

    given = {}

    def keep(name, write):
        def hook(module, arguments, output):
            given.update(write(output) if write else {name: output})

        return hook

    modules = dict(network.named_modules())
    modules["backbone"].register_forward_hook(
        keep("", lambda maps: {
            f"level{i}": x.permute(0, 2, 3, 1) for i, x in enumerate(maps.values())
        })
    )  # fmt: skip
    if "head" in modules:
        modules["head"].register_forward_hook(keep("", dict))
    else:

        def flat(maps, channels):
            maps = [x.permute(0, 2, 3, 1).reshape(len(x), -1, channels) for x in maps]
            return torch.cat(maps, 1)

        modules["rpn.head"].register_forward_hook(
            keep("", lambda o: {"objectness": flat(o[0], 1), "rpn_deltas": flat(o[1], 4)})
        )
        for name in ("mask", "keypoint"):
            modules[f"roi_heads.{name}_predictor"].register_forward_hook(
                keep("", lambda o, name=name: {f"{name}_logits": o.permute(0, 2, 3, 1)})
            )
    with torch.inference_mode():
        found = network(list(torch.from_numpy(images()).permute(0, 3, 1, 2)))
    arrays = {name: thin(value.numpy()) for name, value in given.items()}
    for i, one in enumerate(found):
        scores = one["scores"].numpy()
        # Enough, and so far apart that rounding cannot change their order.
        assert len(scores) > 3 and np.abs(np.diff(scores)).min() > 2e-7, scores
        for name in ("boxes", "scores", "labels", "keypoints"):
            if name in one:
                arrays[f"{name}{i}"] = one[name].numpy()
    return shapes, arrays


def record_detr():
    """The same of DETR, whose names are those of its files."""
    config = hf.DetrConfig(
        use_timm_backbone=False, num_labels=CLASSES, num_queries=7, d_model=16, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24,
        backbone_config=hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1],
            layer_type="basic", out_features=["stage4"],
        ),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        hf.DetrForObjectDetection(config).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        shapes = {name: a.shape for name, a in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(weights(shapes), file, metadata={"format": "pt"})
        network = hf.DetrForObjectDetection.from_pretrained(folder).eval()
    said = []
    for layer in network.model.decoder.layers:
        layer.register_forward_hook(lambda module, arguments, output: said.append(output))
    labels = []
    for boxes, label, valid in zip(*(truth()[n] for n in ("boxes", "box_label", "box_valid"))):  # noqa: B905
        boxes, label = torch.from_numpy(boxes[valid]), torch.from_numpy(label[valid])
        relative = box_ops.box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([*SIZE[::-1]] * 2)
        labels.append({"boxes": relative, "class_labels": label})
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.inference_mode():
        pixels = (torch.from_numpy(images()).permute(0, 3, 1, 2) - mean) / std
        output = network(pixels, labels=labels)
        x = torch.stack([network.model.decoder.layernorm(x) for x in said], 1)
        logits, boxes = network.class_labels_classifier(x), network.bbox_predictor(x).sigmoid()
    assert torch.equal(logits[:, -1], output.logits) and torch.equal(
        boxes[:, -1], output.pred_boxes
    )
    losses = {name: output.loss_dict[f"loss_{name}"] for name in ("ce", "bbox", "giou")}
    return shapes, {
        "logits": logits.numpy(),
        "cxcywh": boxes.numpy(),
        "memory": thin(output.encoder_last_hidden_state.numpy()),
        **{f"loss_{name}": value.numpy() for name, value in losses.items()},
    }


def published_shapes():
    """{peer: {name: shape}} of the published models, what all have under the name "all"."""
    peers = {
        "retinanet": detection.retinanet_resnet50_fpn,
        "fcos": detection.fcos_resnet50_fpn,
        "faster_rcnn": detection.fasterrcnn_resnet50_fpn,
        "mask_rcnn": detection.maskrcnn_resnet50_fpn,
        "keypoint_rcnn": detection.keypointrcnn_resnet50_fpn,
    }
    found = {}
    for peer, build in peers.items():
        arrays = build(weights=None, weights_backbone=None).state_dict()
        found[peer] = {name: list(array.shape) for name, array in arrays.items()}
    names = [name for name in found["fcos"] if all(name in of for of in found.values())]
    common = {n: found["fcos"][n] for n in names if len({str(of[n]) for of in found.values()}) == 1}
    own = {p: {n: s for n, s in of.items() if n not in common} for p, of in found.items()}
    return {"all": common, **own}


def main():
    """Writes the records."""
    PUBLISHED.write_text(json.dumps(published_shapes()) + "\n")
    print(PUBLISHED, PUBLISHED.stat().st_size)
    arrays = {}
    recorded = {peer: record(network) for peer, network in peers().items()}
    for peer, (shapes, given) in {**recorded, "detr": record_detr()}.items():
        text = json.dumps(shapes)
        arrays[f"{peer}/shapes"] = np.frombuffer(text.encode(), np.uint8)
        arrays.update({f"{peer}/{name}": value for name, value in given.items()})
        print(peer, {n: (v.shape, float(abs(v).max())) for n, v in given.items()})
    np.savez_compressed(RECORD, **arrays)
    print(RECORD, RECORD.stat().st_size)


if __name__ == "__main__":
    main()
