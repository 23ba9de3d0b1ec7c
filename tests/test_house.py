"""The plan of the house holds: who imports whom, what is declared, how long main.py is."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUND = {"data", "nn", "draw", "checks", "errors", "files", "evaluation"}
ABOVE = {"build", "config", "run"}


def imports(path):
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted):
    return dotted.split(".")[1] if dotted.startswith("cvjax.") else None


def test_layers():
    for path in sorted((ROOT / "cvjax").rglob("*.py")):
        here = path.relative_to(ROOT / "cvjax").parts[0].removesuffix(".py")
        used = {room(name) for name in imports(path)} - {None, here}
        if here in GROUND:
            allowed = {"checks", "errors", "files"}
        elif here == "train":
            allowed = {"data", "draw", "checks", "errors", "files"}
        elif here in ABOVE:
            allowed = GROUND | ABOVE | {"train"}
        else:
            allowed = GROUND | {"train"}
        assert used <= allowed, f"{path} imports {used - allowed}"


def test_configs_import_nothing_of_cvjax():
    for path in (ROOT / "configs").glob("*.py"):
        assert all(not name.startswith("cvjax") for name in imports(path)), path


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {
        "file": ["requirements.txt"]
    }
    names = lambda lines: {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines}  # noqa: E731
    declared = names((ROOT / "requirements.txt").read_text().split())
    extras = project["project"]["optional-dependencies"]
    declared |= names(extras["tfds"]) | names(extras["wandb"]) | names(extras["diffusion"])
    owners = importlib.metadata.packages_distributions()
    for path in [ROOT / "main.py", *(ROOT / "cvjax").rglob("*.py")]:
        for dotted in imports(path):
            top = dotted.split(".")[0]
            if top in sys.stdlib_module_names or top in ("cvjax", "main"):
                continue
            owner = {name.lower().replace("-", "_") for name in owners.get(top, [top])}
            assert owner & declared, f"{path} imports {top}, which nothing declares"


def test_importing_everything_needs_neither_tensorflow_nor_torch():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "cvjax").rglob("*.py")
        if path.name != "__init__.py"
    ]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"tensorflow", "torch", "tensorflow_datasets", "wandb"} & set(loaded)


def test_main_stays_short():
    assert len((ROOT / "main.py").read_text().splitlines()) < 80


def test_the_names_of_a_notebook_come_when_they_are_asked_for():
    code = (
        "import sys, cvjax; assert 'jax' not in sys.modules; assert {'fit'} < set(dir(cvjax))\n"
        "from cvjax import InputError, fit, load_run; from cvjax.train import loop\n"
        "assert fit is loop.fit and not hasattr(cvjax, 'fitt'); print(cvjax.__version__)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == importlib.metadata.version("cvjax")
