"""What an epoch has trained on so far, and what it left out: the audit that every request is trained on once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from roo_ray.ingest.stream import Step

NAMES = ("requests", "impressions", "keys", "skipped_requests", "unreadable_requests")


def unreadable(step: Step) -> int:
    """Requests of shards that could not be read, which a step passes over (``ingest.on_bad_shard: skip``)."""
    return int(step.counts.get("skipped_requests", 0))


@dataclass
class Counts:
    """``before``: over all ranks, until this worker group began: requests, impressions, sum of the request keys
    modulo 2^64, the requests of batches that were left out, and those of shards that could not be read; the rest:
    this rank since then."""

    before: tuple[int, ...]
    requests: int = 0
    impressions: int = 0
    skipped_requests: int = 0
    unreadable_requests: int = 0
    keys: torch.Tensor | None = None

    @staticmethod
    def since(before: dict[str, int]) -> Counts:
        """Goes on from what a checkpoint says."""
        return Counts(tuple(before.get(name, 0) for name in NAMES))

    def add(self, step: Step, skipped: bool = False) -> None:
        """Counts a step of this rank."""
        self.unreadable_requests += unreadable(step)  # also of lanes that have nothing else left
        if not step.lanes_alive:
            return
        if skipped:
            self.skipped_requests += step.requests
            return
        self.requests += step.requests
        self.impressions += step.impressions
        keys = step.batch.request_key.sum()  # stays on the device
        self.keys = keys if self.keys is None else self.keys + keys

    def over_ranks(self, device: torch.device) -> dict[str, int]:
        """The sums over all ranks, by ``NAMES`` (collective)."""
        keys = 0 if self.keys is None else int(self.keys)
        ours = [self.requests, self.impressions, keys, self.skipped_requests, self.unreadable_requests]
        total = torch.tensor(ours, device=device)
        dist.all_reduce(total)
        sums = [(b + t) % 2**64 for b, t in zip(self.before, total.tolist(), strict=True)]
        return dict(zip(NAMES, sums, strict=True))
