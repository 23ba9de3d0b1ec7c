"""Speed of suppression and of ROIAlign on one CPU thread: `taskset -c 0 python run.py`."""

import os
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.detection.nms import nms
from cvjax.detection.roi_align import roi_align


def milliseconds(function, *arguments, runs: int) -> float:
    """The least of `runs` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    """Prints one line for each operation."""
    rng = np.random.default_rng(0)
    for count in (1000, 4000):
        low = rng.uniform(0, 600, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 200, (count, 2))], 1)
        boxes, scores = jnp.asarray(boxes, jnp.float32), jnp.asarray(rng.random(count), jnp.float32)
        keep = jax.jit(lambda b, s: nms(b, s, iou_threshold=0.5, max_outputs=100))
        print(
            f"NMS {count} -> 100: {milliseconds(keep, boxes, scores, runs=20):.2f} ms", flush=True
        )
    features = jnp.asarray(rng.normal(size=(1, 160, 200, 256)), jnp.float32)
    rois = boxes[None, :1000]
    align = jax.jit(lambda f: roi_align([f], rois, strides=(4,), output_size=(7, 7)))
    print(f"ROIAlign forward: {milliseconds(align, features, runs=2):.0f} ms", flush=True)
    back = jax.jit(jax.grad(lambda f: jnp.sum(align(f) ** 2)))
    print(
        f"ROIAlign forward and backward: {milliseconds(back, features, runs=1):.0f} ms", flush=True
    )


if __name__ == "__main__":
    main()
