"""Where a step's time goes: a stopwatch with laps, per rank, and what the ranks make of it together.

On a GPU the laps are CUDA events on the training stream: a lap is the time in which the device did, or waited for,
that part. The embeddings' optimizer is fused into backward and counted there.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

PARTS = ("data_wait", "host_to_device", "forward", "backward", "optimizer", "communication", "other")
WORK = ("forward", "backward", "optimizer")
"""What a rank does for itself, although the exchange of embeddings and gradients is within forward and backward."""


class StepTimes:
    """Adds up the laps of steps. ``lap(part)``: what went by since the lap before belongs to ``part``."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last = 0.0
        self.start()

    def start(self) -> None:
        """What went by before is nobody's."""
        self.lap("")

    def lap(self, part: str) -> None:
        """Ends a lap."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((part, event))
            return
        now = time.perf_counter()
        if part:
            self.seconds[part] += now - self._last
        self._last = now

    def add(self, part: str, seconds: float) -> None:
        """Adds time that was measured elsewhere."""
        self.seconds[part] += seconds

    def _settle(self) -> None:
        if not self._events:
            return
        self._events[-1][1].synchronize()
        for (_, before), (part, after) in zip(self._events[:-1], self._events[1:], strict=True):
            if part:
                self.seconds[part] += before.elapsed_time(after) / 1000
        self._events = []

    def over_ranks(self, device: torch.device, prefix: str = "step") -> dict[str, float]:
        """Milliseconds of a step by part, the mean over ranks, and as ``_ms_slowest_rank`` that of the rank with the
        most; ``_balance_time_share``: the mean over ranks of the time spent on their own work, over the largest
        (collective)."""
        self._settle()
        steps = max(self.steps, 1)
        ours = [1000 * self.seconds[part] / steps for part in PARTS]
        work = sum(1000 * self.seconds[part] / steps for part in WORK)
        every = torch.zeros(dist.get_world_size(), len(PARTS) + 1, dtype=torch.float64, device=device)
        every[dist.get_rank()] = torch.tensor([*ours, work], dtype=torch.float64)
        dist.all_reduce(every)
        mean, most = every.mean(0).tolist(), every.max(0).values.tolist()
        values = {f"{prefix}/{part}_ms": mean[at] for at, part in enumerate(PARTS)}
        values |= {f"{prefix}/{part}_ms_slowest_rank": most[at] for at, part in enumerate(PARTS) if part in WORK}
        # the copy to the device goes on beside the step before
        values[f"{prefix}/total_ms"] = sum(mean[:-1]) - values[f"{prefix}/host_to_device_ms"]
        values[f"{prefix}/balance_time_share"] = mean[-1] / most[-1] if most[-1] else 1.0
        return values
