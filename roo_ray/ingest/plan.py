"""The order of reading: a pure function of (units, seed, epoch, lanes, window size). No I/O, no Ray.

Units (row groups) are permuted by a seed, dealt to V lanes balanced by their size, and cut into windows; within
a window, requests are shuffled and packed (``pack``). World size is no input: ranks own lanes, so the batches of
a step, and with them the training, do not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from roo_ray.config import Holdout, Ingest
from roo_ray.requests.manifest import Manifest, ShardFile

Mode = Literal["shuffled", "sequential"]


@dataclass(frozen=True)
class UnitRef:
    """A row group of a data set: where it lies and how much is in it."""

    path: str
    row_group: int
    requests: int
    impressions: int
    tokens: int


@dataclass(frozen=True)
class Window:
    """Units that are read, shuffled and packed together. ``seed``: of the shuffle of requests; None keeps the
    stored order."""

    epoch: int
    lane: int
    index: int
    units: tuple[UnitRef, ...]
    seed: int | None


def units_of(files: Sequence[ShardFile]) -> list[UnitRef]:
    """The units of files, in order."""
    return [
        UnitRef(file.path, group, unit.requests, unit.impressions, unit.tokens)
        for file in files
        for group, unit in enumerate(file.units)
    ]


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


def plan_epoch(
    units: Sequence[UnitRef], *, seed: int, epoch: int, lanes: int, window_units: int, mode: Mode
) -> list[list[Window]]:
    """For each of ``lanes`` lanes its windows in order; every unit is in exactly one window.

    ``shuffled``: units in an order that depends on (seed, epoch), each to the lane that has least so far
    (impressions and history tokens). ``sequential``: units in stored order, dealt the same way, not shuffled.
    """
    order = np.arange(len(units))
    if mode == "shuffled":
        order = np.random.default_rng(_seed("units", seed, epoch)).permutation(len(units))
    dealt: list[list[UnitRef]] = [[] for _ in range(lanes)]
    loads = [(0, lane) for lane in range(lanes)]
    for number in order.tolist():
        unit = units[number]
        load, lane = heapq.heappop(loads)
        dealt[lane].append(unit)
        heapq.heappush(loads, (load + unit.impressions + unit.tokens, lane))
    return [
        [
            Window(
                epoch=epoch,
                lane=lane,
                index=index,
                units=tuple(mine[start : start + window_units]),
                seed=_seed("requests", seed, epoch, lane, index) if mode == "shuffled" else None,
            )
            for index, start in enumerate(range(0, len(mine), window_units))
        ]
        for lane, mine in enumerate(dealt)
    ]


def lanes_of_rank(rank: int, world_size: int, lanes: int) -> list[int]:
    """The lanes that a rank owns: rank, rank + W, ...; at least one. Raises ValueError for more ranks than lanes."""
    if world_size > lanes:
        raise ValueError(f"{world_size} ranks and only {lanes} lanes; raise ingest.lanes")
    return list(range(rank, lanes, world_size))


def reading_order(plan: Sequence[Sequence[Window]], lanes: Sequence[int]) -> list[Window]:
    """The windows of some lanes in the order in which they are needed: first windows first, lane by lane."""
    mine = [plan[lane] for lane in lanes]
    longest = max((len(windows) for windows in mine), default=0)
    return [windows[index] for index in range(longest) for windows in mine if index < len(windows)]


def plan_digest(manifest: Manifest, schema_digest: str, ingest: Ingest, holdout: Holdout, seed: int) -> str:
    """A short digest of all that decides what lane v delivers at step s. Reader and prefetch do not."""
    inputs = {
        "manifest": manifest.digest(),
        "schema": schema_digest,
        "ingest": ingest.model_dump(mode="json", include={"lanes", "batch_impressions", "window_units"}),
        "holdout": holdout.model_dump(mode="json"),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
