"""What experiments that look at recipes share: their runs, trained if need be, and their errors."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import main
from cvjax.errors import InputError
from cvjax.train.loop import Result, fit

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs"


def trained(
    recipe: str, given: Path | None, *flags: str, name: str | None = None, last: str = ""
) -> Path:
    """The folder of a recipe's run: the one that is given, or runs/`name`, trained if need be.

    Args:
      recipe: `name` without another.
      given: it must hold a run: who mistypes its name waits for no training.
      flags: of the training.
      last: the stage that ends it, where there are several.

    Raises InputError where there is no run, and where training did not come to its end.
    """
    workdir = given or RUNS / (name or recipe)
    if (workdir / last / "config.json").exists():
        return workdir
    if given:
        raise InputError(
            f"{given} holds no run of configs/{recipe}.py; leave the flag out, and one is trained"
        )
    if main.main([f"--config={ROOT}/configs/{recipe}.py", f"--workdir={workdir}", *flags]):
        raise InputError(f"{workdir} was not trained to its end")
    return workdir


def trained_judge(given: Path | None = None) -> Path:
    """The folder of the classifier that judges samples, in runs/judge: not the recipe's seed."""
    return trained("classification", given, "--config.seed=100", name="judge")


def fitted(*of: Any, **options: Any) -> Result:
    """`cvjax.train.loop.fit`; a signal ends the experiment, not this training alone."""
    result = fit(*of, **options)
    if result.received is not None:
        sys.exit(128 + result.received)
    return result


def told(run: Callable[[], object]) -> None:
    """Runs it; what a person gave wrongly is one line and code 2, as in main.py."""
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
