"""Asks pytorch-fid and torchvision what their Inception networks give; see `test_inception.py`.

pip install -e '.[parity]' && pip install --no-deps pytorch-fid==0.3.0
python -m tests.nn.record_inception
"""

import json

import numpy as np
import torch

from tests.nn import record_parity  # first: it lets torchvision be imported
from tests.nn.parity import weights
from tests.nn.test_inception import BLOCKS, RECORD, image


def record(network):
    """The shapes of the weights, and maps and logits for the test's image, NHWC."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict({n: torch.from_numpy(a) for n, a in weights(shapes).items()})
    network.eval()
    given = {}
    for stage, block in BLOCKS.items():
        getattr(network, block).register_forward_hook(
            lambda module, inputs, output, stage=stage: given.update(
                {stage: output.numpy().transpose(0, 2, 3, 1)}
            )
        )
    with torch.no_grad():
        x = torch.from_numpy(image().transpose(0, 3, 1, 2).copy())
        given["logits"] = network(x).numpy()
        given["resized"] = torch.nn.functional.interpolate(
            x, size=(11, 120), mode="bilinear", align_corners=False
        ).numpy().transpose(0, 2, 3, 1)  # fmt: skip
    return shapes, given


def main():
    """Writes the record."""
    from pytorch_fid import inception as fid
    from torchvision.models import inception_v3

    class NoWeights(dict):
        """What `load_state_dict` is given in place of a download."""

    fid.load_state_dict_from_url = lambda *args, **kwargs: NoWeights()
    original = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, given, *args, **kwargs: (
        None if isinstance(given, NoWeights) else original(self, given, *args, **kwargs)
    )
    arrays = {}
    for name, network in (
        ("fid", fid.fid_inception_v3()),
        ("torchvision", inception_v3(weights=None, init_weights=False, aux_logits=True)),
    ):
        shapes, given = record(network)
        arrays[f"{name}/shapes"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
        for key, value in given.items():
            arrays[f"{name}/{key}"] = record_parity.thin(value) if value.ndim > 2 else value
    np.savez_compressed(RECORD, **arrays)
    print(RECORD, RECORD.stat().st_size)


if __name__ == "__main__":
    main()
