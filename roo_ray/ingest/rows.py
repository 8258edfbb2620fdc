"""The request rows of a window, as they are read: from request shards, or formed from an impression table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from roo_ray.ingest.clustered import ClusteredReader
from roo_ray.ingest.read import BadShard, UnitReader, columns_to_read, join_units
from roo_ray.ingest.units import UnitRef
from roo_ray.schema import Schema
from roo_ray.sources.columns import is_list


@dataclass(frozen=True)
class ReadRequests:
    """Request rows of ``units``, one after the other. ``skipped``: requests of units that could not be read;
    ``skipped_units``: the places of these among those asked for."""

    table: pa.Table
    units: tuple[UnitRef, ...]
    skipped: int
    skipped_units: tuple[int, ...] = ()


def read_requests(
    data_set: str,
    units: Sequence[UnitRef],
    schema: Schema,
    on_bad_shard: Literal["fail", "skip"] = "fail",
    columns: Sequence[str] | None = None,
    settled: tuple[int, ...] | None = None,
) -> ReadRequests:
    """The columns that batches are made of (or just ``columns``) of several units. At least one unit.

    ``settled``: exactly these were passed over when a part of the units' requests was trained on, and so they are
    again, whether they can be read by now or not. Raises DataError where a file lacks a column, and, unless it is to
    be skipped, BadShard where it cannot be read or is not what the manifest says; StorageError where storage fails.
    """
    columns = columns_to_read(schema) if columns is None else columns
    formed = units[0].rows is not None  # an impression table
    reader: UnitReader | ClusteredReader
    reader = ClusteredReader(schema, columns) if formed else UnitReader(data_set, columns, schema.keys.time)
    tables: list[pa.Table] = []
    good: list[UnitRef] = []
    passed: list[int] = []
    for place, unit in enumerate(units):
        if settled is not None and place in settled:
            passed.append(place)
            continue
        try:
            tables.append(reader.read(unit))
            good.append(unit)
        except BadShard as error:
            if on_bad_shard == "fail":
                raise
            if settled is not None:
                raise type(error)(
                    f"{error}. It cannot be skipped (ingest.on_bad_shard) this time: the checkpoint was taken amid a "
                    "window that has it, and without it requests would be trained on twice or not at all"
                ) from None
            passed.append(place)
    skipped = sum(units[place].requests for place in passed)
    table = _typed(join_units(data_set, tables, good), schema) if tables else _no_rows(schema)
    return ReadRequests(table, tuple(good), skipped, tuple(passed))


def _typed(table: pa.Table, schema: Schema) -> pa.Table:
    """The rows, where columns that have no value and so no type in any of their files get one that features take."""
    times = {schema.keys.time, *(feature.time for feature in schema.sequences)}

    def typed(kind: pa.DataType, name: str) -> pa.DataType:
        if is_list(kind):
            return pa.list_(typed(kind.value_type, name))
        return (pa.timestamp("us") if name in times else pa.int64()) if pa.types.is_null(kind) else kind

    for place, field in enumerate(table.schema):
        kind = field.type
        while is_list(kind):
            kind = kind.value_type
        if pa.types.is_null(kind):
            to = typed(field.type, field.name)
            table = table.set_column(place, field.name, table.column(place).cast(to))
    return table


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
