"""The request rows of a window, as they are read: from request shards, or formed from an impression table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from roo_ray.ingest.clustered import ClusteredReader
from roo_ray.ingest.plan import UnitRef
from roo_ray.ingest.read import BadShard, UnitReader, columns_to_read, join_units
from roo_ray.schema import Schema


@dataclass(frozen=True)
class ReadRequests:
    """Request rows of ``units``, one after the other. ``skipped``: requests of units that could not be read."""

    table: pa.Table
    units: tuple[UnitRef, ...]
    skipped: int


def read_requests(
    data_set: str,
    units: Sequence[UnitRef],
    schema: Schema,
    on_bad_shard: Literal["fail", "skip"] = "fail",
    columns: Sequence[str] | None = None,
) -> ReadRequests:
    """The columns that batches are made of (or just ``columns``) of several units. At least one unit.

    Raises DataError where a file lacks a column, and, unless they are to be skipped, BadShard where it cannot be
    read or is not what the manifest says.
    """
    columns = columns_to_read(schema) if columns is None else columns
    formed = units[0].rows is not None  # an impression table
    reader: UnitReader | ClusteredReader
    reader = ClusteredReader(schema, columns) if formed else UnitReader(data_set, columns)
    tables: list[pa.Table] = []
    good: list[UnitRef] = []
    for unit in units:
        try:
            tables.append(reader.read(unit))
            good.append(unit)
        except BadShard:
            if on_bad_shard == "fail":
                raise
    skipped = sum(unit.requests for unit in units) - sum(unit.requests for unit in good)
    if not tables:
        return ReadRequests(_no_rows(schema), (), skipped)
    return ReadRequests(join_units(data_set, tables, good), tuple(good), skipped)


def _no_rows(schema: Schema) -> pa.Table:
    """No requests at all, of types that every feature takes."""
    lists = {column for f in schema.sequences for column in f.source_columns}
    lists |= set(schema.impression_columns)
    types = {c: pa.list_(pa.int64()) if c in lists else pa.int64() for c in columns_to_read(schema)}
    if schema.keys.time in types:
        types[schema.keys.time] = pa.timestamp("us")
    for feature in schema.sequences:
        if feature.time:
            types[feature.time] = pa.list_(pa.timestamp("us"))
    return pa.schema(list(types.items())).empty_table()
