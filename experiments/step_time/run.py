"""How long are our training steps and predictions beside PyTorch's, on this machine?

    pip install torch==2.13.0 timm && python experiments/step_time/run.py

Each network runs in two processes of ours (as it is, and with convolutions by oneDNN) and three of
PyTorch's (eager, channels-last, compiled and channels-last), which take turns; the ratios are ours
to the fastest of theirs, round by round. Prints the table as Markdown. Add names to measure only
those.
"""

import argparse
from pathlib import Path

from networks import NETWORKS
from turns import HEADER, compare


def main(names: list[str]) -> None:
    """Prints a row for each network and kind."""
    print(HEADER)
    for name in names:
        for kind in ("train", "inference"):
            print(compare(Path(__file__).parent / "worker.py", name, kind), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=["all", *NETWORKS], default="all")
    names = parser.parse_args().names
    main(list(NETWORKS) if "all" in names else names)
