"""Where metrics and pictures go. The interface is that of `clu.metric_writers.MetricWriter`."""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cvjax import draw, files
from cvjax.errors import InputError


class Writer(Protocol):
    """A place for metrics; the parameter names are clu's, which calls writers by keyword."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, each [height, width, channels] in [0, 1]."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the resolved config."""

    def flush(self) -> None:
        """Makes what was written visible to others."""

    def close(self) -> None:
        """Flushes; nothing may be written after."""


class JsonLines:
    """One JSON object a line in `metrics.jsonl`, with `step`, and `curves.png` drawn from them."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        """Lines after `resume_step` are those of steps that will be taken again: they go."""
        self.directory = Path(workdir)
        self.path = self.directory / "metrics.jsonl"
        self.rows = [row for row in read_json_lines(self.path) if row["step"] <= resume_step]
        text = "".join(_line(row) for row in self.rows)
        files.replace(self.path, lambda new: new.write_text(text))
        self._file = self.path.open("a", buffering=1)
        self._drawn = 0  # lines that are in curves.png

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        row = {"step": int(step), **{name: float(value) for name, value in scalars.items()}}
        self.rows.append(row)
        self._file.write(_line(row))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes `pictures/<name>_<step>.png`."""
        for name, image in images.items():
            path = self.directory / "pictures" / f"{name.replace('/', '_')}_{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            draw.save_png(path, np.asarray(image))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Nothing: the config has a file of its own."""

    def flush(self) -> None:
        """Draws `curves.png`; not again without a new line.

        All metrics of the task against the step, and the first of each evaluator: that is what has
        a name and a "/" before it and is unknown to training.
        """
        if len(self.rows) == self._drawn:
            return
        self._drawn = len(self.rows)
        shown, curves = {}, {}
        names = dict.fromkeys(name for row in self.rows for name in row)
        for name in names:
            kind, _, metric = name.partition("/")
            first, within, _ = metric.partition("/")
            if kind in ("train", "eval") and first != "nonfinite":
                is_of_evaluator = kind == "eval" and within and f"train/{metric}" not in names
                shown.setdefault(first if is_of_evaluator else name, name)
        for name in shown.values():
            rows = [row for row in self.rows if name in row]
            curves[name] = ([row["step"] for row in rows], [row[name] for row in rows])
        if curves:
            draw.curves(self.directory / "curves.png", curves)

    def close(self) -> None:
        """Draws and closes."""
        try:
            self.flush()
        finally:
            self._file.close()


class TensorBoard:
    """TensorBoard event files in `<workdir>/tensorboard`, by tensorboardX."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        # Purged: what an earlier process wrote of steps that will be taken again.
        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds scalars."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds pictures."""
        for name, image in images.items():
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Adds the config as text (tensorboardX's add_hparams would overwrite the run's file)."""
        self._writer.add_text("config", f"```\n{json.dumps(hparams, indent=2, default=str)}\n```")

    def flush(self) -> None:
        """Flushes the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases; needs `pip install wandb`."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        try:
            import wandb
        except ImportError as error:
            raise InputError("wandb is on, but not installed: pip install wandb") from error
        self._wandb = wandb
        # A name may be that of many runs; by its own id a run goes on where it was.
        kept = Path(workdir) / "wandb_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project="cvjax", dir=str(workdir), name=Path(workdir).resolve().name,
            id=kept.read_text(), resume="allow",
        )  # fmt: skip

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars."""
        self._run.log({**scalars, "step": step})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Logs pictures."""
        pictures = {
            name: self._wandb.Image((255 * np.asarray(image)).round().astype(np.uint8))
            for name, image in images.items()
        }
        self._run.log({**pictures, "step": step})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Sets the run's config."""
        self._run.config.update(dict(hparams), allow_val_change=True)

    def flush(self) -> None:
        """Nothing to do: its own thread sends."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Several:
    """Passes everything on to several writers; what one cannot write is an InputError."""

    def __init__(self, writers: Sequence[Writer], workdir: str | os.PathLike | None = None):
        self.writers, self.workdir = list(writers), workdir

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Passes on."""
        self._each(lambda writer: writer.write_scalars(step=step, scalars=scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Passes on."""
        self._each(lambda writer: writer.write_images(step=step, images=images))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Passes on."""
        self._each(lambda writer: writer.write_hparams(hparams=hparams))

    def flush(self) -> None:
        """Passes on."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        """Closes all, also where one fails."""
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[Writer], None]) -> None:
        with contextlib.ExitStack() as all_of_them:
            for writer in reversed(self.writers):
                all_of_them.callback(self._call, call, writer)

    def _call(self, call: Callable[[Writer], None], writer: Writer) -> None:
        with writing(self.workdir):
            call(writer)


@contextlib.contextmanager
def writing(workdir: str | os.PathLike | None) -> Iterator[None]:
    """What cannot be written there is one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is whole or not there."""
    text = json.dumps(value, indent=2) + "\n"
    files.replace(path, lambda new: new.write_text(text))


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; [] when there is none. A line that is damaged is left out."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and _are_numbers(row.values()):
            rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(v is None or type(v) in (int, float) for v in values)


def _line(row: Mapping[str, float]) -> str:
    """JSON knows no number that is not finite: it is null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"
