"""What a stream of batches is a function of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import DataError
from roo_ray.ingest.budget import IMPRESSION_COST
from roo_ray.ingest.holdout import check_sides, select_files
from roo_ray.ingest.pack import PackSettings
from roo_ray.ingest.plan import EpochPlan, Mode, Position, Side, plan_epoch
from roo_ray.ingest.units import units_of
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import Schema


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

    def open(self) -> tuple[PackSettings, list[EpochPlan]]:
        """What the reading function needs, and the plan of each epoch. Raises DataError where there is no such
        data, a side would be empty, or the layout does not allow the mode."""
        manifest = load_manifest(self.data_set, self.version)
        check_sides(self.data_set, manifest, self.schema, self.holdout, self.side)
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
        plans = [
            plan_epoch(
                units,
                seed=self.seed,
                epoch=epoch,
                lanes=ingest.lanes,
                window_units=ingest.window_units,
                mode=self.mode,
            )
            for epoch in self.epochs
        ]
        return packing, plans
