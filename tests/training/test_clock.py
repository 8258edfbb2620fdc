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


def test_the_limit_is_that_of_the_whole_run(at: Clock) -> None:
    """A run that goes on takes up its time; within a pass one step ends it, between two it has ended."""
    first = TrainingClock(10.0)
    first.begin()
    for at.now in (102.0, 104.0):
        first.lanes(STEP)
    assert (first.passed, first.reached()) == (4.0, 4.0)
    again = TrainingClock(10.0)
    again.go_on(first.passed, within=True)
    again.begin()
    asked = []
    for at.now in (106.0, 108.0):
        asked.append(again.lanes(STEP))
    assert asked == [3, 0]
    assert again.reached() == 10.0  # though 8 have passed: it has ended by its time
    over = TrainingClock(10.0)
    over.go_on(again.reached(), within=False)
    assert over.is_over()
    over.go_on(again.reached(), within=True)
    assert not over.is_over()
    more = TrainingClock(20.0)
    more.go_on(again.reached(), within=False)
    assert not more.is_over()


def test_the_time_between_passes_is_not_counted(at: Clock) -> None:
    limited = TrainingClock(10.0)
    for start in (100.0, 500.0):
        at.now = start
        limited.begin()
        for at.now in (start + 1, start + 2):
            assert limited.lanes(STEP) == 3
    assert limited.passed == 4
    assert not limited.is_over()
