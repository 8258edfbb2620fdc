"""The order of an epoch as a pure function: no I/O, no Ray, and the number of ranks is no input.

A run has V virtual lanes. The reading units (row groups) of an epoch are permuted by the seed, dealt to the
lanes, and each lane reads its units in windows; within a window the requests are shuffled and packed into
batches (``pack.py``). The global batch of step s is the union of the lanes' batches s, so what is trained on
does not depend on how many ranks share the lanes. The plan works on units, never on requests, so the plan of a
very large data set fits in memory.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import ConfigError
from roo_ray.requests.hashing import mix64
from roo_ray.requests.manifest import Manifest, ShardFile
from roo_ray.schema import Schema

Mode = Literal["shuffled", "sequential"]
Side = Literal["train", "evaluation"]
Integers = npt.NDArray[np.int64]

PLAN_FORMAT = 1
"""Raised whenever the same inputs would give another stream, so that a resume across it is refused."""


@dataclass(frozen=True)
class UnitRef:
    """A row group to read: ``path`` relative to the data set, ``requests`` in it as the manifest counts."""

    path: str
    row_group: int
    requests: int


@dataclass(frozen=True)
class Window:
    """What a lane reads at a time: some units, shuffled together. ``index``: its place in the lane.
    ``shuffle``: seed of the shuffle of its requests, None for the stored order."""

    epoch: int
    lane: int
    index: int
    units: tuple[UnitRef, ...]
    shuffle: int | None


@dataclass(frozen=True)
class Units:
    """The row groups of some shard files, in stored order, as columns: all arrays are (U,) int64."""

    paths: tuple[str, ...]
    file: Integers
    row_group: Integers
    requests: Integers
    impressions: Integers
    tokens: Integers

    def ref(self, unit: int) -> UnitRef:
        """The unit's name, as the reader takes it."""
        return UnitRef(self.paths[self.file[unit]], int(self.row_group[unit]), int(self.requests[unit]))


def units_of(files: Sequence[ShardFile]) -> Units:
    """The units of shard files, in the files' order. Units without requests are left out: nothing to read."""
    rows = [
        (f, g, unit.requests, unit.impressions, unit.tokens)
        for f, file in enumerate(files)
        for g, unit in enumerate(file.units)
        if unit.requests
    ]
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return Units(tuple(file.path for file in files), *columns)


# ---- seeded randomness ----------------------------------------------------------------------------------


def derive_seed(*parts: int) -> int:
    """A 64-bit seed from several integers; order matters. The same on every machine and NumPy version."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix64(state * np.uint64(31) + np.array([part & (2**64 - 1)], np.uint64))
    return int(state[0])


def permutation(count: int, seed: int) -> Integers:
    """(count,) int64: a permutation of 0 .. count-1 that depends on the seed alone (random keys, sorted)."""
    keys = mix64(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed))
    return np.argsort(keys, kind="stable")


# ---- the plan -------------------------------------------------------------------------------------------


def unit_costs(units: Units) -> npt.NDArray[np.float64]:
    """(U,) float64: each unit's share of all impressions plus its share of all history tokens."""
    shares = units.impressions / max(units.impressions.sum(), 1)
    costs: npt.NDArray[np.float64] = shares + units.tokens / max(units.tokens.sum(), 1)
    return costs


def deal(costs: npt.NDArray[np.float64], order: Integers, lanes: int) -> tuple[Integers, ...]:
    """Deals units to lanes, each to the lane with the least cost so far; every lane keeps ``order``.

    The last units go largest first, which evens out the ends of the lanes. Loads differ by at most one unit.
    """
    tail = max(0, len(order) - 8 * lanes)
    last = order[tail:]
    dealt = np.concatenate([order[:tail], last[np.argsort(-costs[last], kind="stable")]])
    loads = [(0.0, lane) for lane in range(lanes)]
    owner = np.empty(len(order), np.int64)  # (U,) the lane of each unit
    for unit in dealt.tolist():
        load, lane = loads[0]
        owner[unit] = lane
        heapq.heapreplace(loads, (load + float(costs[unit]), lane))
    lane_of = owner[order]
    return tuple(order[lane_of == lane] for lane in range(lanes))


@dataclass(frozen=True)
class EpochPlan:
    """Which units each lane reads in an epoch, in order. ``lanes``: one array of unit indices per lane."""

    epoch: int
    units: Units
    lanes: tuple[Integers, ...]
    window_units: int
    mode: Mode
    seed: int

    def num_windows(self, lane: int) -> int:
        """How many windows the lane has; 0 where there are fewer units than lanes."""
        return -(-len(self.lanes[lane]) // self.window_units)

    def window(self, lane: int, index: int) -> Window:
        """The lane's window; its shuffle seed is a function of (seed, epoch, lane, index)."""
        chosen = self.lanes[lane][index * self.window_units : (index + 1) * self.window_units]
        shuffle = derive_seed(self.seed, self.epoch, lane, index) if self.mode == "shuffled" else None
        refs = tuple(self.units.ref(unit) for unit in chosen)
        return Window(self.epoch, lane, index, refs, shuffle)

    def reading_order(self, lanes: Iterable[int]) -> list[Window]:
        """The windows of some lanes, in the order in which a consumer that takes one batch of every lane per
        step comes to need them: by the lane's impressions before the window."""
        starts = []
        for lane in lanes:
            before = np.concatenate([[0], np.cumsum(self.units.impressions[self.lanes[lane]])])
            starts += [(int(before[index * self.window_units]), lane, index) for index in range(self.num_windows(lane))]
        return [self.window(lane, index) for _, lane, index in sorted(starts)]


def plan_epoch(
    units: Units, *, seed: int, epoch: int, lanes: int, window_units: int, mode: Mode = "shuffled"
) -> EpochPlan:
    """The plan of an epoch. ``shuffled``: units in an order seeded by (seed, epoch), requests shuffled within
    windows. ``sequential``: everything in stored order, consecutive units across the lanes."""
    count = len(units.file)
    order = permutation(count, derive_seed(seed, epoch)) if mode == "shuffled" else np.arange(count)
    dealt = deal(unit_costs(units), order, lanes)
    return EpochPlan(epoch, units, dealt, window_units, mode, seed)


def lanes_of_rank(rank: int, world_size: int, lanes: int) -> list[int]:
    """The lanes that a rank owns: rank, rank + W, ... Raises ConfigError where a rank would own none."""
    if world_size > lanes:
        raise ConfigError(
            f"{world_size} workers share {lanes} lanes: every worker owns at least one; raise ingest.lanes or "
            "lower training.workers"
        )
    return list(range(rank, lanes, world_size))


# ---- identity -------------------------------------------------------------------------------------------


def plan_inputs(
    manifest: Manifest, schema: Schema, ingest: Ingest, holdout: Holdout, side: Side, seed: int, mode: Mode
) -> dict[str, Any]:
    """Everything that the stream is a function of, besides the epoch; JSON values. The reader, the prefetch
    and the number of ranks are not in it."""
    return {
        "format": PLAN_FORMAT,
        "data_version": manifest.version,
        "data_digest": manifest.digest(),
        "schema_digest": schema.digest,
        "lanes": ingest.lanes,
        "batch_impressions": ingest.batch_impressions,
        "window_units": ingest.window_units,
        "holdout": holdout.model_dump(mode="json"),
        "side": side,
        "seed": seed,
        "mode": mode,
    }


def plan_digest(
    manifest: Manifest, schema: Schema, ingest: Ingest, holdout: Holdout, side: Side, seed: int, mode: Mode
) -> str:
    """A short stable digest of ``plan_inputs``: equal digests mean the identical stream."""
    inputs = plan_inputs(manifest, schema, ingest, holdout, side, seed, mode)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
