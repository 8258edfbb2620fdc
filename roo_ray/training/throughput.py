"""Counts and times of a stretch of steps on one rank, and their sum over ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class Throughput:
    """Adds up what a rank did since ``begin``: its making, or ``start``. ``wait_seconds``: time the rank stood waiting
    for its batch."""

    requests: int = 0
    impressions: int = 0
    steps: int = 0
    wait_seconds: float = 0.0
    begin: float = field(default_factory=lambda: time.perf_counter())

    def start(self) -> None:
        """The first batch is there: what went by before, the start of the reading, is not counted."""
        self.begin = time.perf_counter()

    def add(self, requests: int, impressions: int, wait_seconds: float) -> None:
        """Counts a step."""
        self.requests += requests
        self.impressions += impressions
        self.steps += 1
        self.wait_seconds += wait_seconds

    def over_ranks(self, device: torch.device, prefix: str) -> dict[str, float]:
        """Metrics over all ranks (collective): totals, rates per second of all and of a worker in the mean, share of
        time waiting for data."""
        seconds = time.perf_counter() - self.begin
        totals = torch.tensor(
            [self.requests, self.impressions, self.wait_seconds, seconds], dtype=torch.float64, device=device
        )
        dist.all_reduce(totals)
        requests, impressions, waited, rank_seconds = totals.tolist()
        world = dist.get_world_size()
        wall = rank_seconds / world
        return {
            f"{prefix}/requests": requests,
            f"{prefix}/impressions": impressions,
            f"{prefix}/seconds": wall,
            f"{prefix}/requests_per_second": requests / wall,
            f"{prefix}/impressions_per_second": impressions / wall,
            f"{prefix}/requests_per_second_per_worker": requests / wall / world,
            f"{prefix}/impressions_per_second_per_worker": impressions / wall / world,
            f"{prefix}/data_wait_share": waited / rank_seconds,
        }
