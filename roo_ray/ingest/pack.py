"""The reading function: a window of row groups in, packed batches out. Pure Arrow and NumPy: no torch, no Ray.

It runs in Ray Data tasks or in a thread of the trainer, with the same result to the bit. Requests are packed in
order up to the budgets (``budget.py``); packing never crosses a window, and nothing is dropped.

A packed window is a table with a row per batch. Every column but the tags and the counts holds, per batch, the
flat values of one tensor of ``RequestBatch``, so that a tensor is a view of a child buffer:

``epoch``, ``lane``, ``window``, ``batch``, ``batches``  tags, int64; ``batch`` counts from 0 to ``batches`` - 1
                                   in its window. A window without requests is one row, ``batch`` -1 of 0.
``requests``, ``users``, ...       int64 counts of the batch (``diagnostics.STATS``); ``skipped_requests``: of
                                   shards that could not be read, on a window's first row; ``cost`` float64
``skipped_units``                  int64: the places of these shards' units in the window, on its first row
``num_impressions``, ``request_key``, ``user_key``       int64, B_RO values; ``request_time`` float64
``impression_index``                                     int64, B_NRO values
``split``                          int64, B_RO values, only where requests may be split
``request_dense``, ``impression_dense``                  float32, rows x width values; only where width > 0
``ids:KEY``                        int64, KEY as in ``request_ids`` and ``impression_ids``
``lengths:NAME``                   int64: of the lists of a sequence or of a pooled id feature
``sequence_dense:NAME``            float32, T x C values, only where C > 0; ``sequence_time:NAME`` float64, T
``labels``, ``weights``            float32, B_NRO x K values; ``oracle`` only where a label names one
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.ingest.columns import Where, dense_of, ids_of, labels_of, oracle_of, seconds_of
from roo_ray.ingest.diagnostics import STATS, negative_pairs, user_stats
from roo_ray.ingest.lists import Lists, ranges, split_lists
from roo_ray.ingest.plan import Window
from roo_ray.ingest.rows import ReadRequests
from roo_ray.ingest.window import PackSettings as PackSettings
from roo_ray.ingest.window import WindowRows, take
from roo_ray.schema import Feature, Level

Integers = npt.NDArray[np.int64]
TAGS = ("epoch", "lane", "window", "batch", "batches")
COUNTS = (*STATS, "skipped_requests", "cost")


def _at(lengths: Integers, bounds: Integers) -> Integers:
    """Where batches begin in the elements of lists of ``lengths``, given where they begin in the lists."""
    return np.concatenate([[0], np.cumsum(lengths)])[bounds]


class _Packer:
    """Collects the columns of a packed window. ``user_rows``: the rows of the table as read that request-level
    values come from: a row per request, or per impression in the impression-level form."""

    def __init__(self, rows: WindowRows) -> None:
        self.rows, self.schema = rows, rows.schema
        bounds = rows.bounds if len(rows.bounds) > 1 else np.zeros(2, np.int64)  # one row with empty lists
        self.of_impressions = _at(rows.counts, bounds)  # (batches + 1,) first impression of each batch
        self.exploded = rows.settings.form == "impression"
        # (batches + 1,) where request-level values of each batch begin
        self.of_requests = self.of_impressions if self.exploded else bounds
        self.user_rows = self.per_user(rows.rows)
        self.columns: dict[str, pa.Array] = {}
        self.items: Integers | None = None

    def per_user(self, values: Integers) -> Integers:
        """Values (B,) of requests as the form of the batch has them."""
        return np.repeat(values, self.rows.counts) if self.exploded else values

    def where_user(self, place: int) -> str:
        """Names the request of a request-level value."""
        return self.rows.where_row(int(self.user_rows[place])) if len(self.user_rows) else self.rows.where(0)

    def add(self, name: str, values: npt.NDArray[np.generic], bounds: Integers) -> None:
        """Adds a column: values (T, ...) of all batches, cut at ``bounds`` (batches + 1,) of their rows."""
        width = int(np.prod(values.shape[1:], dtype=np.int64))
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        self.columns[name] = pa.LargeListArray.from_arrays(pa.array(bounds * width), flat)

    def dense(self, level: Level) -> None:
        """The dense features of a level."""
        parts = []
        for feature in self.schema.select(level, "dense"):
            for name in feature.columns:
                where: Where = self.where_user
                if level == "request":
                    values = take(self.rows.column(name), self.user_rows)
                else:
                    values, where = take(*self.rows.impressions(name)), self.rows.where_impression
                parts.append(dense_of(values, name, where, feature.fill, feature.scale))
        if parts:
            bounds = self.of_requests if level == "request" else self.of_impressions
            self.add(f"{level}_dense", np.stack(parts, 1), bounds)

    def ids(self, feature: Feature) -> None:
        """An id feature of either level: one id, or a bag cut to its first ``max_length``."""
        rows, name = self.rows, feature.columns[0]
        assert feature.table is not None
        table = self.schema.tables[feature.table]
        where: Where
        if feature.level == "request":
            stored, index, bounds, where = rows.column(name), self.user_rows, self.of_requests, self.where_user
        else:
            stored, index = rows.impressions(name)
            bounds, where = self.of_impressions, rows.where_impression
        if feature.pooling == "none":
            if isinstance(stored, (pa.ListArray, pa.LargeListArray)):
                raise DataError(
                    f"column '{name}' holds lists, and feature '{feature.name}' takes one id, in {where(0)}; "
                    "give the feature a pooling (sum or mean)"
                )
            values = ids_of(take(stored, index), name, feature.table, table, where, feature.fill_id)
            self.add(f"ids:{feature.name}", values, bounds)
            if feature.level == "impression" and self.items is None:
                self.items = values
            return
        try:
            bags = split_lists(stored)
        except TypeError:
            bags = Lists.of_scalars(stored)
        chosen = bags.select(index, first=feature.max_length)
        where = rows.where_element(chosen.lengths, where)
        values = ids_of(chosen.of(bags.values), name, feature.table, table, where, feature.fill_id)
        self.add(f"lengths:{feature.name}", chosen.lengths, bounds)
        self.add(f"ids:{feature.name}", values, _at(chosen.lengths, bounds))

    def sequence(self, feature: Feature) -> None:
        """An event sequence: aligned columns, cut to the last ``max_length`` events before the request."""
        rows = self.rows
        lengths = rows.history(feature, feature.source_columns[0]).lengths[self.user_rows]

        def events(name: str) -> pa.Array:
            lists = rows.history(feature, name)
            own = lists.lengths[self.user_rows]
            if (own != lengths).any():
                at = int(np.argmax(own != lengths))
                raise DataError(
                    f"sequence '{feature.name}': column '{name}' has {own[at]} events and "
                    f"'{feature.source_columns[0]}' {lengths[at]} in {self.where_user(at)}; the columns "
                    "of a sequence must be aligned"
                )
            return lists.select(self.user_rows, last=feature.max_length).of(lists.values)

        kept = np.minimum(lengths, feature.max_length or 0)
        bounds, where = _at(kept, self.of_requests), rows.where_element(kept, self.where_user)
        self.add(f"lengths:{feature.name}", kept, self.of_requests)
        for event in feature.sequence_ids:
            assert event.table is not None
            table = self.schema.tables[event.table]
            ids = ids_of(events(event.column), event.column, event.table, table, where)
            self.add(f"ids:{feature.name}.{event.column}", ids, bounds)
        parts = [  # an unknown value is 0.0, before and after scaling: the event itself is kept
            dense_of(events(event.column), event.column, where, 0.0, event.scale) for event in feature.sequence_dense
        ]
        if parts:
            self.add(f"sequence_dense:{feature.name}", np.stack(parts, 1), bounds)
        if feature.time:
            seconds = seconds_of(events(feature.time), feature.time, where)
            self.add(f"sequence_time:{feature.name}", seconds, bounds)

    def labels(self) -> None:
        """Labels with their weights, and true probabilities where the schema names any."""
        rows, values, weights, oracles = self.rows, [], [], []
        for label in self.schema.labels:
            flat = take(*rows.impressions(label.column))
            value, weight = labels_of(flat, label.column, rows.where_impression)
            values.append(value)
            weights.append(weight)
            if label.oracle:
                oracles.append(oracle_of(take(*rows.impressions(label.oracle)), label.oracle))
            else:
                oracles.append(np.full(len(value), np.nan, np.float32))
        self.add("labels", np.stack(values, 1), self.of_impressions)
        self.add("weights", np.stack(weights, 1), self.of_impressions)
        if any(label.oracle for label in self.schema.labels):
            self.add("oracle", np.stack(oracles, 1), self.of_impressions)

    def pack(self) -> dict[str, pa.Array]:
        """All columns but the tags."""
        rows, keys = self.rows, self.schema.keys
        self.add("num_impressions", np.ones_like(self.user_rows) if self.exploded else rows.counts, self.of_requests)
        self.add("request_key", self.per_user(rows.keys), self.of_requests)
        self.add("user_key", self.per_user(rows.users), self.of_requests)
        times = seconds_of(take(rows.column(keys.time), self.user_rows), keys.time, self.where_user)
        self.add("request_time", times, self.of_requests)
        self.add("impression_index", ranges(rows.first, rows.counts), self.of_impressions)
        if rows.mark is not None:
            self.add("split", self.per_user(rows.mark), self.of_requests)
        skipped = np.array(rows.skipped_units, np.int64)
        self.add("skipped_units", skipped, np.where(np.arange(len(self.of_impressions)), len(skipped), 0))
        self.dense("request")
        self.dense("impression")
        for feature in self.schema.features:
            if feature.kind == "ids":
                self.ids(feature)
            elif feature.kind == "sequence":
                self.sequence(feature)
        self.labels()
        return self.counts() | self.columns

    def counts(self) -> dict[str, pa.Array]:
        """The counts of each batch, for metrics."""
        rows, batches = self.rows, len(self.of_impressions) - 1
        counted = dict.fromkeys(STATS, np.zeros(batches, np.int64))
        cost, skipped = np.zeros(batches), np.zeros(batches, np.int64)
        skipped[0] = rows.skipped
        if len(rows.rows):
            cost = rows.batch_costs
            whole = np.ones(len(rows.rows), np.int64) if rows.mark is None else (rows.mark < 2).astype(np.int64)
            counted["requests"] = np.add.reduceat(whole, rows.bounds[:-1])
            counted["users"], counted["crowded"], users = user_stats(rows.bounds, rows.users, rows.settings.interleave)
            if self.items is not None:
                tasks = len(self.schema.labels)
                known = self.columns["weights"].values.to_numpy().reshape(-1, tasks) > 0
                pool = known.any(1)
                positive = (self.columns["labels"].values.to_numpy()[::tasks] > 0) & known[:, 0]
                batch = np.repeat(np.arange(batches), np.diff(self.of_impressions))
                of_user = np.repeat(users, rows.counts)
                of_each = (batch, of_user, self.items, positive)
                if not pool.all():
                    of_each = (batch[pool], of_user[pool], self.items[pool], positive[pool])
                counted["negative_pairs"], counted["false_pairs"] = negative_pairs(*of_each, batches)
        named = counted | {"skipped_requests": skipped, "cost": cost}
        return {name: pa.array(values) for name, values in named.items()}


def _tags(window: Window, batches: int) -> dict[str, pa.Array]:
    size = max(batches, 1)
    tags: dict[str, Sequence[int] | Integers] = {
        "epoch": np.full(size, window.epoch),
        "lane": np.full(size, window.lane),
        "window": np.full(size, window.index),
        "batch": np.arange(size) if batches else np.array([-1]),
        "batches": np.full(size, batches),
    }
    return {name: pa.array(tags[name], pa.int64()) for name in TAGS}


def pack_window(settings: PackSettings, window: Window, read: ReadRequests | None = None) -> pa.Table:
    """The batches of a window, a row each, in order; see the module's docstring for the columns. ``read``: its
    requests, where they are in memory already.

    Raises DataError that names the file, and for a wrong value the column and the request.
    """
    return pack_rows(WindowRows(settings, window, read))


def pack_rows(rows: WindowRows) -> pa.Table:
    """As ``pack_window``, of a window that was read; ``rows`` has its other columns in the same order."""
    return pa.table(_tags(rows.window, len(rows.bounds) - 1) | _Packer(rows).pack())
