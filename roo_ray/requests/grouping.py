"""The grouping kernel: impression rows to request rows and back, in Arrow and NumPy, without a loop over rows.

One sort by (request key, order within the request), run boundaries, request columns taken once per request,
impression columns as lists cut at the boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError
from roo_ray.lists import as_array, is_list, list_parts, starts_of, value_positions
from roo_ray.requests.hashing import hash_array, hash_rows, mix64
from roo_ray.schema import Schema

NUM_IMPRESSIONS = "num_impressions"
OnConflict = Literal["fail", "first", "last"]
Positions = npt.NDArray[np.int64]


def group_impressions(
    table: pa.Table, schema: Schema, on_conflict: OnConflict = "fail"
) -> tuple[pa.Table, dict[str, int]]:
    """Impression rows -> (request rows, counts of what was repaired).

    Request rows are ordered by a hash of the request key; impressions within a request by ``keys.position``,
    then ``keys.impression``, then all other impression columns, so the result does not depend on the order of
    the input rows. Request rows hold the schema's request columns, its impression columns as lists, and
    ``num_impressions`` (int32).

    Raises DataError, naming column and request, where a request column varies within a request (unless
    ``on_conflict`` keeps the ``first`` or ``last`` value in impression order; then
    ``request_conflicts.<column>`` counts the requests) and where impressions are duplicates by
    ``keys.impression``.
    """
    table = table.combine_chunks()
    if table.num_rows == 0:
        return _assemble(table, schema, np.zeros(0, np.int64), np.zeros(0, np.int64), "first"), {}
    request_hash = hash_rows(table, schema.keys.request)
    order = np.lexsort([*reversed(_order_within_request(table, schema)), request_hash])
    table = table.take(pa.array(order))
    first = _run_starts(table, schema, request_hash[order])
    lengths = np.diff(np.append(first, table.num_rows))
    _refuse_duplicates(table, schema, first, lengths)
    counts = _request_conflicts(table, schema, first, lengths, on_conflict)
    return _assemble(table, schema, first, lengths, on_conflict), counts


def _order_within_request(table: pa.Table, schema: Schema) -> list[npt.NDArray[np.generic]]:
    """Sort keys, most significant first."""
    keys: list[npt.NDArray[np.generic]] = []
    names = [schema.keys.position] if schema.keys.position else []
    names += [name for name in schema.keys.impression if name not in schema.keys.request]
    for name in names:
        keys += _rank(as_array(table.column(name)))
    # equal so far: any fixed order will do, as long as it does not depend on the input's order
    rest = np.zeros(table.num_rows, np.uint64)
    for name in schema.columns:
        rest = mix64(rest * np.uint64(31) + _content_hash(as_array(table.column(name))))
    return [*keys, rest]


def _rank(array: pa.Array) -> list[npt.NDArray[np.generic]]:
    """Sort keys that put values in their natural order, nulls last."""
    kind = array.type
    nulls = np.asarray(pc.is_null(array))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        if pa.types.is_boolean(kind):
            array = array.cast(pa.int8())
        values = np.asarray(pc.fill_null(array, pa.scalar(0, array.type)))
    else:
        distinct = array.dictionary_encode()
        rank = np.zeros(max(len(distinct.dictionary), 1), np.int64)
        rank[np.asarray(pc.sort_indices(distinct.dictionary))] = np.arange(len(distinct.dictionary))
        values = rank[np.asarray(pc.fill_null(distinct.indices, 0))]
    return [nulls, values] if nulls.any() else [values]


def _content_hash(array: pa.Array) -> npt.NDArray[np.uint64]:
    """(N,) uint64: a hash of each value of any type, lists included; null and empty differ."""
    if is_list(array.type):
        lengths, values = list_parts(array)
        inner = _content_hash(values)
        position = np.arange(len(inner), dtype=np.uint64) - np.repeat(starts_of(lengths), lengths).astype(np.uint64)
        mixed = mix64(inner + mix64(position))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        ends = np.cumsum(lengths)
        result = mix64(sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64))
        return np.where(np.asarray(pc.is_null(array)), np.uint64(1), result)
    if pa.types.is_floating(array.type):
        bits = np.asarray(pc.fill_null(array.cast(pa.float64()), 0.0)).view(np.uint64)
        return np.where(np.asarray(pc.is_null(array)), np.uint64(1), mix64(bits))
    if pa.types.is_null(array.type):
        return np.ones(len(array), np.uint64)
    return hash_array(array)


def _same_as_previous(array: pa.Array) -> npt.NDArray[np.bool_]:
    """(N - 1,) whether each value equals the one before it (nulls equal nulls, NaN equals NaN), exactly."""
    if is_list(array.type):
        lengths, values = list_parts(array)
        nulls = np.asarray(pc.is_null(array))
        same: npt.NDArray[np.bool_] = (lengths[1:] == lengths[:-1]) & (nulls[1:] == nulls[:-1])
        # compare element by element only where the lengths agree
        rows = np.flatnonzero(same & (lengths[1:] > 0))
        starts = starts_of(lengths)
        left = value_positions(starts[rows], lengths[rows])
        right = value_positions(starts[rows + 1], lengths[rows])
        equal = _equal(values.take(pa.array(left)), values.take(pa.array(right)))
        unequal = np.add.reduceat(~equal, starts_of(lengths[rows])) if len(rows) else np.zeros(0, np.int64)
        same[rows] &= unequal == 0
        return same
    return _equal(array.slice(0, len(array) - 1), array.slice(1))


def _equal(left: pa.Array, right: pa.Array) -> npt.NDArray[np.bool_]:
    if pa.types.is_null(left.type):
        return np.ones(len(left), np.bool_)
    if is_list(left.type):
        both = pa.concat_arrays([left, right])
        codes = _content_hash(both)
        same: npt.NDArray[np.bool_] = codes[: len(left)] == codes[len(left) :]
        return same
    equal: npt.NDArray[np.bool_] = np.array(pc.fill_null(pc.equal(left, right), False))
    if left.null_count or right.null_count:
        equal |= np.asarray(pc.and_(pc.is_null(left), pc.is_null(right)))
    if pa.types.is_floating(left.type):
        both_nan = pc.and_(pc.is_nan(left), pc.is_nan(right))
        equal |= np.asarray(pc.fill_null(both_nan, False))
    return equal


def _run_starts(table: pa.Table, schema: Schema, hashes: npt.NDArray[np.uint64]) -> Positions:
    """Positions where a new request begins, in rows sorted by the request key's hash. Keys are compared by
    value: two requests whose keys share a hash would interleave, and are refused."""
    same_hash = hashes[1:] == hashes[:-1]
    same_key = np.ones(len(hashes) - 1, np.bool_)
    for column in schema.keys.request:
        same_key &= _same_as_previous(as_array(table.column(column)))
    clash = np.flatnonzero(same_hash & ~same_key)
    if len(clash):
        raise DataError(
            f"two requests share the hash of their key: {describe_request(table, schema, int(clash[0]))} and "
            f"{describe_request(table, schema, int(clash[0]) + 1)}; add a column to keys.request"
        )
    return np.concatenate([[0], np.flatnonzero(~same_hash) + 1]).astype(np.int64)


def describe_request(table: pa.Table, schema: Schema, row: int) -> str:
    """``request_id=5, user_id=7``: the request key of a row, for messages."""
    return ", ".join(f"{name}={table.column(name)[row].as_py()}" for name in schema.keys.request)


def _refuse_duplicates(table: pa.Table, schema: Schema, first: Positions, lengths: Positions) -> None:
    names = [name for name in schema.keys.impression if name not in schema.keys.request]
    if not names:
        return
    request = np.repeat(np.arange(len(first)), lengths)
    key = mix64(hash_rows(table, names))
    order = np.lexsort([key, request])
    twins = (request[order][1:] == request[order][:-1]) & (key[order][1:] == key[order][:-1])
    if twins.any():
        row = int(order[np.flatnonzero(twins)[0]])
        values = ", ".join(f"{name}={table.column(name)[row].as_py()}" for name in names)
        raise DataError(
            f"{int(twins.sum())} duplicate impressions: request {describe_request(table, schema, row)} has "
            f"{values} more than once; remove the duplicates, or name more columns in keys.impression"
        )


def _request_conflicts(
    table: pa.Table, schema: Schema, first: Positions, lengths: Positions, on_conflict: OnConflict
) -> dict[str, int]:
    counts: dict[str, int] = {}
    inside = np.ones(table.num_rows, np.bool_)  # whether a row has its predecessor in the same request
    inside[first] = False
    request = np.repeat(np.arange(len(first)), lengths)
    for column in schema.request_columns:
        if column in schema.keys.request or table.num_rows < 2:
            continue
        varies = inside[1:] & ~_same_as_previous(as_array(table.column(column)))
        if not varies.any():
            continue
        rows = np.flatnonzero(varies)
        counts[f"request_conflicts.{column}"] = len(np.unique(request[rows]))
        if on_conflict == "fail":
            row = int(rows[0])
            one, other = (_short(table.column(column)[r].as_py()) for r in (row, row + 1))
            raise DataError(
                f"column '{column}' is request-level and varies within {counts[f'request_conflicts.{column}']} "
                f"requests; request {describe_request(table, schema, row)} has {one} and {other}; make it "
                "impression-level in the schema, or set build.on_request_conflict to first or last"
            )
    return counts


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _assemble(
    table: pa.Table, schema: Schema, first: Positions, lengths: Positions, on_conflict: OnConflict
) -> pa.Table:
    chosen = first + lengths - 1 if on_conflict == "last" else first
    offsets = pa.array(np.append(first, table.num_rows).astype(np.int32))
    columns = {name: as_array(table.column(name)).take(pa.array(chosen)) for name in schema.request_columns}
    columns[NUM_IMPRESSIONS] = pa.array(lengths.astype(np.int32))
    for name in schema.impression_columns:
        columns[name] = pa.ListArray.from_arrays(offsets, as_array(table.column(name)))
    return pa.table(columns)


def explode_requests(table: pa.Table, schema: Schema) -> pa.Table:
    """Request rows -> impression rows: the inverse of ``group_impressions``, up to row order."""
    table = table.combine_chunks()
    lengths = np.asarray(as_array(table.column(NUM_IMPRESSIONS))).astype(np.int64)
    rows = pa.array(np.repeat(np.arange(table.num_rows), lengths))
    columns = {name: as_array(table.column(name)).take(rows) for name in schema.request_columns}
    columns |= {name: as_array(table.column(name)).flatten() for name in schema.impression_columns}
    return pa.table(columns)


def with_num_impressions(table: pa.Table, schema: Schema) -> pa.Table:
    """Rows of a source that has requests already, as request rows: adds ``num_impressions`` from the length of
    the first impression column (``checks`` compares the others with it)."""
    lengths = pc.fill_null(pc.list_value_length(table.column(schema.impression_columns[0])), 0)
    columns: Sequence[str] = [*schema.request_columns, NUM_IMPRESSIONS, *schema.impression_columns]
    return table.append_column(NUM_IMPRESSIONS, lengths.cast(pa.int32())).select(list(columns))
