"""What a stream of batches is a function of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import DataError
from roo_ray.ingest.budget import IMPRESSION_COST
from roo_ray.ingest.expected import mean_cost
from roo_ray.ingest.holdout import check_sides, select_files
from roo_ray.ingest.pack import PackSettings
from roo_ray.ingest.plan import EpochPlan, Mode, Position, Side, Window, plan_epoch
from roo_ray.ingest.units import Units, units_of
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import Schema


class Plans:
    """The plans of some epochs, each made when it is asked for: of the plan of an epoch that is over, only its
    numbers of windows stay. Several threads may ask."""

    def __init__(self, epochs: Sequence[int], make: Callable[[int], EpochPlan]) -> None:
        self.epochs = tuple(epochs)
        self._make, self._lock = make, threading.Lock()
        self._last: EpochPlan | None = None
        self._windows: dict[int, tuple[int, ...]] = {}

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch."""
        with self._lock:
            if self._last is None or self._last.epoch != epoch:
                self._last = None  # two large ones are never held
                self._last = self._make(epoch)
                self._windows[epoch] = tuple(map(self._last.num_windows, range(len(self._last.lanes))))
            return self._last

    def num_windows(self, epoch: int) -> tuple[int, ...]:
        """How many windows each lane has in an epoch."""
        if epoch not in self._windows:
            self.plan(epoch)
        return self._windows[epoch]

    def __iter__(self) -> Iterator[EpochPlan]:
        return map(self.plan, self.epochs)

    def reading_order(self, lanes: Sequence[int], start: Position | None) -> Iterator[Window]:
        """The windows of some lanes over all epochs, as ``EpochPlan.reading_order`` has them."""
        for epoch in self.epochs:
            yield from self.plan(epoch).reading_order(lanes, start)


@dataclass(frozen=True)
class StreamSettings:
    """What a stream is a function of, on all ranks together.

    ``version``: of the data set's manifest. ``epochs``: the epochs that will be asked for, in order; one reader
    covers them all. ``start``: where the first of them goes on. ``cost``: the model's coefficients of 1, t,
    t squared, n and n t (``budget.RequestCosts``). ``form``: ``impression`` delivers the same batches exploded.
    """

    data_set: str
    version: int
    schema: Schema
    ingest: Ingest
    holdout: Holdout
    side: Side
    seed: int
    epochs: tuple[int, ...]
    mode: Mode
    start: Position | None = None
    cost: tuple[float, ...] = IMPRESSION_COST
    form: Literal["request", "impression"] = "request"

    def open(self) -> tuple[PackSettings, Plans]:
        """What the reading function needs, and the plans of the epochs. Raises DataError where there is no such
        data, a side would be empty, or the layout does not allow the mode."""
        manifest = load_manifest(self.data_set, self.version)
        check_sides(self.data_set, manifest, self.schema, self.holdout, self.side, self.ingest.on_bad_shard)
        units = units_of(select_files(manifest, self.holdout, self.side))
        ingest = self.ingest
        if ingest.drop_last and self.side == "train" and len(units) < ingest.lanes:
            raise DataError(
                f"ingest.drop_last ends an epoch with the first lane that has no more data, and {self.data_set} has "
                f"{len(units)} row groups to train on for {ingest.lanes} lanes, so that nothing would be trained on; "
                "lower ingest.lanes, build with smaller row groups (build.row_group_requests), or leave drop_last off"
            )
        packing = PackSettings(
            self.data_set,
            self.schema,
            self.holdout,
            self.side,
            ingest.batch_impressions,
            ingest.batch_cost,
            self.cost,
            ingest.oversize if self.side == "train" else "own",  # evaluation needs whole requests
            ingest.interleave if self.side == "train" else None,
            ingest.on_bad_shard,
            self.form,
        )
        plans = Plans(self.epochs, lambda epoch: self._plan(units, epoch))
        for epoch in self.epochs[:1]:  # so that a layout that does not allow the mode is refused here
            plans.num_windows(epoch)
        return packing, plans

    def _plan(self, units: Units, epoch: int) -> EpochPlan:
        ingest = self.ingest
        plan = plan_epoch(
            units,
            seed=self.seed,
            epoch=epoch,
            lanes=ingest.lanes,
            window_units=ingest.window_units,
            mode=self.mode,
        )
        return replace(plan, fills=self._fills(units)) if ingest.batch_cost else plan

    def _fills(self, units: Units) -> npt.NDArray[np.float64]:
        """(U,) about how many batches a unit fills, where their cost is bounded (and maybe their impressions)."""
        requests, impressions = units.requests.astype(np.float64), units.impressions.astype(np.float64)
        costs = requests * mean_cost(self.schema, self.cost, impressions / requests, units.tokens / requests)
        fills: npt.NDArray[np.float64] = costs / (self.ingest.batch_cost or 1.0)
        if self.ingest.batch_impressions:
            fills = np.maximum(fills, impressions / self.ingest.batch_impressions)
        return fills
