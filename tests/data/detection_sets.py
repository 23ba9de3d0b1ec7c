"""Small sets of real photographs in the formats of COCO and VOC, written for the tests."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

# Of scikit-image, which come with it: file, category, box x y w h in its pixels, outlined by eye.
OBJECTS = (
    ("astronaut.png", "person", (95, 5, 275, 505)),
    ("astronaut.png", "rocket", (377, 0, 60, 330)),
    ("chelsea.png", "cat", (90, 22, 280, 275)),
    ("rocket.jpg", "rocket", (298, 75, 32, 252)),
    ("coffee.png", "cup", (155, 60, 290, 260)),
    ("camera.png", "person", (80, 65, 190, 445)),
    ("horse.png", "horse", (15, 10, 365, 310)),
)
CATEGORIES = ("person", "cat", "cup", "horse", "rocket")
POINTS = ("nose", "left_eye", "right_eye")


def photographs():
    """{name: uint8 [h, w, 3]} of scikit-image and scikit-learn; one shows nothing of the kinds."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        pytest.skip("scikit-image is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    names = {name for name, _, _ in OBJECTS}
    found = {name: np.asarray(Image.open(folder / name).convert("RGB")) for name in sorted(names)}
    return {**found, "flower.jpg": load_sample_image("flower.jpg")}


def write_coco(root, *, longest=160, crowd=True):
    """Writes images/ and annotations.json below `root`, each photograph scaled down; returns them.

    Category ids have gaps and annotation ids begin with 0; there are polygons, both kinds of run
    lengths, a crowd, one to ignore, keypoints and an image without any object.
    """
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, (name, pixels) in enumerate(photographs().items()):
        scale = longest / max(pixels.shape[:2])
        size = [round(side * scale) for side in pixels.shape[1::-1]]
        Image.fromarray(pixels).resize(size).save(root / "images" / name)
        images.append({"id": 7 + number, "file_name": name, "width": size[0], "height": size[1]})
        for kind, box in ((kind, box) for file, kind, box in OBJECTS if file == name):
            x, y, w, h = (round(value * scale, 2) for value in box)
            w, h = min(w, size[0] - x), min(h, size[1] - y)
            outline = [[x, y + h, x + w / 2, y, x + w, y + h]]
            annotations.append({
                "id": len(annotations), "image_id": 7 + number, "bbox": [x, y, w, h],
                "category_id": 3 * CATEGORIES.index(kind) + 2, "area": w * h / 2, "iscrowd": 0,
                "segmentation": outline,
            })  # fmt: skip
            if kind in ("person", "cat"):
                annotations[-1]["keypoints"] = [
                    x + w / 2, y + h / 4, 2, x + w / 3, y + h / 5, 1, 0, 0, 0,
                ]  # fmt: skip
        if crowd and name == "coffee.png":
            height, width = size[1], size[0]
            runs = [height * 3 + 2, height - 2, height * (width - 4)]
            annotations.append({
                "id": len(annotations), "image_id": 7 + number, "category_id": 8, "iscrowd": 1,
                "bbox": [3, 2, 1, height - 2], "area": height - 2,
                "segmentation": {"size": [height, width], "counts": runs},
            })  # fmt: skip
        if crowd and name == "horse.png":
            annotations.append({
                "id": len(annotations), "image_id": 7 + number, "category_id": 11, "ignore": 1,
                "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0,
                "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]],
            })  # fmt: skip
    categories = [
        {"id": 3 * k + 2, "name": name, "supercategory": "thing"}
        for k, name in reversed(list(enumerate(CATEGORIES)))
    ]
    for one in categories:
        if one["name"] == "person":
            one |= {"keypoints": list(POINTS), "skeleton": [[1, 2], [1, 3]]}
    data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(data))
    return data
