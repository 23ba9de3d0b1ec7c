"""How long are the main job's training step and its whole sampler beside PyTorch's?

    pip install torch==2.13.0 && python experiments/diffusion_speed/run.py

The same U-Net and the same sampler in PyTorch (`torch_unet.py`), three ways, and ours, in processes
that take turns; first it is shown that both compute the same. Prints the table as Markdown.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.step_time.turns import HEADER, TORCH_PYTHON, compare

WORKER = Path(__file__).parent / "worker.py"

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags but --help
    subprocess.run([TORCH_PYTHON, str(WORKER), "same"], check=True)
    print(HEADER)
    for optimizer, kind in (("ADAM", "train"), ("MUON", "train"), ("ADAM", "sample")):
        print(compare(WORKER, optimizer, kind), flush=True)
