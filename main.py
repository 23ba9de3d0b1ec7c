"""Flags -> config -> build -> fit.

python main.py --config=configs/diffusion.py
python main.py --mode=evaluate --workdir=runs/diffusion
"""

from cvjax import cpu

if __name__ == "__main__":
    cpu.begin_again()  # before anything heavy is imported

import argparse
import logging
import sys
from pathlib import Path

from cvjax import config as configs
from cvjax.errors import InputError, nearest
from cvjax.nn.onednn import use_onednn
from cvjax.run import default_workdir, run
from cvjax.train.guards import NonFiniteError
from cvjax.train.sharding import join_processes


def main(arguments: list[str] | None = None) -> int:
    """Runs one recipe; returns the exit code: 0, 2 for bad input, 128 + n after signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        flags, changes = parse(arguments)
        if flags.distributed:
            join_processes()
        if flags.onednn:
            use_onednn()
        if flags.config is None and (flags.workdir is None or flags.mode == "train"):
            raise InputError("--config is missing: python main.py --config=configs/diffusion.py")
        workdir = flags.workdir or default_workdir(flags.config, changes)
        # What was trained is what is evaluated, also where the recipe has changed since.
        saved = None if flags.mode == "train" else workdir / "config.json"
        config = configs.load_json(saved) if saved else configs.read(flags.config)
        return run(configs.override(config, changes), workdir, flags.mode)
    except (InputError, NonFiniteError, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            raise
        print(f"error: {' '.join(str(error).split()) or 'interrupted'}", file=sys.stderr)
        return {InputError: 2, KeyboardInterrupt: 130}.get(type(error), 1)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags, and the changes to the config as (path, text)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", help="a recipe, configs/<name>.py, or small: ...py:tiny")
    parser.add_argument("--workdir", type=Path, help="where the run is kept (default: runs/<name>)")
    parser.add_argument("--mode", default="train", help="train, evaluate or predict")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--onednn", action="store_true", help="convolutions on a CPU by oneDNN")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags, others = parser.parse_known_args(arguments)
    modes = ("train", "evaluate", "predict")
    if flags.mode not in modes:
        raise InputError(f"--mode={flags.mode}{nearest(flags.mode, modes)}")
    return flags, configs.read_changes(others, vars(flags))


if __name__ == "__main__":
    # Here, not in main(), and by force: an imported package may have set up logging before us.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("cvjax").setLevel(logging.INFO)
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)  # it is raised as well
    sys.exit(main())
