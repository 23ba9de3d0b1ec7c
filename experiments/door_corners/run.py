"""A head of one's own: the four corners of each door, wherever the door has been turned.

    python experiments/door_corners/run.py

Nothing in cvjax knows of corners. `CornerHead` is a module with two functions, of one image each;
it is handed to the detector under a name, and the task is told which field of the data it learns.
"""

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from cvjax.detection.box_head import BoxHead
from cvjax.detection.losses import smooth_l1
from cvjax.detection.rcnn import RCNN, PyramidPool
from cvjax.detection.rpn import RPN, RPNHead
from cvjax.detection.sampling import Samples
from cvjax.detection.task import Detection
from cvjax.nn.features import Patches
from cvjax.nn.fpn import FPN, Pyramid
from cvjax.nn.resnet import ResNet
from experiments.recipes import fitted

SIZE, MOST = 64, 2  # pixels of an image, and doors in it
PHOTOGRAPHS = {"train": "china.jpg", "test": "flower.jpg"}


class CornerHead(nn.Module):
    """Where the corners of a door are in its box: features [p, s, s, c] -> [p, 4, 2], x and y.

    In half sides of the box from its middle: -1 and 1 are its borders.
    """

    size: int = 7
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See above."""
        x = nn.relu(nn.Dense(self.features)(x.reshape(len(x), -1)))
        return nn.Dense(8)(x).reshape(-1, 4, 2)

    def losses(
        self, outputs: jax.Array, samples: Samples, truth: Mapping[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """What it costs, and how many doors that is divided by."""
        low, high = samples.boxes[:, None, :2], samples.boxes[:, None, 2:]
        half = jnp.maximum(high - low, 1.0) / 2
        target = (truth["corners"][samples.index] - (low + high) / 2) / half
        away = jnp.sum(smooth_l1(outputs, target, beta=0.1), (1, 2))
        counts = samples.foreground
        return {"corners": (jnp.sum(jnp.where(counts, away, 0.0)), jnp.sum(counts))}

    def detections(
        self, outputs: jax.Array, found: Mapping[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """The corners in pixels, [m, 4, 2]."""
        low, high = found["boxes"][:, None, :2], found["boxes"][:, None, 2:]
        return {"corners": (low + high) / 2 + outputs * (high - low) / 2}


class Doors:
    """Painted doors on crops of a photograph; the same index is the same picture.

    Beside what every detector learns from a record has "corners", float32 [2, 4, 2]: x, y in pixels
    of the upper left, upper right, lower right and lower left corner, as the door hangs.
    """

    def __init__(self, split: str, count: int):
        self.split, self.count = split, count
        self.photograph = Image.fromarray(load_sample_image(PHOTOGRAPHS[split]))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((list(PHOTOGRAPHS).index(self.split), index))
        width, height = self.photograph.size
        x, y = rng.integers((width - 2 * SIZE, height - 2 * SIZE))
        crop = (x, y, x + 2 * SIZE, y + 2 * SIZE)
        image = self.photograph.resize((SIZE, SIZE), box=crop)
        corners = np.zeros((MOST, 4, 2), np.float32)
        boxes = np.zeros((MOST, 4), np.float32)
        number = rng.integers(1, MOST + 1)
        for row in range(number):
            # Each has its half of the picture, so that none hides another.
            place = np.array([SIZE * (row + 0.5) / number, SIZE / 2]) + rng.uniform(-4, 4, 2)
            corners[row] = place + _quadrilateral(rng, SIZE / number)
            _paint(ImageDraw.Draw(image), corners[row], rng)
            boxes[row] = *corners[row].min(0), *corners[row].max(0)
        return {
            "image": np.asarray(image),
            "boxes": boxes,
            "box_label": np.zeros(MOST, np.int32),
            "box_valid": np.arange(MOST) < number,
            "corners": corners,
        }


def _quadrilateral(rng: np.random.Generator, room: float) -> np.ndarray:
    """Four corners around 0, 0: a door turned, and seen from somewhere."""
    high = rng.uniform(22, 36)
    wide = high * rng.uniform(0.4, 0.6)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (wide / 2, high / 2)
    corners = corners * (1 + rng.uniform(-0.15, 0.15, (4, 2)))
    angle = np.deg2rad(rng.uniform(-20, 20))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = corners @ turn
    return corners * min(1, (room / 2 - 4) / np.abs(corners[:, 0]).max())


def _paint(draw: ImageDraw.ImageDraw, corners: np.ndarray, rng: np.random.Generator) -> None:
    """A leaf, its frame and its handle; the handle is on the right."""
    colour, frame = rng.integers(40, 256, 3), rng.integers(0, 256, 3)
    outline = [tuple(corner) for corner in corners.tolist()]
    draw.polygon(outline, fill=tuple(colour.tolist()))
    draw.line([*outline, outline[0]], fill=tuple(frame.tolist()), width=2)
    left, right = (corners[a] * 0.45 + corners[b] * 0.55 for a, b in ((0, 3), (1, 2)))
    x, y = 0.2 * left + 0.8 * right
    draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(250, 240, 60))


class CornerError:
    """How far the corners of the doors that were found are from the true ones: an evaluator."""

    def __init__(self):
        self.distances, self.doors = [], 0

    def add(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """A door is found by the first that has its corners within 8 pixels, in the mean."""
        for i in np.flatnonzero(batch["valid"]):
            true = batch["corners"][i][batch["box_valid"][i]]
            self.doors += len(true)
            for corners, sure in zip(outputs["corners"][i], outputs["detected"][i], strict=True):
                if not sure or not len(true):
                    break
                away = np.linalg.norm(corners - true, axis=-1)
                nearest = np.argmin(away.mean(1))
                if away[nearest].mean() < 8:
                    self.distances.append(away[nearest].mean())
                    true = np.delete(true, nearest, axis=0)

    def result(self) -> dict[str, float]:
        """The mean over the doors that were found, in pixels, and the share of these."""
        mean = float(np.mean(self.distances)) if self.distances else float("nan")
        return {"corner_error": mean, "found": len(self.distances) / max(self.doors, 1)}


def task(width: int = 16) -> Detection:
    """Faster R-CNN with one head more."""
    backbone = Patches(ResNet(stem="cifar", width=width, stage_sizes=(1, 1)), 2)  # strides 2, 4
    encoder = Pyramid(backbone, FPN(2 * width), ("stage2",))
    rpn = RPN(RPNHead(1, 2 * width), scale=6.0, ratios=(1.5,), samples=32, candidates=32,
              proposals=16)  # fmt: skip
    box_head = BoxHead(1, features=64, candidates=16, outputs=4, score=0.3)
    pool = PyramidPool(levels=1, canonical_level=2, samples=1)
    heads = {"corners": CornerHead()}
    model = RCNN(encoder, rpn, box_head, heads, pool, samples=16, fraction=0.5)
    return Detection(model, fields=("corners",))


def main(steps: int = 300, test: int = 200, width: int = 16) -> dict[str, float]:
    """Trains, prints what came of it, and draws some of the test pictures beside this file."""
    detector, held_out = task(width), Doors("test", test)
    rate = optax.cosine_onecycle_schedule(steps, 3e-3, 0.1)
    result = fitted(
        detector, Doors("train", 20_000), steps=steps, batch_size=16, eval_data=held_out,
        evaluators={"doors": CornerError()}, optimizer=optax.adamw(rate, weight_decay=1e-4),
        evaluate_every=steps, log_every=50,
    )  # fmt: skip
    found = {name: value for name, value in result.history[-1].items() if "doors/" in name}
    print(found)
    _picture(detector, result.state, held_out)
    return found


def _picture(detector: Detection, state: object, data: Doors, count: int = 8) -> None:
    """True corners white, found ones red, four times as large."""
    records = [data[i] for i in range(count)]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    batch |= {"image": batch["image"] / np.float32(255), "valid": np.ones(count, bool)}
    predict = jax.jit(functools.partial(detector.predict, rng=jax.random.key(0)))
    outputs = predict(state.params, state.model_state, batch)
    sheet = Image.new("RGB", (4 * SIZE * count // 2, 8 * SIZE))
    for i, record in enumerate(records):
        image = Image.fromarray(record["image"]).resize((4 * SIZE, 4 * SIZE))
        draw = ImageDraw.Draw(image)
        found = np.asarray(outputs["corners"][i])[np.asarray(outputs["detected"][i])]
        true = record["corners"][record["box_valid"]]
        for corners, colour in [(c, "white") for c in true] + [(c, "red") for c in found]:
            draw.line([tuple(point) for point in 4 * corners[[0, 1, 2, 3, 0]]], colour, 2)
        sheet.paste(image, (4 * SIZE * (i % (count // 2)), 4 * SIZE * (i // (count // 2))))
    sheet.save(Path(__file__).with_name("doors.png"))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    main()
