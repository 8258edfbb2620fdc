"""Where the data of a run stands, over all ranks, and whether a run may go on from there."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from roo_ray.errors import ConfigError
from roo_ray.ingest.plan import Position, differences
from roo_ray.ingest.stream import Step, whole_position


def position_over_ranks(epoch: int, step: Step, lanes: int, window_units: int, device: torch.device) -> Position:
    """The run's position after a step, from all ranks' lanes (collective)."""
    table = torch.zeros((lanes, 2 + window_units), dtype=torch.int64)  # window, batches, and a flag per unit
    for lane, at in step.position.items():
        table[lane, :2] = torch.tensor(at)
        for unit in step.skipped_units.get(lane, ()):
            table[lane, 2 + unit] = 1
    table = table.to(device)
    dist.all_reduce(table)
    rows = table.tolist()
    places = {lane: (row[0], row[1]) for lane, row in enumerate(rows)}
    skipped = {lane: tuple(at for at, flag in enumerate(row[2:]) if flag) for lane, row in enumerate(rows)}
    return whole_position(epoch, places, skipped)


def refuse_another_stream(source: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError where training from ``source`` would go on in another order: where its plan's inputs
    (``ingest.plan.plan_inputs``) and those of ``now`` differ in anything."""
    changed = differences(before, now)
    if changed:
        raise ConfigError(
            f"the run cannot go on from {source}, because its data would come in another order: "
            f"{'; '.join(changed)}; restore this, or choose another run_name"
        )
