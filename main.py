"""Flags -> config -> build -> fit.

python main.py --config=configs/diffusion.py
python main.py --mode=evaluate --workdir=runs/diffusion
"""

import argparse
import logging
import re
import sys
from pathlib import Path

from jax.errors import JaxRuntimeError

from cvjax import config as configs
from cvjax.errors import InputError, nearest
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
        if flags.config is not None:
            config = configs.override(configs.read(flags.config), changes)
        elif flags.workdir is not None and flags.mode != "train":
            config = configs.override(configs.load_json(flags.workdir / "config.json"), changes)
        else:
            raise InputError("--config is missing: python main.py --config=configs/diffusion.py")
        return run(config, flags.workdir or default_workdir(flags.config, changes), flags.mode)
    except (InputError, NonFiniteError) as error:
        if "--debug" in arguments:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except JaxRuntimeError as error:
        # What a compiled program's callback raises comes as the last line of a traceback in text.
        raised = re.search(rf"{InputError.__name__}: (.+)", str(error))
        if raised is None or "--debug" in arguments:
            raise
        print(f"error: {raised[1]}", file=sys.stderr)
        return 2


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags, and the changes to the config as (path, text)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--config", help="a recipe, configs/<name>.py, or its small version ...py:tiny"
    )
    parser.add_argument("--workdir", type=Path, help="where the run is kept (default: runs/<name>)")
    parser.add_argument("--mode", default="train", help="train, evaluate or predict")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags, others = parser.parse_known_args(arguments)
    known = ("--config", "--config.<field>", "--workdir", "--mode", "--distributed", "--debug")
    changes = []
    for other in others:
        field, equals, text = other.partition("=")
        if not field.startswith("--config."):
            raise InputError(f"{other}: no such flag{nearest(field, known)}")
        if not equals:
            raise InputError(f"{other} has no value; write {other}=...")
        changes.append((field.removeprefix("--config."), text))
    if flags.mode not in ("train", "evaluate", "predict"):
        raise InputError(
            f"--mode={flags.mode}{nearest(flags.mode, ('train', 'evaluate', 'predict'))}"
        )
    return flags, changes


if __name__ == "__main__":
    # Here, not in main(), and by force: an imported package may have set up logging before us.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("cvjax").setLevel(logging.INFO)
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)  # it is raised as well
    sys.exit(main())
