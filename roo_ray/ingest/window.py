"""The requests of a window, read, ordered, split and cut into batches: what ``pack.py`` packs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.config import Holdout
from roo_ray.errors import DataError
from roo_ray.ingest.budget import IMPRESSION_COST, Load, RequestCosts, batch_bounds, interleave, split_oversize
from roo_ray.ingest.columns import Where, seconds_of
from roo_ray.ingest.holdout import rows_of_side
from roo_ray.ingest.lists import Lists, gather, ranges, split_lists
from roo_ray.ingest.plan import Side, Window, permutation
from roo_ray.ingest.read import NUM_IMPRESSIONS
from roo_ray.ingest.rows import ReadRequests, read_requests
from roo_ray.schema import Feature, Schema
from roo_ray.sources.hashing import hash_array, hash_rows
from roo_ray.storage import join_path

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackSettings:
    """What the reading function needs beside a window; see ``config.Ingest``. ``cost``: coefficients of 1, t,
    t squared, n and n t. ``form`` ``impression``: the same batches, every impression a request of its own, as
    ``RequestBatch.explode`` gives them."""

    data_set: str
    schema: Schema
    holdout: Holdout
    side: Side
    batch_impressions: int | None
    batch_cost: float | None = None
    cost: tuple[float, ...] = IMPRESSION_COST
    oversize: Literal["own", "split"] = "own"
    interleave: int | None = None
    on_bad_shard: Literal["fail", "skip"] = "fail"
    form: Literal["request", "impression"] = "request"


def _owners(lengths: Integers) -> Callable[[int], int]:
    """Which list an element of flattened lists is in."""
    return lambda element: int(np.searchsorted(np.cumsum(lengths), element, side="right"))


def take(values: pa.Array, index: Integers) -> pa.Array:
    """The values at ``index`` (N,), which must be within them."""
    return pc.take(values, pa.array(index), boundscheck=False)


@dataclass(frozen=True)
class _Future:
    """Lists with events at or after their request: ``rows`` (B,) of the table, their ``lengths`` (B,), and which
    ``events`` (sum of lengths,) these are."""

    rows: Integers
    lengths: Integers
    events: npt.NDArray[np.bool_]


class WindowRows:
    """The requests of a window in packed order. ``rows`` (B,) int64: their rows in the table as read, a row twice
    where its request is split; ``counts`` (B,): their impressions, from the ``first`` (B,) of the row's on;
    ``bounds`` (batches + 1,): the first request of each batch."""

    def __init__(self, settings: PackSettings, window: Window, read: ReadRequests | None = None) -> None:
        self.settings, self.window, self.schema = settings, window, settings.schema
        self._columns: dict[str, pa.Array] = {}
        self._future: dict[tuple[str, int], _Future | None] = {}
        read = read or read_requests(
            settings.data_set, window.units, self.schema, settings.on_bad_shard, settled=window.settled
        )
        self.table, self.units, self.skipped, self.skipped_units = (
            read.table,
            read.units,
            read.skipped,
            read.skipped_units,
        )
        keys = hash_rows(self.table, self.schema.keys.request)
        mine = rows_of_side(keys, settings.holdout, settings.side)
        self.rows = np.arange(self.table.num_rows) if mine is None else np.flatnonzero(mine)
        if window.shuffle is not None:
            self.rows = self.rows[permutation(len(self.rows), window.shuffle)]
        self.counts = self._counts()
        if window.by_time:
            times = seconds_of(self.values(self.schema.keys.time), self.schema.keys.time, self.where)
            self._reorder(np.argsort(times, kind="stable"))
        self.first = np.zeros(len(self.rows), np.int64)
        self.mark: Integers | None = None
        self._fill_batches(keys.view(np.int64))
        self.keys = keys[self.rows].view(np.int64)
        self._aligned: tuple[Integers, Integers] | None = None

    def _reorder(self, order: Integers) -> None:
        self.rows, self.counts = self.rows[order], self.counts[order]

    def _users(self, keys: Integers) -> Integers:
        """(B,) a hash of each request's user. Null users are not one user: each has the request's key (``keys``, of
        the table's rows)."""
        column = self.values(self.schema.keys.user)
        users = hash_array(column).view(np.int64)
        return np.where(np.asarray(column.is_null()), keys[self.rows], users) if column.null_count else users

    def _fill_batches(self, keys: Integers) -> None:
        """Splits what is to be split, and decides which requests make up which batch. ``keys``: of the table's rows."""
        settings, costs = self.settings, self._request_costs()
        if settings.oversize == "split":
            parts = split_oversize(self.counts, costs, settings.batch_impressions, settings.batch_cost)
            self.rows, self.counts = self.rows[parts.request], parts.counts
            self.first, self.mark, costs = parts.first, parts.mark, costs.take(parts.request)
        cost = costs.at(self.counts)
        loads: list[Load] = [(self.counts, settings.batch_impressions)] if settings.batch_impressions else []
        loads += [(cost, settings.batch_cost)] if settings.batch_cost else []
        self.users = self._users(keys)
        if settings.interleave is None:
            self.bounds = batch_bounds(loads, len(self.rows))
        else:
            order, self.bounds = interleave(self.users, loads, settings.interleave)
            self._reorder(order)
            self.first, self.users, cost = self.first[order], self.users[order], cost[order]
            self.mark = None if self.mark is None else self.mark[order]
        self.batch_costs = np.add.reduceat(cost, self.bounds[:-1]) if len(cost) else np.zeros(0)

    def _request_costs(self) -> RequestCosts:
        """The costs of the requests; reads the lengths of histories only where they cost anything."""
        tokens, squares = np.zeros((2, len(self.rows)), np.int64)
        if any(self.settings.cost[i] for i in (1, 2, 4)):
            for feature in self.schema.sequences:
                lengths = self.history(feature, feature.source_columns[0]).lengths[self.rows]
                kept = np.minimum(lengths, feature.max_length or 0)
                tokens, squares = tokens + kept, squares + kept * kept
        return RequestCosts.of(self.settings.cost, tokens, squares)

    def column(self, name: str) -> pa.Array:
        """A column as read, as one array."""
        if name not in self._columns:
            column = self.table.column(name)
            array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
            if pa.types.is_fixed_size_list(array.type):
                array = array.cast(pa.list_(array.type.value_type))
            self._columns[name] = array
        return self._columns[name]

    def values(self, name: str) -> pa.Array:
        """(B,): a request-level column in packed order."""
        return take(self.column(name), self.rows)

    def where(self, request: int) -> str:
        """Names a request, by its place in packed order, and its file: for error messages."""
        return self.where_row(int(self.rows[request])) if len(self.rows) else self.settings.data_set

    def where_row(self, row: int) -> str:
        """Names the request in a row of the table as read."""
        key = ", ".join(f"{name}={self.table.column(name)[row]}" for name in self.schema.keys.request)
        ends = np.cumsum([unit.requests for unit in self.units])
        unit = self.units[int(np.searchsorted(ends, row, side="right"))]
        return f"request {key} of {unit.path if unit.rows else join_path(self.settings.data_set, unit.path)}"

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

    def history(self, feature: Feature, name: str) -> Lists:
        """The lists of a sequence's column (in stored order). Those that ``max_length`` will cut have lost their events
        at or after their request's time: the model drops these, and earlier ones would be missing for them."""
        lists, future = self.lists(name), self._future_events(feature)
        if future is None or (lists.lengths[future.rows] != future.lengths).any():  # what is not aligned is said later
            return lists
        return lists.without(future.rows, future.events)

    def _future_events(self, feature: Feature) -> _Future | None:
        longest = feature.max_length or 0
        if feature.time is None:
            return None
        if (feature.time, longest) not in self._future:
            times = self.lists(feature.time)
            rows = np.unique(self.rows)
            rows = rows[times.lengths[rows] > longest]
            self._future[feature.time, longest] = self._future_of(times, feature.time, rows) if len(rows) else None
        return self._future[feature.time, longest]

    def _future_of(self, times: Lists, name: str, rows: Integers) -> _Future | None:
        lengths = times.lengths[rows]
        events = gather(times.values, times.starts[rows], lengths)
        if events.null_count:  # a null that is kept is said later
            events = events.fill_null(pa.scalar(0, pa.int64()).cast(events.type))
        column = self.schema.keys.time
        asked = seconds_of(take(self.column(column), rows), column, lambda row: self.where_row(int(rows[row])))
        seen = seconds_of(events, name, self.where_element(lengths, lambda row: self.where_row(int(rows[row]))))
        late = seen >= np.repeat(asked, lengths)
        some = np.add.reduceat(late, np.cumsum(lengths) - lengths) > 0  # no list here is empty
        return _Future(rows[some], lengths[some], late[np.repeat(some, lengths)]) if some.any() else None

    def _index(self, lists: Lists) -> Integers:
        """(B_NRO,) int64 into the flat values; aligned columns, whose lists lie alike, share one index."""
        if self._aligned is None or not np.array_equal(self._aligned[0], lists.starts):
            self._aligned = (lists.starts, ranges(lists.starts[self.rows] + self.first, self.counts))
        return self._aligned[1]

    def impressions(self, name: str) -> tuple[pa.Array, Integers]:
        """(flat values as read, index (B_NRO,) into them of each impression in packed order).

        Raises DataError where a request's list is not as long as its number of impressions.
        """
        lists = self.lists(name)
        wanted = np.asarray(self.column(NUM_IMPRESSIONS).fill_null(0)).astype(np.int64)
        wrong = (lists.lengths != wanted)[self.rows]
        if wrong.any():
            row = int(self.rows[np.argmax(wrong)])
            raise DataError(
                f"column '{name}' has {lists.lengths[row]} values for {wanted[row]} impressions in "
                f"{self.where_row(row)}; build the data set again"
            )
        return lists.values, self._index(lists)

    def where_impression(self, impression: int) -> str:
        """Names the request of an impression, by its place in packed order."""
        return self.where(_owners(self.counts)(impression))

    def where_element(self, lengths: Integers, list_where: Where) -> Where:
        """Names an element of flattened lists of ``lengths`` by what names its list."""
        owner = _owners(lengths)
        return lambda element: list_where(owner(element))
