"""How others name the parameters of vision and Swin transformers: rules for `weight_names`."""

VIT_TIMM = (
    ("cls_token", "class_token"),
    ("reg_token", "register_tokens"),
    ("pos_embed", "position"),
    (r"patch_embed\.proj", "patch_embedding"),
    *(
        (rf"blocks\.(\d+)\.{theirs}", rf"block_\1/{ours}")
        for theirs, ours in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            (r"attn\.qkv", "attention/query_key_value"),
            (r"attn\.proj", "attention/output"),
            (r"ls([12])\.gamma", r"layer_scale\2"),
            (r"mlp\.fc1", "hidden"),
            (r"mlp\.fc2", "output"),
        )
    ),
    ("norm", "norm"),
    ("fc_norm", "mean_norm"),
    ("head", "head"),
)
VIT_TORCHVISION = (
    ("class_token", "class_token"),
    (r"encoder\.pos_embedding", "position"),
    ("conv_proj", "patch_embedding"),
    *(
        (rf"encoder\.layers\.encoder_layer_(\d+)\.{theirs}", rf"block_\1/{ours}")
        for theirs, ours in (
            ("ln_1", "norm1"),
            ("ln_2", "norm2"),
            (r"self_attention\.in_proj", "attention/query_key_value"),
            (r"self_attention\.out_proj", "attention/output"),
            (r"mlp\.(?:0|linear_1)", "hidden"),
            (r"mlp\.(?:3|linear_2)", "output"),
        )
    ),
    (r"encoder\.ln", "norm"),
    (r"heads\.head", "head"),
)
# With DINOv2, with and without registers; in its files and, where that differs, in the program.
VIT_HF = (
    (r"(?:\w+\.)?embeddings\.cls_token", "class_token"),
    (r"(?:\w+\.)?embeddings\.register_tokens", "register_tokens"),
    (r"(?:\w+\.)?embeddings\.position_embeddings", "position"),
    (r"(?:\w+\.)?embeddings\.patch_embeddings\.projection", "patch_embedding"),
    *(
        (rf"(?:\w+\.)?(?:encoder\.layer|layers)\.(\d+)\.{theirs}", rf"block_\1/{ours}")
        for theirs, ours in (
            ("(?:layernorm_before|norm1)", "norm1"),
            ("(?:layernorm_after|norm2)", "norm2"),
            (r"attention\.(?:attention\.)?query_key_value", "attention/query_key_value"),
            (r"attention\.(?:output\.dense|o_proj)", "attention/output"),
            (r"layer_scale([12])\.lambda1", r"layer_scale\2"),
            (r"(?:intermediate\.dense|mlp\.fc1)", "hidden"),
            (r"(?:output\.dense|mlp\.fc2)", "output"),
        )
    ),
    (r"(?:\w+\.)?layernorm", "norm"),
    ("classifier", "head"),
)

SWIN_BLOCK = (
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    (r"attn\.qkv", "attention/query_key_value"),
    (r"attn\.proj", "attention/output"),
    (r"attn\.relative_position_bias_table", "attention/relative_position"),
    (r"mlp\.(?:fc1|0)", "hidden"),
    (r"mlp\.(?:fc2|3)", "output"),
)
SWIN = (
    (r"patch_embed\.proj", "patch_embedding"),
    (r"patch_embed\.norm", "patch_norm"),
    *(
        (rf"layers\.(\d)\.blocks\.(\d+)\.{theirs}", rf"stage<1>_\2/{ours}")
        for theirs, ours in SWIN_BLOCK
    ),
    ("norm", "norm"),
    (r"head(?:\.fc)?", "head"),
)
SWIN_TIMM = (*SWIN, (r"layers\.(\d)\.downsample\.(norm|reduction)", r"stage<1>_\2"))
SWIN_MICROSOFT = (  # a stage ends with what timm begins the next one with
    *SWIN,
    *(
        (rf"layers\.{stage - 2}\.downsample\.(norm|reduction)", rf"stage{stage}_\1")
        for stage in (2, 3, 4)
    ),
)
SWIN_TORCHVISION = (
    (r"features\.0\.0", "patch_embedding"),
    (r"features\.0\.2", "patch_norm"),
    *(
        (rf"features\.{2 * stage - 1}\.(\d+)\.{theirs}", rf"stage{stage}_\1/{ours}")
        for stage in (1, 2, 3, 4)
        for theirs, ours in SWIN_BLOCK
    ),
    *(
        (rf"features\.{2 * stage - 2}\.(norm|reduction)", rf"stage{stage}_\1")
        for stage in (2, 3, 4)
    ),
    ("norm", "norm"),
    ("head", "head"),
)
SWIN_HF = (
    (r"(?:swin\.)?embeddings\.patch_embeddings\.projection", "patch_embedding"),
    (r"(?:swin\.)?embeddings\.norm", "patch_norm"),
    *(
        (rf"(?:swin\.)?encoder\.layers\.(\d)\.blocks\.(\d+)\.{theirs}", rf"stage<1>_\2/{ours}")
        for theirs, ours in (
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            (r"attention\.(?:self\.)?query_key_value", "attention/query_key_value"),
            (r"attention\.(?:output\.dense|o_proj)", "attention/output"),
            (r"attention\..+\.relative_position_bias_table", "attention/relative_position"),
            (r"(?:intermediate\.dense|mlp\.fc1)", "hidden"),
            (r"(?:output\.dense|mlp\.fc2)", "output"),
        )
    ),
    *(
        (
            rf"(?:swin\.)?encoder\.layers\.{stage - 2}\.downsample\.(norm|reduction)",
            rf"stage{stage}_\1",
        )
        for stage in (2, 3, 4)
    ),
    (r"(?:swin\.)?layernorm", "norm"),
    ("classifier", "head"),
)
