"""Requests out of a log of impressions that has none: runs of a user's impressions, with the history before each.

Vectorised over all users at once; the result does not depend on the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from roo_ray.sources.columns import as_array, offsets_of
from roo_ray.sources.compare import Ints, Mask, digest_rows, sort_codes
from roo_ray.sources.keys import first_of_each, shared_ids

USER, VIDEO, TAB, TIME_MS = "user_id", "video_id", "tab", "time_ms"
HISTORY = "history_"
HISTORY_TIME = "history_time"
REQUEST_TIME = "request_time"
POSITION = "position"
INSTANT = pa.timestamp("ms")


@dataclass(frozen=True)
class SessionRules:
    """When a request begins, and what its history is; see ``KuairandSource``. ``request_columns`` and
    ``impression_columns``: the columns to make."""

    gap_ms: int
    max_impressions: int | None
    history_of: tuple[str, ...]
    history_length: int
    request_columns: tuple[str, ...]
    impression_columns: tuple[str, ...]


def derive_requests(table: pa.Table, rules: SessionRules) -> tuple[pa.Table, dict[str, int]]:
    """(request rows, counts) of all impressions of some users.

    ``table``: ``user_id``, ``video_id``, ``tab``, ``time_ms`` (int64 milliseconds) and what the rules name. Rows
    that are equal in all columns are one impression; the others are counted as ``repeated_impressions``.
    ``request_time`` is the time of the first impression; the history holds the user's impressions with a signal
    at times before it.
    """
    rows = _distinct(table)
    log = table.take(pa.array(rows))
    user, time, tab = (np.asarray(log.column(name)) for name in (USER, TIME_MS, TAB))
    starts = _starts(user, time, tab, rules)
    lengths = np.diff(np.append(starts, len(user)))
    columns: dict[str, pa.Array] = {REQUEST_TIME: pa.array(time[starts]).cast(INSTANT)}
    columns |= {name: as_array(log.column(name)).take(pa.array(starts)) for name in (USER, TAB)}
    columns |= _histories(log, user, time, starts, rules)
    offsets = offsets_of(lengths)
    for name in rules.impression_columns:
        if name == POSITION:
            values = pa.array((np.arange(len(user)) - np.repeat(starts, lengths)).astype(np.int32))
        else:
            values = as_array(log.column(name))
        columns[name] = pa.ListArray.from_arrays(offsets, values)
    made = pa.table({name: columns[name] for name in (USER, *rules.request_columns, *rules.impression_columns)})
    return made, {"repeated_impressions": table.num_rows - len(rows)}


def _distinct(table: pa.Table) -> Ints:
    """The rows in order of user, time, tab and video, each once; what ties in these is told apart by the other
    columns."""
    (ids,) = shared_ids([[sort_codes(table.column(name)) for name in (USER, TIME_MS, TAB, VIDEO)]])
    order = np.argsort(ids, kind="stable")
    repeats = order[1:][ids[order[1:]] == ids[order[:-1]]]
    if len(repeats):
        tied = np.isin(ids, ids[repeats])
        some = table.take(pa.array(np.flatnonzero(tied)))
        digests = [digest_rows(some.column(name)).view(np.int64) for name in some.column_names]
        within = np.zeros(len(ids), np.int64)
        within[tied] = shared_ids([digests])[0]
        (ids,) = shared_ids([[ids, within]])
        order = np.argsort(ids, kind="stable")
    return first_of_each(ids, order)[0]


def _changes(*columns: Ints) -> Mask:
    """(N,) bool: whether any column differs from the row before; true for the first."""
    changed = np.zeros(len(columns[0]), np.bool_)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _starts(user: Ints, time: Ints, tab: Ints, rules: SessionRules) -> Ints:
    """(requests,) first rows of the requests, of rows in order of user, time and tab."""
    begins = _changes(user, tab)
    begins[1:] |= np.diff(time) > rules.gap_ms
    if rules.max_impressions is not None:
        starts = np.flatnonzero(begins)
        rows = np.arange(len(user))
        first_of_time = np.flatnonzero(begins | _changes(time))
        # rows of one time have the place of the first of them, so that a cut never falls between them
        place = first_of_time[np.searchsorted(first_of_time, rows, side="right") - 1]
        place = place - starts[np.searchsorted(starts, rows, side="right") - 1]
        begins |= _changes(place // rules.max_impressions)
    found: Ints = np.flatnonzero(begins)
    return found


def _histories(log: pa.Table, user: Ints, time: Ints, starts: Ints, rules: SessionRules) -> dict[str, pa.Array]:
    wanted = [name for name in rules.request_columns if name.startswith(HISTORY)]
    if not wanted:
        return {}
    positive = np.zeros(len(user), np.bool_)
    for name in rules.history_of:
        positive |= np.asarray(log.column(name)) != 0
    before = np.concatenate([[0], np.cumsum(positive)])  # (N + 1,) positives before each row
    users = np.flatnonzero(_changes(user))
    moments = np.flatnonzero(_changes(user, time))
    end = before[moments[np.searchsorted(moments, starts, side="right") - 1]]
    first = before[users[np.searchsorted(users, starts, side="right") - 1]]
    begin = np.maximum(first, end - rules.history_length)
    lengths = end - begin
    events = np.flatnonzero(positive)
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = events[np.repeat(begin, lengths) + within]
    offsets, index = offsets_of(lengths), pa.array(rows)
    columns = {}
    for name in wanted:
        if name == HISTORY_TIME:
            values = pa.array(time[rows]).cast(INSTANT)
        else:
            values = as_array(log.column(name.removeprefix(HISTORY))).take(index)
        columns[name] = pa.ListArray.from_arrays(offsets, values)
    return columns
