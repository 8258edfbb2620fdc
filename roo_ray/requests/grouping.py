"""Impressions to request rows and back: pure Arrow and NumPy, no loop over rows (arXiv 2508.05640, section 3).

A request row has the request-level columns as they are, every impression-level column as a list, all lists of
one length, and ``num_impressions``. Exploding gives the impressions back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.requests.report import FAIL, Finding, require_passed
from roo_ray.schema import Schema
from roo_ray.sources.columns import as_array, is_list, list_parts, offsets_of, take_rows
from roo_ray.sources.compare import Ints, differing_rows, digest_rows, same_as_previous, sort_codes

NUM_IMPRESSIONS = "num_impressions"
OnConflict = Literal["fail", "first", "last", "max_time"]


def describe_key(table: pa.Table, row: int, columns: Sequence[str]) -> str:
    """``user_id=7, request_time=2023-02-27 03:23:27``: the values of some columns in a row, for messages."""
    return ", ".join(f"{name}={table.column(name)[row].as_py()}" for name in columns)


def require_keys(table: pa.Table, schema: Schema) -> None:
    """Raises DataError where a request key is null: unrelated impressions would become one request."""
    for name in schema.keys.request:
        nulls = table.column(name).null_count
        if nulls:
            raise DataError(
                f"column '{name}' of the request key is null in {nulls} rows, which would all become one "
                "request; remove these rows from the source or use another key (keys.request)"
            )


def request_row_schema(impressions: pa.Schema, schema: Schema) -> pa.Schema:
    """The Arrow schema of request rows made of impressions with the given types."""
    fields = [impressions.field(name) for name in schema.request_columns]
    fields += [pa.field(name, pa.list_(impressions.field(name).type)) for name in schema.impression_columns]
    return pa.schema([*fields, pa.field(NUM_IMPRESSIONS, pa.int32())])


def group_impressions(table: pa.Table, schema: Schema, on_conflict: OnConflict = "fail") -> pa.Table:
    """Request rows of an impression table with the schema's columns, in order of the request key.

    Impressions are ordered by ``keys.position``, then ``keys.impression``, then a digest of the whole row, so
    that the result does not depend on the order of the input. Raises DataError where a check of
    ``group_with_findings`` fails.
    """
    requests, findings = group_with_findings(table, schema, on_conflict)
    require_passed(findings)
    return requests


def group_with_findings(
    table: pa.Table, schema: Schema, on_conflict: OnConflict = "fail"
) -> tuple[pa.Table, list[Finding]]:
    """(request rows, what was found of request-level columns that vary within a request).

    A varying column has the rule ``on_conflict``: with ``first`` / ``last`` the first / last value in the order
    of impressions is taken, with ``max_time`` that of the impression with the latest ``keys.impression_time``
    (the last of them; a null time is the earliest). A request with two users always fails: its key names two
    requests. Raises DataError for null keys.
    """
    copies, impressions = table.select(schema.request_columns), table.select(schema.impression_columns)
    return group_parts(copies, impressions, np.arange(table.num_rows), schema, on_conflict)


def group_parts(
    copies: pa.Table, impressions: pa.Table, copy_of: Ints, schema: Schema, on_conflict: OnConflict = "fail"
) -> tuple[pa.Table, list[Finding]]:
    """``group_with_findings`` of impressions that share copies of the request-level columns: row i of
    ``impressions`` has row ``copy_of[i]`` of ``copies``."""
    require_keys(copies, schema)
    rows = impressions.num_rows
    keys_known = Finding("null request key", ", ".join(schema.keys.request), rows, "impressions", 0, FAIL)
    if rows == 0:
        types = pa.schema([*copies.schema, *impressions.schema])
        return request_row_schema(types, schema).empty_table(), [keys_known]
    order, starts = _order(copies, impressions, copy_of, schema)
    lengths = np.diff(np.append(starts, rows))  # (requests,)
    findings = _conflicts(copies, copy_of[order], starts, lengths, schema, on_conflict)
    kept = copy_of[_kept(impressions, schema, order, starts, lengths, on_conflict)]
    offsets = offsets_of(lengths)
    columns = {name: take_rows(as_array(copies.column(name)), kept) for name in schema.request_columns}
    for name in schema.impression_columns:
        columns[name] = pa.ListArray.from_arrays(offsets, take_rows(as_array(impressions.column(name)), order))
    columns[NUM_IMPRESSIONS] = pa.array(lengths.astype(np.int32))
    return pa.table(columns), [keys_known, *findings]


def kept_row(
    copies: pa.Table, impressions: pa.Table, copy_of: Ints, schema: Schema, on_conflict: OnConflict
) -> tuple[Ints, Ints]:
    """(rows,) the number of each impression's request, and (rows,) the impression whose request-level values that
    request keeps in ``group_parts``."""
    rows = impressions.num_rows
    order, starts = _order(copies, impressions, copy_of, schema)
    lengths = np.diff(np.append(starts, rows))
    kept = _kept(impressions, schema, order, starts, lengths, on_conflict)
    request, owner = np.empty(rows, np.int64), np.empty(rows, np.int64)
    request[order] = np.repeat(np.arange(len(starts)), lengths)
    owner[order] = np.repeat(kept, lengths)
    return request, owner


def _kept(
    impressions: pa.Table, schema: Schema, order: Ints, starts: Ints, lengths: Ints, on_conflict: OnConflict
) -> Ints:
    """(requests,) the impression whose request-level values are kept."""
    ends = starts + lengths - 1
    kept: Ints = order[ends if on_conflict == "last" else starts]
    if on_conflict != "max_time":
        return kept
    if schema.keys.impression_time is None:
        raise DataError("build.on_request_conflict: max_time needs the schema's keys.impression_time")
    times = as_array(impressions.column(schema.keys.impression_time))
    codes = np.where(np.asarray(times.is_null()), np.iinfo(np.int64).min, sort_codes(times))[order]
    by_time = np.lexsort([codes, np.repeat(np.arange(len(starts)), lengths)])  # requests stay where they are
    latest: Ints = order[by_time[ends]]
    return latest


def _order(copies: pa.Table, impressions: pa.Table, copy_of: Ints, schema: Schema) -> tuple[Ints, Ints]:
    """(rows,) the row order by request and impression, and (requests,) where each request starts in it."""
    keys = [sort_codes(copies.column(name))[copy_of] for name in schema.keys.request]
    names = [schema.keys.position] if schema.keys.position else []
    names += [name for name in schema.keys.impression if name not in schema.keys.request]
    within = [sort_codes(impressions.column(name)) for name in dict.fromkeys(names)]
    order = np.lexsort([*reversed(within), *reversed(keys)])
    tied = same_as_previous([*keys, *within], order)
    if tied.any():
        tied[:-1] |= tied[1:]
        some = np.sort(order[tied])
        digest = np.zeros(len(copy_of), np.uint64)
        used, copy = np.unique(copy_of[some], return_inverse=True)
        of_copies, few = copies.take(pa.array(used)), impressions.take(pa.array(some))
        for name in schema.columns:
            shared = name in schema.request_columns
            of_column = digest_rows(of_copies.column(name))[copy] if shared else digest_rows(few.column(name))
            digest[some] = digest[some] * np.uint64(31) + of_column
        order = np.lexsort([digest, *reversed(within), *reversed(keys)])
    starts = np.flatnonzero(~same_as_previous(keys, order))
    return order, starts


def _conflicts(
    copies: pa.Table, copy_of: Ints, starts: Ints, lengths: Ints, schema: Schema, on_conflict: OnConflict
) -> list[Finding]:
    """``copy_of``: (rows,) in order of the requests."""
    first = np.repeat(copy_of[starts], lengths)  # (rows,) the copy of the first row of each row's request
    first_of = np.arange(copies.num_rows)  # (copies,) a copy is of one request, for its key is part of it
    first_of[copy_of] = first
    others = np.flatnonzero(first_of != np.arange(copies.num_rows))  # (copies that may differ,)
    varies = np.zeros(copies.num_rows, np.bool_)
    findings = []
    for name in schema.request_columns:
        if name in schema.keys.request:
            continue
        is_user = name == schema.keys.user
        varies[others] = differing_rows(copies.column(name), others, first_of[others])
        differs = np.flatnonzero(varies[copy_of])  # (rows,)
        found = len(np.unique(np.searchsorted(starts, differs, side="right")))
        offender = problem = ""
        if found:
            at = int(differs[0])
            key = describe_key(copies, int(copy_of[at]), schema.keys.request)
            values = [short(copies.column(name)[int(row)].as_py()) for row in (first[at], copy_of[at])]
            offender = f"{key}: {values[0]} and {values[1]}"
            problem = (
                f"the request key names several requests: user column '{name}' varies within {{found}} requests "
                f"(first: {offender}); add columns to keys.request"
                if is_user
                else f"column '{name}' varies within {{found}} requests (first: {offender}), but the schema has it "
                "once per request; declare it impression-level, correct the log, add columns to keys.request, or "
                "set build.on_request_conflict to first, last or max_time"
            )
        findings.append(
            Finding(
                "two users in one request" if is_user else "varies within requests",
                name,
                len(starts),
                "requests",
                found,
                FAIL if is_user else on_conflict,
                offender,
                problem,
                counts_as=(f"request_conflicts.{name}",) if found else (),
            )
        )
    return findings


def short(value: object) -> str:
    """A value as text of at most 60 characters, for messages."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def explode_requests(requests: pa.Table, schema: Schema) -> pa.Table:
    """The impressions of request rows, in order: the schema's columns, the inverse of ``group_impressions`` up
    to row order."""
    lengths, _ = list_parts(as_array(requests.column(schema.impression_columns[0])))
    rows = np.repeat(np.arange(requests.num_rows), lengths)
    columns = {name: take_rows(as_array(requests.column(name)), rows) for name in schema.request_columns}
    for name in schema.impression_columns:
        columns[name] = list_parts(as_array(requests.column(name)))[1]
    return pa.table(columns)


def explode_in_slices(requests: pa.Table, schema: Schema, impressions: int, values: int) -> Iterator[pa.Table]:
    """``explode_requests`` in tables of about so many impressions and so many values of lists at most."""
    lengths = np.asarray(requests.column(NUM_IMPRESSIONS)).astype(np.int64)
    size = np.zeros(requests.num_rows, np.int64)
    for name in schema.request_columns:
        array = as_array(requests.column(name))
        if is_list(array.type):
            size += list_parts(array)[0] * lengths
    cost: npt.NDArray[np.float64] = np.cumsum(np.maximum(lengths / impressions, size / values))
    begin = 0
    while begin < requests.num_rows:
        done = cost[begin - 1] if begin else 0.0
        end = max(begin + 1, int(np.searchsorted(cost, done + 1.0, side="right")))
        yield explode_requests(requests.slice(begin, end - begin), schema)
        begin = end
