"""What the order of the data did to the batches of a stretch of steps, over all ranks, as metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from roo_ray.ingest.pack import COUNTS
from roo_ray.ingest.stream import Step


@dataclass
class OrderStats:
    """Adds up the counts of steps. A batch is a lane's batch of a step. ``balance``: mean over ranks of a step's
    cost by the model, over the largest: 1 means that no rank waits for another."""

    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))
    batches: int = 0
    steps: int = 0
    balance: float = 0.0

    def add(self, step: Step, balance: float) -> None:
        """Counts a step of this rank."""
        for name, value in step.counts.items():
            self.counts[name] += value
        self.batches += step.lanes_alive
        self.steps += 1
        self.balance += balance

    def over_ranks(self, device: torch.device, prefix: str, interleaved: bool) -> dict[str, float]:
        """Metrics over all ranks (collective)."""
        totals = torch.tensor([self.batches, *self.counts.values()], dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        batches, *values = totals.tolist()
        counts = dict(zip(self.counts, values, strict=True))
        metrics = {
            f"{prefix}/balance": self.balance / max(self.steps, 1),
            f"{prefix}/batch_requests": counts["requests"] / max(batches, 1),
            f"{prefix}/batch_users": counts["users"] / max(batches, 1),
        }
        if counts["negative_pairs"]:
            metrics[f"{prefix}/false_negative_rate"] = counts["false_pairs"] / counts["negative_pairs"]
        if interleaved:
            metrics[f"{prefix}/crowded_requests"] = counts["crowded"]
        return metrics
