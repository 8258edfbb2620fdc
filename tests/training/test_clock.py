"""``training.max_seconds``: lanes are reported as drained once the time is up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from roo_ray.ingest.stream import Step
from roo_ray.training import clock
from roo_ray.training.clock import TrainingClock


def test_time_counts_from_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    step = cast(Step, SimpleNamespace(lanes_alive=3))
    limited, endless = TrainingClock(10.0), TrainingClock(None)
    assert limited.lanes(step) == 3
    now = 109.9
    assert limited.lanes(step) == 3
    assert not limited.is_over()
    now = 110.0
    assert limited.lanes(step) == 0
    assert limited.is_over()
    now = 0.0  # once up, the time stays up
    assert limited.lanes(step) == 0
    assert endless.lanes(step) == 3
    assert not endless.is_over()
