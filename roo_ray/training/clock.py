"""``training.max_seconds``: training ends after so much time, on all ranks at the same step."""

from __future__ import annotations

import time

import torch

from roo_ray.ingest.stream import Step
from roo_ray.metrics.exchange import summed, wire_device


class TrainingClock:
    """Counts the time of training passes, from each one's first batch on; what lies between passes (evaluation) is
    not counted. ``seconds`` None: without end. ``passed``: so far, in the whole run.

    A rank whose time is up says that its lanes are drained; as ever, the pass ends when no rank has a live lane, so
    that no rank waits for another. The step in progress is still trained on by all. Time is up when another step
    would end further beyond the limit than this one ends before it: a run overshoots by half a step at most, as long
    as steps take alike.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.passed = 0.0
        self.is_up = False
        self._last = 0.0

    def begin(self) -> None:
        """A pass begins: its first batch is there."""
        self._last = time.perf_counter()

    def lanes(self, coming: Step) -> int:
        """The live lanes of the step to come as this rank reports them, in the midst of a step; 0 once the time is
        up."""
        now = time.perf_counter()
        step, self._last = now - self._last, now
        self.passed += step
        if self.seconds is None:
            return coming.lanes_alive
        # half of the step in progress is to come, and half of another one is what it may overshoot by
        self.is_up = self.is_up or self.passed + step >= self.seconds
        return 0 if self.is_up else coming.lanes_alive

    def go_on(self, passed: float, within: bool) -> None:
        """Goes on with a run that has taken so long, ``within`` a pass (one more step ends it) or between two."""
        self.passed = passed
        self.is_up = not within and self.seconds is not None and passed >= self.seconds

    def reached(self) -> float:
        """``passed``, and at least the limit once the time is up: a run that has ended does not go on."""
        return max(self.passed, self.seconds) if self.is_up and self.seconds is not None else self.passed

    def is_over(self) -> bool:
        """Whether any rank's time is up (collective where there is a limit)."""
        if self.seconds is None:
            return False
        return bool(summed(torch.tensor([int(self.is_up)], device=wire_device())))
