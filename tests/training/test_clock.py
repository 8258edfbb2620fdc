"""``training.max_seconds``: lanes are reported as drained once the time is up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from roo_ray.ingest.stream import Step
from roo_ray.training import clock
from roo_ray.training.clock import TrainingClock


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(clock.time, "perf_counter", fake.perf_counter)
    return fake


STEP = cast(Step, SimpleNamespace(lanes_alive=3))


def test_it_ends_at_the_step_that_ends_nearest_to_the_limit(at: Clock) -> None:
    limited, endless = TrainingClock(10.0), TrainingClock(None)
    limited.begin()
    asked = []
    for at.now in (101.0, 103.0, 105.0, 107.0, 109.0):  # the midst of steps that take 2 s and end at 2, 4, 6, 8, 10
        asked.append(limited.lanes(STEP))
    assert asked == [3, 3, 3, 3, 0]  # the last of them ends with the limit
    assert limited.is_over()
    at.now = 0.0  # once up, the time stays up
    assert limited.lanes(STEP) == 0
    assert endless.lanes(STEP) == 3
    assert not endless.is_over()


def test_the_time_between_passes_is_not_counted(at: Clock) -> None:
    limited = TrainingClock(10.0)
    for start in (100.0, 500.0):
        at.now = start
        limited.begin()
        for at.now in (start + 1, start + 2):
            assert limited.lanes(STEP) == 3
    assert limited.passed == 4
    assert not limited.is_over()
