"""SIGTERM at the driver reaches the ranks, and the exit code says that the run was stopped."""

from __future__ import annotations

import os
import signal
import time

import pytest

from roo_ray.errors import EXIT_STOPPED, Stopped
from roo_ray.terminal import run_job
from roo_ray.training.stop import GRACE_VARIABLE, RAY_DEFAULT_GRACE_S, StopWatch, grace_seconds, stop_bell


def test_sigterm_rings_the_bell(local_ray: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    lines: list[str] = []
    with stop_bell(lines.append) as bell:
        watch = StopWatch(bell.handle, every_seconds=0.01)
        end = time.monotonic() + 2
        while time.monotonic() < end and not watch._next:
            watch.asked()
        assert not watch.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not watch.asked():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert bell.rung
        assert watch.asked()
        assert signal.getsignal(signal.SIGTERM) is before  # a second signal ends the process
    assert lines == ["stopping: the trainers take a last checkpoint"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bell_that_is_lost_stops_nobody(local_ray: None) -> None:
    with stop_bell(lambda line: None) as bell:
        handle = bell.handle
    watch = StopWatch(handle, every_seconds=0.0)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        assert not watch.asked()
    assert not StopWatch(None).asked()


def test_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise Stopped("run 'x' ended with checkpoint y")

    with pytest.raises(SystemExit) as exit_:
        run_job(stopped)
    assert exit_.value.code == EXIT_STOPPED == 143
    assert "stopped: run 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, RAY_DEFAULT_GRACE_S), ("120", 120), ("soon", RAY_DEFAULT_GRACE_S)]
)
def test_grace(value: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GRACE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(GRACE_VARIABLE, value)
    assert grace_seconds() == seconds
