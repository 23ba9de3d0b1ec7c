"""What protects a run: signals, a lock on its work directory, and a stop at bad numbers."""

import fcntl
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from cvjax.errors import InputError


class Signals:
    """Within this context SIGTERM and Ctrl-C only ask for a stop, so that a step can finish.

    A second Ctrl-C exits at once. Outside the main thread (some notebooks) nothing is changed.
    Several processes stop together, whichever was asked: one that left alone would wait for the
    others at the checkpoint, and they for it in the next step. SIGTERM is then left to JAX, whose
    service agrees on the step.

    Attributes:
      received: the signal after which the run stops, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._asked: int | None = None
        self._before: dict[int, object] = {}

    def stops(self, step: int) -> bool:
        """Whether the run stops after `step`, the same in all processes; to be asked each step."""
        if jax.process_count() == 1:
            self.received = self._asked
        elif reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self._asked = number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing the step and saving; Ctrl-C exits at once\n".encode())
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            ours = (signal.SIGTERM, signal.SIGINT)
            for number in ours if jax.process_count() == 1 else ours[1:]:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class DirectoryLock:
    """Holds `<directory>/lock`; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, directory: str | os.PathLike):
        """Raises InputError when another run holds it, with its pid, or it cannot be locked."""
        path = Path(directory) / "lock"
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            pid = self._file.read().strip() or "unknown"
            self._file.close()
            raise InputError(
                f"workdir {directory} is in use by the run with pid {pid}; "
                "choose another --workdir, or stop that run"
            ) from None
        except OSError as error:  # not every file system of a network can
            self._file.close()
            raise InputError(f"workdir {directory} cannot be locked: {error.strerror}") from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Lets another run in."""
        self._file.close()

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Counts steps that were skipped, and stops the run after more than `limit` in a row."""

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Returns whether the step counted; `metrics` holds `nonfinite/...` flags of that step.

        Raises NonFiniteError that names the metrics and the step.
        """
        bad = [name for name, value in metrics.items() if name.startswith("nonfinite/") and value]
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row > self.limit:
            names = ", ".join(name.removeprefix("nonfinite/") for name in bad)
            raise NonFiniteError(
                f"{names} not finite at step {step} and in the {self.in_a_row} steps up to it; "
                "try a lower learning rate or clip_norm"
            )
        return not bad
