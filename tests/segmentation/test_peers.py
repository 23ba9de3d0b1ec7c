"""The numbers of published implementations, where they are installed."""

import jax
import numpy as np
import pytest

from cvjax.nn.bilinear import resize_bilinear
from cvjax.segmentation.heads import SegFormer

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("after", [(9, 13), (3, 20), (2, 3), (50, 7)])
def test_resize_is_that_of_torch(after):
    image = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(image.transpose(0, 3, 1, 2)), size=after, mode="bilinear", align_corners=False
    )
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(resize_bilinear(image, *after), expected, rtol=1e-5, atol=1e-6)


def test_segformer_is_that_of_transformers():
    peers = pytest.importorskip("transformers.models.segformer.modeling_segformer")
    torch.manual_seed(0)
    channels, features, classes, size = (4, 6, 8, 10), 12, 5, (65, 50)
    config = peers.SegformerConfig(
        hidden_sizes=list(channels), decoder_hidden_size=features, num_labels=classes
    )
    peer = peers.SegformerDecodeHead(config).eval()
    with torch.no_grad():
        for name, tensor in peer.batch_norm.state_dict().items():
            if tensor.ndim:
                tensor.uniform_(0.5, 2.0) if name == "running_var" else tensor.normal_()
        maps = [
            torch.randn(2, c, *s)
            for c, s in zip(channels, ((17, 13), (9, 7), (5, 4), (3, 2)), strict=True)
        ]
        expected = torch.nn.functional.interpolate(
            peer(maps), size=size, mode="bilinear", align_corners=False
        )
    weights = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    linear = "linear_projections" if "linear_projections.0.proj.weight" in weights else "linear_c"
    params = {
        f"linear{i}": {
            "kernel": weights[f"{linear}.{i}.proj.weight"].T,
            "bias": weights[f"{linear}.{i}.proj.bias"],
        }
        for i in range(4)
    }
    # There the coarsest map is the first of those that are joined.
    joined = weights["linear_fuse.weight"].reshape(features, 4, features)[:, ::-1]
    norm = {"scale": weights["batch_norm.weight"], "bias": weights["batch_norm.bias"]}
    params["join"] = {
        "conv": {"kernel": joined.reshape(features, -1).T[None, None]},
        "norm": norm,
    }
    params["classifier"] = {
        "score": {
            "kernel": weights["classifier.weight"][..., 0, 0].T,
            "bias": weights["classifier.bias"],
        }
    }
    statistics = {"mean": weights["batch_norm.running_mean"],
                  "var": weights["batch_norm.running_var"]}  # fmt: skip
    variables = {"params": params, "batch_stats": {"join": {"norm": statistics}}}
    ours = [np.asarray(x).transpose(0, 2, 3, 1) for x in maps]
    found = jax.jit(SegFormer(classes, features).apply, static_argnums=2)(variables, ours, size)
    expected = expected.numpy().transpose(0, 2, 3, 1)
    # float32 sums in another order.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
