"""The reading function: a window of row groups in, packed batches out. Pure Arrow and NumPy: no torch, no Ray.

It runs in Ray Data tasks or in a thread of the trainer, with the same result to the bit. Requests are packed
greedily, in order, up to the budget of impressions; a request above the budget is a batch of its own; packing
never crosses a window, and nothing is dropped.

A packed window is a table with a row per batch. Every column but the tags holds, per batch, the flat values of
one tensor of ``RequestBatch``, so that a tensor is a view of a child buffer:

``epoch``, ``lane``, ``window``, ``batch``, ``batches``  tags, int64; ``batch`` counts from 0 to ``batches`` - 1
                                   in its window. A window without requests is one row, ``batch`` -1 of 0.
``num_impressions``, ``request_key``, ``user_key``       int64, B_RO values; ``request_time`` float64
``impression_index``                                     int64, B_NRO values
``request_dense``, ``impression_dense``                  float32, rows x width values; only where width > 0
``ids:KEY``                        int64, KEY as in ``request_ids`` and ``impression_ids``
``lengths:NAME``                   int64: of the lists of a sequence or of a pooled id feature
``sequence_dense:NAME``            float32, T x C values, only where C > 0; ``sequence_time:NAME`` float64, T
``labels``, ``weights``            float32, B_NRO x K values; ``oracle`` only where a label names one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_ray.config import Holdout
from roo_ray.errors import DataError
from roo_ray.ingest.columns import Where, dense_of, ids_of, labels_of, oracle_of, seconds_of
from roo_ray.ingest.holdout import rows_of_side
from roo_ray.ingest.lists import Lists, split_lists
from roo_ray.ingest.plan import Side, Window, permutation
from roo_ray.ingest.read import NUM_IMPRESSIONS, columns_to_read, read_units
from roo_ray.requests.hashing import hash_array, hash_rows
from roo_ray.schema import Feature, Level, Schema

Integers = npt.NDArray[np.int64]
TAGS = ("epoch", "lane", "window", "batch", "batches")


@dataclass(frozen=True)
class PackSettings:
    """What the reading function needs beside a window."""

    data_set: str
    schema: Schema
    holdout: Holdout
    side: Side
    batch_impressions: int


def batch_bounds(counts: Integers, budget: int) -> Integers:
    """(batches + 1,) int64: the first request of each batch, and the end, when requests of ``counts`` (B,)
    impressions are packed in order up to ``budget``; one above the budget is a batch of its own."""
    ends = np.cumsum(counts)
    bounds = [0]
    while bounds[-1] < len(counts):
        start = bounds[-1]
        before = int(ends[start - 1]) if start else 0
        bounds.append(max(int(np.searchsorted(ends, before + budget, side="right")), start + 1))
    return np.array(bounds, np.int64)


def _at(lengths: Integers, bounds: Integers) -> Integers:
    """Where batches begin in the elements of lists of ``lengths``, given where they begin in the lists."""
    return np.concatenate([[0], np.cumsum(lengths)])[bounds]


def _owners(lengths: Integers) -> Callable[[int], int]:
    """Which list an element of flattened lists is in."""
    return lambda element: int(np.searchsorted(np.cumsum(lengths), element, side="right"))


class _WindowRows:
    """The requests of a window in packed order: ``rows`` (B,) int64 are their rows in the table as read."""

    def __init__(self, settings: PackSettings, window: Window) -> None:
        self.settings, self.window, self.schema = settings, window, settings.schema
        self.table = read_units(settings.data_set, window.units, columns_to_read(self.schema))
        keys = hash_rows(self.table, self.schema.keys.request)
        mine = rows_of_side(keys, settings.holdout, settings.side)
        self.rows = np.arange(self.table.num_rows) if mine is None else np.flatnonzero(mine)
        if window.shuffle is not None:
            self.rows = self.rows[permutation(len(self.rows), window.shuffle)]
        self.keys = keys[self.rows].view(np.int64)  # (B,)
        self.counts = self._counts()  # (B,)
        self._aligned: tuple[Integers, Integers] | None = None

    def column(self, name: str) -> pa.Array:
        """A column as read, as one array."""
        column = self.table.column(name)
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        if pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        return array

    def values(self, name: str) -> pa.Array:
        """(B,): a request-level column in packed order."""
        return self.column(name).take(pa.array(self.rows))

    def where(self, request: int) -> str:
        """Names a request, by its place in packed order, and its file: for error messages."""
        if not len(self.rows):
            return self.settings.data_set
        row = int(self.rows[request])
        key = ", ".join(f"{name}={self.table.column(name)[row]}" for name in self.schema.keys.request)
        ends = np.cumsum([unit.requests for unit in self.window.units])
        path = self.window.units[int(np.searchsorted(ends, row, side="right"))].path
        return f"request {key} of {self.settings.data_set}/{path}"

    def _counts(self) -> Integers:
        column = self.values(NUM_IMPRESSIONS)
        counts = np.asarray(column.fill_null(0)).astype(np.int64)
        if (counts < 1).any():
            at = int(np.argmax(counts < 1))
            raise DataError(
                f"column '{NUM_IMPRESSIONS}' is {column[at]} in {self.where(at)}; a request has at least one "
                "impression: build the data set again"
            )
        return counts

    def lists(self, name: str) -> Lists:
        """The lists of a column as read (in stored order). Raises DataError where it holds no lists."""
        array = self.column(name)
        try:
            return split_lists(array)
        except TypeError:
            raise DataError(
                f"column '{name}' holds {array.type}, and the schema needs a list per request, in "
                f"{self.where(0)}; correct the schema, or build the data set again with it"
            ) from None

    def _index(self, lists: Lists) -> Integers:
        """(B_NRO,) int64 into the flat values; aligned columns, whose lists lie alike, share one index."""
        if self._aligned is None or not np.array_equal(self._aligned[0], lists.starts):
            self._aligned = (lists.starts, lists.select(self.rows).index)
        return self._aligned[1]

    def impressions(self, name: str) -> tuple[pa.Array, Integers]:
        """(flat values as read, index (B_NRO,) into them of each impression in packed order).

        Raises DataError where a request's list is not as long as its number of impressions.
        """
        lists = self.lists(name)
        lengths = lists.lengths[self.rows]
        wrong = lengths != self.counts
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"column '{name}' has {lengths[at]} values for {self.counts[at]} impressions in "
                f"{self.where(at)}; build the data set again"
            )
        return lists.values, self._index(lists)

    def where_impression(self, impression: int) -> str:
        """Names the request of an impression, by its place in packed order."""
        return self.where(_owners(self.counts)(impression))

    def where_element(self, lengths: Integers, list_where: Where) -> Where:
        """Names an element of flattened lists of ``lengths`` by what names its list."""
        owner = _owners(lengths)
        return lambda element: list_where(owner(element))


def _take(values: pa.Array, index: Integers) -> pa.Array:
    return values.take(pa.array(index))


class _Packer:
    """Collects the columns of a packed window."""

    def __init__(self, rows: _WindowRows, bounds: Integers) -> None:
        self.rows, self.schema = rows, rows.schema
        self.of_requests = bounds  # (batches + 1,) first request of each batch
        self.of_impressions = _at(rows.counts, bounds)  # (batches + 1,)
        self.columns: dict[str, pa.Array] = {}

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
                where: Where = self.rows.where
                if level == "request":
                    values = self.rows.values(name)
                else:
                    values, where = _take(*self.rows.impressions(name)), self.rows.where_impression
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
            stored, index, bounds, where = rows.column(name), rows.rows, self.of_requests, rows.where
        else:
            stored, index = rows.impressions(name)
            bounds, where = self.of_impressions, rows.where_impression
        if feature.pooling == "none":
            if isinstance(stored, (pa.ListArray, pa.LargeListArray)):
                raise DataError(
                    f"column '{name}' holds lists, and feature '{feature.name}' takes one id, in {where(0)}; "
                    "give the feature a pooling (sum or mean)"
                )
            values = ids_of(_take(stored, index), name, feature.table, table, where, feature.fill_id)
            self.add(f"ids:{feature.name}", values, bounds)
            return
        try:
            bags = split_lists(stored)
        except TypeError:
            bags = Lists.of_scalars(stored)
        chosen = bags.select(index, first=feature.max_length)
        where = rows.where_element(chosen.lengths, where)
        values = ids_of(_take(bags.values, chosen.index), name, feature.table, table, where, feature.fill_id)
        self.add(f"lengths:{feature.name}", chosen.lengths, bounds)
        self.add(f"ids:{feature.name}", values, _at(chosen.lengths, bounds))

    def sequence(self, feature: Feature) -> None:
        """An event sequence: aligned columns, cut to the last ``max_length`` events."""
        rows = self.rows
        lengths = rows.lists(feature.source_columns[0]).lengths[rows.rows]
        cut: tuple[Integers, Integers] | None = None  # the starts of lists, and the index that they give

        def events(name: str) -> pa.Array:
            nonlocal cut
            lists = rows.lists(name)
            own = lists.lengths[rows.rows]
            if (own != lengths).any():
                at = int(np.argmax(own != lengths))
                raise DataError(
                    f"sequence '{feature.name}': column '{name}' has {own[at]} events and "
                    f"'{feature.source_columns[0]}' {lengths[at]} in {rows.where(at)}; the columns "
                    "of a sequence must be aligned"
                )
            if cut is None or not np.array_equal(cut[0], lists.starts):
                cut = (lists.starts, lists.select(rows.rows, last=feature.max_length).index)
            return _take(lists.values, cut[1])

        kept = np.minimum(lengths, feature.max_length or 0)
        bounds, where = _at(kept, self.of_requests), rows.where_element(kept, rows.where)
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
            flat = _take(*rows.impressions(label.column))
            value, weight = labels_of(flat, label.column, rows.where_impression)
            values.append(value)
            weights.append(weight)
            if label.oracle:
                oracles.append(oracle_of(_take(*rows.impressions(label.oracle)), label.oracle))
            else:
                oracles.append(np.full(len(value), np.nan, np.float32))
        self.add("labels", np.stack(values, 1), self.of_impressions)
        self.add("weights", np.stack(weights, 1), self.of_impressions)
        if any(label.oracle for label in self.schema.labels):
            self.add("oracle", np.stack(oracles, 1), self.of_impressions)

    def pack(self) -> dict[str, pa.Array]:
        """All columns but the tags."""
        rows, keys = self.rows, self.schema.keys
        starts = np.cumsum(rows.counts) - rows.counts
        index = np.arange(int(rows.counts.sum())) - np.repeat(starts, rows.counts)
        users = hash_array(rows.values(keys.user)).view(np.int64)
        self.add("num_impressions", rows.counts, self.of_requests)
        self.add("request_key", rows.keys, self.of_requests)
        self.add("user_key", users, self.of_requests)
        self.add("request_time", seconds_of(rows.values(keys.time), keys.time, rows.where), self.of_requests)
        self.add("impression_index", index, self.of_impressions)
        self.dense("request")
        self.dense("impression")
        for feature in self.schema.features:
            if feature.kind == "ids":
                self.ids(feature)
            elif feature.kind == "sequence":
                self.sequence(feature)
        self.labels()
        return self.columns


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


def pack_window(settings: PackSettings, window: Window) -> pa.Table:
    """The batches of a window, a row each, in order; see the module's docstring for the columns.

    Raises DataError that names the file, and for a wrong value the column and the request.
    """
    rows = _WindowRows(settings, window)
    bounds = batch_bounds(rows.counts, settings.batch_impressions)
    batches = len(bounds) - 1
    if not batches:
        bounds = np.zeros(2, np.int64)  # one row with empty lists
    return pa.table(_tags(window, batches) | _Packer(rows, bounds).pack())
