"""Joins requests, impressions and events into request rows with labels (docs/data.md, "Joins and windows").

Everything is matched by number (see ``keys``) and compared in whole microseconds; no loop over rows. The result
does not depend on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.source_config import Attribution
from roo_ray.sources.base import Assembled
from roo_ray.sources.columns import as_array, offsets_of
from roo_ray.sources.compare import Ints, Mask, digest_rows, sort_codes
from roo_ray.sources.keys import (
    describe_row,
    first_of_each,
    name_of_difference,
    rows_by_id,
    shared_ids,
    take_rows,
)
from roo_ray.sources.times import epoch_micros

REQUESTS, IMPRESSIONS = "requests", "impressions"
EVENT_TIME, EVENT_VALUE, IMPRESSION_TIME = "event_time", "event_value", "impression_at"


@dataclass(frozen=True)
class JoinRules:
    """How the logs are joined. ``request_key``, ``impression_key``: columns by which they meet (the second without
    those of the first); ``order``: columns that order the impressions of a request; ``request_time``: column;
    ``row_schema``: the rows to make; ``observed_until``: label -> microseconds; ``open_is_null``: whether a label
    without event is null while its window is open."""

    request_key: tuple[str, ...]
    impression_key: tuple[str, ...]
    order: tuple[str, ...]
    request_time: str
    labels: dict[str, Attribution]
    observed_until: dict[str, int]
    open_is_null: bool
    row_schema: pa.Schema


@dataclass
class _Accounts:
    counts: dict[str, int] = field(default_factory=dict)
    aside: dict[str, pa.Table] = field(default_factory=dict)

    def note(self, name: str, table: pa.Table, rows: Mask) -> None:
        """Counts rows under a name, and puts them aside under it."""
        number = int(rows.sum())
        self.counts[name] = self.counts.get(name, 0) + number
        if number:
            self.aside[name] = take_rows(table, rows)


@dataclass(frozen=True)
class _Events:
    """The distinct events of one log that belong to an impression and do not lie before it. ``rows``: their rows in
    ``table``; ``impression``: row of the impression; ``delay``: microseconds after it; ``value``: NaN where null."""

    table: pa.Table
    rows: Ints
    impression: Ints
    delay: Ints
    value: npt.NDArray[np.float64] | None


def join_logs(parts: dict[str, pa.Table], rules: JoinRules) -> Assembled:
    """Request rows of one bucket of all logs, with counts and the rows that found no partner.

    Raises DataError where two rows of the request log have one key and differ, and where an impression is logged
    twice.
    """
    accounts = _Accounts()
    names = [name for name in parts if name not in (REQUESTS, IMPRESSIONS)]
    tables = [parts[REQUESTS], parts[IMPRESSIONS], *(parts[name] for name in names)]
    request_ids = shared_ids([[table.column(name) for name in rules.request_key] for table in tables])
    requests, ids = _distinct_requests(parts[REQUESTS], request_ids[0], rules, accounts)
    count = 1 + max((int(numbers.max()) for numbers in request_ids if len(numbers)), default=-1)
    request_of = rows_by_id(ids, count)

    impressions, kept_ids = _known_impressions(parts[IMPRESSIONS], request_ids[1], request_of, accounts)
    item_columns = [
        [numbers, *(table.column(name) for name in rules.impression_key)]
        for table, numbers in zip([impressions, *tables[2:]], [kept_ids, *request_ids[2:]], strict=True)
    ]
    items = shared_ids(item_columns)
    _refuse_repeated(impressions, items[0], rules)
    impression_of = rows_by_id(items[0], 1 + max((int(i.max()) for i in items if len(i)), default=-1))
    times = _impression_times(impressions, requests, request_of[kept_ids], rules)

    made: dict[str, pa.Array] = {}
    for name, numbers, owners in zip(names, items[1:], request_ids[2:], strict=True):
        events = _matched(name, parts[name], owners, request_of, impression_of[numbers], times, accounts)
        for label, rule in rules.labels.items():
            if rule.event == name:
                made |= dict(_label(label, rule, events, times, rules, accounts))
    rows = _request_rows(requests, impressions, ids, kept_ids, made, rules, accounts)
    return Assembled(rows, accounts.counts, accounts.aside)


def _distinct_requests(table: pa.Table, ids: Ints, rules: JoinRules, accounts: _Accounts) -> tuple[pa.Table, Ints]:
    """One row per request, in order of the key, and their ids. Repetitions that say the same are counted."""
    order = np.argsort(ids, kind="stable")
    first, firsts = first_of_each(ids, order)
    repeated = order != firsts
    left, right = firsts[repeated], order[repeated]
    found = name_of_difference(table, left, right)
    if found is not None:
        name, at = found
        values = sorted(_short(table.column(name)[int(row)].as_py()) for row in (left[at], right[at]))
        raise DataError(
            f"the request log has two rows for {describe_row(table, int(left[at]), rules.request_key)} that differ in "
            f"column '{name}' ({values[0]} and {values[1]}); correct the log, or add columns to keys.request"
        )
    accounts.counts["repeated_requests"] = len(right)
    return take_rows(table, first), ids[first]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_impressions(table: pa.Table, ids: Ints, request_of: Ints, accounts: _Accounts) -> tuple[pa.Table, Ints]:
    known = request_of[ids] >= 0
    if not known.all():  # these go out as they are: in an order of their own, whatever the order of the log
        lost = np.flatnonzero(~known)
        rows = take_rows(table, lost)
        digests = [digest_rows(rows.column(name)).view(np.int64) for name in rows.column_names]
        order = np.lexsort([*digests, ids[lost]])
        accounts.note("impressions_without_request", take_rows(rows, order), np.ones(len(lost), np.bool_))
    else:
        accounts.counts["impressions_without_request"] = 0
    return take_rows(table, known), ids[known]


def _refuse_repeated(impressions: pa.Table, items: Ints, rules: JoinRules) -> None:
    counts = np.bincount(items)
    repeated = int((counts - 1)[counts > 1].sum())
    if repeated:
        first = int(np.flatnonzero(items == np.argmax(counts > 1))[0])
        keys = (*rules.request_key, *rules.impression_key)
        raise DataError(
            f"{repeated} rows of the impression log repeat the key of another one (first: "
            f"{describe_row(impressions, first, keys)}); remove the duplicates from the log, or correct "
            "keys.impression"
        )


def _impression_times(impressions: pa.Table, requests: pa.Table, owner: Ints, rules: JoinRules) -> Ints:
    """(impressions,) int64 microseconds."""
    if IMPRESSION_TIME in impressions.column_names:
        return epoch_micros(impressions.column(IMPRESSION_TIME))
    return epoch_micros(requests.column(rules.request_time), rules.request_time)[owner]


def _matched(
    name: str,
    table: pa.Table,
    owners: Ints,
    request_of: Ints,
    impression: Ints,
    times: Ints,
    accounts: _Accounts,
) -> _Events:
    """The events of a log whose impression is known and not later than they; the others are counted."""
    (same,) = shared_ids([[sort_codes(column) for column in table.columns]])
    order = np.argsort(same, kind="stable")
    table, owners, impression = take_rows(table, order), owners[order], impression[order]
    repeated = same[order] == np.append(-1, same[order])[:-1]
    counts = accounts.counts
    counts[f"events.{name}"] = table.num_rows
    counts[f"repeated_events.{name}"] = int(repeated.sum())
    lost = ~repeated & (request_of[owners] < 0)
    accounts.note(f"events_without_request.{name}", table, lost)
    unmatched = ~repeated & ~lost & (impression < 0)
    accounts.note(f"events_without_impression.{name}", table, unmatched)
    rows = np.flatnonzero(~repeated & ~lost & ~unmatched)
    impression = impression[rows]
    delay = epoch_micros(table.column(EVENT_TIME))[rows] - times[impression]
    early = np.zeros(table.num_rows, np.bool_)
    early[rows[delay < 0]] = True
    accounts.note(f"events_before_impression.{name}", table, early)
    kept = delay >= 0
    value = None
    if EVENT_VALUE in table.column_names:
        value = np.asarray(table.column(EVENT_VALUE).to_numpy(), np.float64)[rows][kept]
    return _Events(table, rows[kept], impression[kept], delay[kept], value)


def _label(
    label: str, rule: Attribution, events: _Events, times: Ints, rules: JoinRules, accounts: _Accounts
) -> Iterator[tuple[str, pa.Array]]:
    """The label's column, and that of its value where one is made: (impressions,) each."""
    window = round(rule.window * 1e6)
    late = np.zeros(events.table.num_rows, np.bool_)
    late[events.rows[events.delay > window]] = True
    accounts.note(f"events_after_window.{label}", events.table, late)
    inside = events.delay <= window
    reached = inside
    if rule.min_value is not None:
        assert events.value is not None
        reached = inside & (events.value >= rule.min_value)  # not so for a null value, which is NaN here
        accounts.counts[f"events_below_min_value.{label}"] = int((inside & ~reached).sum())
    accounts.counts[f"attributed_events.{label}"] = int(reached.sum())
    positive = np.zeros(len(times), np.bool_)
    positive[events.impression[reached]] = True
    still_open = ~positive & (times + window > rules.observed_until[label])
    accounts.counts[f"positives.{label}"] = int(positive.sum())
    accounts.counts[f"open_windows.{label}"] = int(still_open.sum())
    unknown = still_open if rules.open_is_null else None
    yield label, pa.array(positive.astype(np.int8), mask=unknown)
    if rule.value_column is not None:
        assert events.value is not None
        known = inside & ~np.isnan(events.value)
        largest = np.full(len(times), -np.inf)
        np.maximum.at(largest, events.impression[known], events.value[known])
        with_value = np.zeros(len(times), np.bool_)
        with_value[events.impression[known]] = True
        yield rule.value_column, pa.array(np.where(with_value, largest, 0.0), mask=~with_value)


def _request_rows(
    requests: pa.Table,
    impressions: pa.Table,
    request_ids: Ints,
    owner_ids: Ints,
    made: dict[str, pa.Array],
    rules: JoinRules,
    accounts: _Accounts,
) -> pa.Table:
    within = [sort_codes(impressions.column(name)) for name in rules.order]
    order = np.lexsort([*reversed(within), owner_ids])
    lengths = np.bincount(
        rows_by_id(request_ids, 1 + int(request_ids[-1]))[owner_ids] if len(request_ids) else owner_ids,
        minlength=len(request_ids),
    )
    accounts.note("requests_without_impressions", requests, lengths == 0)
    served = np.flatnonzero(lengths > 0)
    offsets = offsets_of(lengths[served])
    index = pa.array(order)
    columns = []
    for item in rules.row_schema:
        if item.name in requests.column_names:
            columns.append(as_array(requests.column(item.name)).take(pa.array(served)))
        else:
            values = made[item.name] if item.name in made else as_array(impressions.column(item.name))
            columns.append(pa.ListArray.from_arrays(offsets, values.take(index)))
    return pa.table(columns, schema=rules.row_schema)
