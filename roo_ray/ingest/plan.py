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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import ConfigError, DataError
from roo_ray.ingest.units import Integers, UnitRef, Units
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema
from roo_ray.sources.hashing import mix64

Mode = Literal["shuffled", "time", "sequential"]
Side = Literal["train", "evaluation"]

PLAN_FORMAT = 4
"""Raised whenever the same inputs would give another stream, so that a resume across it is refused."""


@dataclass(frozen=True)
class Window:
    """What a lane reads at a time: some units, shuffled together. ``index``: its place in the lane.
    ``shuffle``: seed of the shuffle of its requests, None for the stored order. ``by_time``: requests are put in
    order of their time. ``settled``: of a window whose first batches were taken before a resume, the places of the
    units that were passed over then (``on_bad_shard: skip``), which are passed over again; None elsewhere."""

    epoch: int
    lane: int
    index: int
    units: tuple[UnitRef, ...]
    shuffle: int | None
    by_time: bool = False
    settled: tuple[int, ...] | None = None


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


def time_order(units: Units) -> Integers:
    """(U,) int64: the units in order of time. Raises DataError where the layout is not time-ordered: where the
    times of two units overlap."""
    order = np.lexsort([units.time_max, units.time_min])
    early, late = order[:-1], order[1:]
    overlap = np.flatnonzero(units.time_max[early] > units.time_min[late])
    if len(overlap):
        one, other = units.ref(int(early[overlap[0]])), units.ref(int(late[overlap[0]]))
        raise DataError(
            f"ingest.mode=time needs a time-ordered layout, and {len(overlap)} of {max(len(units) - 1, 1)} "
            f"neighbouring units overlap in time, the first: {one.path} row group {one.row_group} and {other.path} "
            f"row group {other.row_group}; build the data set again in order of time (build: {{order: time, buckets: "
            "1}}, with build.bucket_bytes half of a day's request rows in memory or more), or train without it "
            "(ingest.mode=shuffled, no incremental)"
        )
    return order


def deal_in_rounds(costs: npt.NDArray[np.float64], order: Integers, lanes: int) -> tuple[Integers, ...]:
    """Deals each run of V consecutive units, one to every lane, the largest to the lane with the least cost so
    far: all lanes are at about the same place of ``order`` at every step."""
    loads = np.zeros(lanes)
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    for start in range(0, len(order), lanes):
        run = order[start : start + lanes]
        largest_first = run[np.argsort(-costs[run], kind="stable")]
        least_first = np.argsort(loads, kind="stable")[: len(run)]
        loads[least_first] += costs[largest_first]
        for lane, unit in zip(least_first.tolist(), largest_first.tolist(), strict=True):
            dealt[lane].append(unit)
    return tuple(np.array(of, np.int64) for of in dealt)


@dataclass(frozen=True)
class EpochPlan:
    """Which units each lane reads in an epoch, in order. ``lanes``: one array of unit indices per lane;
    ``bounds``: where the lane's windows begin in it, and its end, (windows + 1,). ``fills`` (U,) float64: about how
    many batches each unit fills, in any measure; it is for the order of reading alone and decides nothing of what a
    lane delivers. By default the units' impressions."""

    epoch: int
    units: Units
    lanes: tuple[Integers, ...]
    bounds: tuple[Integers, ...]
    mode: Mode
    seed: int
    fills: npt.NDArray[np.float64] | None = None

    def num_windows(self, lane: int) -> int:
        """How many windows the lane has; 0 where there are fewer units than lanes."""
        return len(self.bounds[lane]) - 1

    def window(self, lane: int, index: int, settled: tuple[int, ...] | None = None) -> Window:
        """The lane's window; its shuffle seed is a function of (seed, epoch, lane, index)."""
        begin, end = self.bounds[lane][index : index + 2]
        chosen = self.lanes[lane][begin:end]
        shuffle = derive_seed(self.seed, self.epoch, lane, index) if self.mode == "shuffled" else None
        refs = tuple(self.units.ref(unit) for unit in chosen)
        return Window(self.epoch, lane, index, refs, shuffle, self.mode == "time", settled)

    def reading_order(self, lanes: Iterable[int], start: Position | None = None) -> Iterator[Window]:
        """The windows of some lanes, in the order in which a consumer that takes one batch of every lane per
        step comes to need them: by what the lane delivers before the window (``fills``). From ``start``, if it is of
        this epoch: only windows that are not done are read. Made one by one: a large epoch has many."""
        lanes = list(lanes)
        if not lanes:
            return
        fills = self.units.impressions if self.fills is None else self.fills
        begins, windows_of = [], []
        for lane in lanes:
            windows = np.arange(start.window(self.epoch, lane) if start else 0, self.num_windows(lane))
            before = np.concatenate([[0], np.cumsum(fills[self.lanes[lane]])])
            begun = before[self.bounds[lane][windows]]
            begins.append(begun - (begun[0] if len(begun) else 0))
            windows_of.append(windows)
        lane_of, index_of = np.repeat(lanes, [len(of) for of in windows_of]), np.concatenate(windows_of)
        for at in np.lexsort([index_of, lane_of, np.concatenate(begins)]).tolist():
            lane, index = int(lane_of[at]), int(index_of[at])
            yield self.window(lane, index, start.settled(self.epoch, lane, index) if start else None)


def plan_epoch(
    units: Units, *, seed: int, epoch: int, lanes: int, window_units: int, mode: Mode = "shuffled"
) -> EpochPlan:
    """The plan of an epoch. ``shuffled``: units (``block_starts``: or blocks of them) in an order seeded by (seed,
    epoch), requests shuffled within windows. ``time``: units and the requests in them by time, every V consecutive
    units across the V lanes. ``sequential``: everything in stored order, consecutive units across the lanes.

    Raises DataError for ``time`` where the layout is not time-ordered.
    """
    costs = unit_costs(units)
    if mode == "time":
        dealt = deal_in_rounds(costs, time_order(units), lanes)
        return EpochPlan(epoch, units, dealt, _even_windows(dealt, window_units), mode, seed)
    starts = block_starts(units, window_units)
    blocks = len(starts) - 1
    order = permutation(blocks, derive_seed(seed, epoch)) if mode == "shuffled" else np.arange(blocks)
    if blocks == len(units):
        dealt = deal(costs, order, lanes)
        return EpochPlan(epoch, units, dealt, _even_windows(dealt, window_units), mode, seed)
    of_lane = deal(np.add.reduceat(costs, starts[:-1]), order, lanes)
    dealt = tuple(_ranges(starts[of], starts[of + 1]) for of in of_lane)
    bounds = tuple(_windows_of_blocks(np.diff(starts)[of], window_units) for of in of_lane)
    return EpochPlan(epoch, units, dealt, bounds, mode, seed)


def block_starts(units: Units, most: int) -> Integers:
    """(blocks + 1,) the first unit of each block, and the end: units that are read together. As a row group of an
    impression table is decoded from its beginning for whatever is read of it, up to ``most`` neighbours in it are a
    block, of about equal sizes; all others are blocks of one."""
    if not (units.shared >= 0).any():
        return np.arange(len(units) + 1)
    same = (units.file[1:] == units.file[:-1]) & (units.shared[1:] == units.shared[:-1]) & (units.shared[1:] >= 0)
    runs = np.flatnonzero(np.concatenate([[True], ~same]))  # of units of one row group
    length = np.diff(np.append(runs, len(units)))
    blocks = -(-length // most)
    place = np.arange(len(units)) - np.repeat(runs, length)
    block = place * np.repeat(blocks, length) // np.repeat(length, length)  # within the run
    begins = np.concatenate([[True], (block[1:] != block[:-1]) | ~same])
    return np.append(np.flatnonzero(begins), len(units))


def _ranges(starts: Integers, ends: Integers) -> Integers:
    lengths = ends - starts
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ranges: Integers = np.repeat(starts, lengths) + within
    return ranges


def _even_windows(lanes: Sequence[Integers], window_units: int) -> tuple[Integers, ...]:
    return tuple(np.append(np.arange(0, len(lane), window_units), len(lane)) for lane in lanes)


def _windows_of_blocks(sizes: Integers, most: int) -> Integers:
    """(windows + 1,) bounds, in units, of windows of whole blocks of ``sizes`` units that are not above ``most``."""
    bounds, end = [0], 0
    for size in sizes.tolist():
        if end > bounds[-1] and end + size - bounds[-1] > most:
            bounds.append(end)
        end += size
    return np.array([*bounds, end] if end else [0], np.int64)


@dataclass(frozen=True)
class Position:
    """Where an epoch stands: per lane the window in progress and the batches taken in it. All lanes of the run
    are in it, whoever owns them: it does not depend on the number of ranks. ``skipped``: per lane, the places of the
    units of that window that could not be read and were passed over; empty where there were none in any lane."""

    epoch: int
    lanes: tuple[tuple[int, int], ...]
    skipped: tuple[tuple[int, ...], ...] = ()

    def window(self, epoch: int, lane: int) -> int:
        """The first window of the lane that is still to be read in ``epoch``."""
        return self.lanes[lane][0] if epoch == self.epoch else 0

    def taken(self, epoch: int, lane: int, window: int) -> int:
        """How many batches of a window were taken before."""
        at, batches = self.lanes[lane]
        return batches if (epoch, window) == (self.epoch, at) else 0

    def settled(self, epoch: int, lane: int, window: int) -> tuple[int, ...] | None:
        """The units of a window that were passed over before; None where nothing of it was taken."""
        if not self.taken(epoch, lane, window):
            return None
        return self.skipped[lane] if self.skipped else ()


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
    manifest: Manifest,
    schema: Schema,
    ingest: Ingest,
    holdout: Holdout,
    side: Side,
    seed: int,
    mode: Mode,
    cost: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Everything that the stream is a function of, besides the epoch; JSON values. The reader, the prefetch and
    the number of ranks are not in it, and the model's ``cost`` coefficients only where they cut batches."""
    return {
        "format": PLAN_FORMAT,
        "data_version": manifest.version,
        "data_digest": manifest.digest(),
        "schema_digest": schema.digest,
        "truncation": {f.name: f.max_length for f in schema.features if f.max_length is not None},
        "lanes": ingest.lanes,
        "batch_impressions": ingest.batch_impressions,
        "batch_cost": ingest.batch_cost,
        "cost_coefficients": [float(c) for c in cost] if cost is not None and ingest.batch_cost else None,
        "oversize": ingest.oversize,
        "interleave": ingest.interleave,
        "window_units": ingest.window_units,
        "drop_last": ingest.drop_last,
        "on_bad_shard": ingest.on_bad_shard,
        "holdout": holdout.model_dump(mode="json", exclude=None if holdout.only_days else {"only_days"}),
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


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two plans' inputs, a phrase each; empty where the stream is the same."""
    names = [*now, *(name for name in before if name not in now)]
    return [f"{n} was {before.get(n)} and is {now.get(n)}" for n in names if before.get(n) != now.get(n)]
