import os
import signal
import subprocess
import sys
import threading

import pytest

from cvjax.errors import InputError
from cvjax.train.guards import DirectoryLock, NonFiniteError, NonFiniteGuard, Signals


def test_bad_steps_in_a_row_stop_the_run_and_good_ones_forgive():
    guard, good, bad = NonFiniteGuard(2), {"loss": 1.0}, {"nonfinite/model/loss": 1.0}
    assert guard.check(1, good)
    assert not guard.check(2, bad) and not guard.check(3, bad)
    assert guard.check(4, {**good, "nonfinite/model/loss": 0.0})
    assert not guard.check(5, bad) and not guard.check(6, bad)
    with pytest.raises(NonFiniteError, match=r"model/loss not finite at step 7 and in the 3 steps"):
        guard.check(7, bad)


def test_no_bad_step_is_allowed_with_a_limit_of_0():
    with pytest.raises(NonFiniteError, match="step 1"):
        NonFiniteGuard(0).check(1, {"nonfinite/model/gradient": 1.0})


def test_a_signal_is_kept_for_the_end_of_the_step():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert not signals.stops(1) and signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stops(2) and signals.received == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_signals_outside_the_main_thread_change_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_second_run_is_refused_with_the_pid_of_the_first(tmp_path):
    lock = DirectoryLock(tmp_path)
    with pytest.raises(InputError, match=f"in use by the run with pid {os.getpid()}"):
        DirectoryLock(tmp_path)
    lock.release()
    DirectoryLock(tmp_path).release()


def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(InputError, match="cannot be locked: Operation not supported"):
        DirectoryLock(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from cvjax.train.guards import DirectoryLock\n"
        "lock = DirectoryLock(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=str(holder.pid)):
        DirectoryLock(tmp_path)
    holder.kill()
    holder.communicate()
    DirectoryLock(tmp_path).release()
