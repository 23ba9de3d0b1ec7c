import pytest

from cvjax.train import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_speed_share_waited_and_time_left(clock, capfd):
    bar = progress.Progress(total=100, done=20)
    clock.now += 10
    bar.waited = 2.5
    row = bar.measure(40, examples_per_step=8)
    assert row == {"steps_per_second": 2, "examples_per_second": 16, "waited_for_data": 0.25}
    bar.show(40, {"train/loss": 0.12345, "learning_rate": 1.0, **row})
    line = capfd.readouterr().err
    assert line.startswith("step 40/100  train/loss 0.1235  2 steps/s  16 examples/s  data 25%")
    assert line.rstrip().endswith("ETA 0:30"), "60 steps at 2 a second"


def test_evaluation_does_not_count_as_training(clock, capfd):
    bar = progress.Progress(total=10, done=0)
    clock.now += 5
    with bar.paused():
        clock.now += 100
    assert bar.measure(10, examples_per_step=4)["steps_per_second"] == 2
    bar.summary()
    text = capfd.readouterr().err
    assert "10 steps in 5.0 s: 2 steps/s, 8 examples/s, waited for data 0.0%" in text
