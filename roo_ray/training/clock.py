"""``training.max_seconds``: training ends after so much time, on all ranks at the same step."""

from __future__ import annotations

import time

import torch

from roo_ray.ingest.stream import Step
from roo_ray.metrics.exchange import summed, wire_device


class TrainingClock:
    """Counts the time of training passes, from each one's first batch on. ``seconds`` None: without end.

    A rank whose time is up says that its lanes are drained; as ever, the pass ends when no rank has a live lane, so
    that no rank waits for another. The last step is still trained on by all.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.began: float | None = None
        self.is_up = False

    def lanes(self, step: Step) -> int:
        """The step's live lanes as this rank reports them; 0 once the time is up."""
        if self.seconds is None:
            return step.lanes_alive
        now = time.perf_counter()
        self.began = now if self.began is None else self.began
        self.is_up = self.is_up or now - self.began >= self.seconds
        return 0 if self.is_up else step.lanes_alive

    def is_over(self) -> bool:
        """Whether any rank's time is up (collective where there is a limit)."""
        if self.seconds is None:
            return False
        return bool(summed(torch.tensor([int(self.is_up)], device=wire_device())))
