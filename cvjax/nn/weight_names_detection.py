"""How others name the parameters of detectors, but for their backbones: rules for `weight_names`.

Of layers that torchvision has named in two ways the files that it publishes have the older one.
"""

DEPTH = 8  # the most layers of a tower or head

_PYRAMID = (
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?", "encoder/fpn/lateral<1>"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?", "encoder/fpn/output<1>"),
    (r"backbone\.fpn\.extra_blocks\.p6", "encoder/fpn/extra1"),
    (r"backbone\.fpn\.extra_blocks\.p7", "encoder/fpn/extra2"),
)
_TOWERS = (("classification", "class"), ("regression", "box"))

RETINANET = (
    *_PYRAMID,
    *(
        rule
        for theirs, ours in _TOWERS
        for rule in (
            (rf"head\.{theirs}_head\.conv\.(\d)\.0", f"head/{ours}_tower/conv<1>"),
            (rf"head\.{theirs}_head\.conv\.(\d)\.1", f"head/{ours}_tower/norm<1>"),
            *(
                (rf"head\.{theirs}_head\.conv\.{2 * i}", f"head/{ours}_tower/conv{i + 1}")
                for i in range(DEPTH)
            ),
        )
    ),
    (r"head\.classification_head\.cls_logits", "head/logits"),
    (r"head\.regression_head\.bbox_reg", "head/deltas"),
)
FCOS = (
    *_PYRAMID,
    *(
        (rf"head\.{theirs}_head\.conv\.{3 * i + place}", f"head/{ours}_tower/{layer}{i + 1}")
        for theirs, ours in _TOWERS
        for i in range(DEPTH)
        for place, layer in enumerate(("conv", "norm"))
    ),
    (r"head\.classification_head\.cls_logits", "head/logits"),
    (r"head\.regression_head\.bbox_reg", "head/distances"),
    (r"head\.regression_head\.bbox_ctrness", "head/centerness"),
)
RCNN = (
    *_PYRAMID,
    (r"rpn\.head\.conv", "rpn/head/conv1"),
    (r"rpn\.head\.conv\.(\d)\.0", "rpn/head/conv<1>"),
    (r"rpn\.head\.(cls_logits|bbox_pred)", r"rpn/head/\1"),
    (r"roi_heads\.box_head\.(fc6|fc7)", r"box_head/\1"),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)", r"box_head/\1"),
    (r"roi_heads\.mask_head\.(mask_fcn\d)", r"heads_mask/\1"),
    (r"roi_heads\.mask_head\.(\d)\.0", "heads_mask/mask_fcn<1>"),
    (r"roi_heads\.mask_predictor\.(conv5_mask|mask_fcn_logits)", r"heads_mask/\1"),
    *(
        (rf"roi_heads\.keypoint_head\.{2 * i}", f"heads_keypoints/conv_fcn{i + 1}")
        for i in range(DEPTH)
    ),
    (r"roi_heads\.keypoint_predictor\.kps_score_lowres", "heads_keypoints/kps_score_lowres"),
)

# In its files and, where that differs, in the program; but for the backbone.
_LAYER = (
    (r"self_attn\.query_key_value", "attention/query_key_value"),
    (r"self_attn\.o(?:ut)?_proj", "attention/output"),
    ("self_attn_layer_norm", "attention_norm"),
    (r"encoder_attn\.query_key_value", "memory/query_key_value"),
    (r"encoder_attn\.o(?:ut)?_proj", "memory/output"),
    ("encoder_attn_layer_norm", "memory_norm"),
    (r"(?:mlp\.)?fc1", "hidden"),
    (r"(?:mlp\.)?fc2", "output"),
    ("final_layer_norm", "output_norm"),
)
DETR_HF = (
    (r"model\.input_projection", "input"),
    *(
        (rf"model\.(en|de)coder\.layers\.(\d+)\.{theirs}", rf"\1coder_\2/{ours}")
        for theirs, ours in _LAYER
    ),
    (r"model\.decoder\.layernorm", "decoder_norm"),
    ("query_positions", "query_positions"),
    ("class_labels_classifier", "logits"),
    (r"bbox_predictor\.layers\.(\d)", "box<1>"),
)
