"""Source kind ``impressions``: Parquet, one row per impression, request-level columns repeated on every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.schema import Schema
from roo_ray.sources.base import (
    ReadUnit,
    codecs,
    common_schema,
    compressed_bytes,
    make_units,
    read_footers,
    stream_unit,
    to_plain,
)


@dataclass(frozen=True)
class ImpressionLog:
    """An impression log whose footers were read and agree; see ``open_impressions``."""

    row_schema: pa.Schema
    all_units: list[ReadUnit]
    bytes_per_column: dict[str, int]
    codec: str

    def units(self) -> list[ReadUnit]:
        """All units, in order of path."""
        return self.all_units

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's rows in tables of bounded size. Raises DataError that names the file."""
        for batch in stream_unit(unit, self.row_schema.names):
            yield to_plain(pa.Table.from_batches([batch]), self.row_schema)

    def key_batches(self, unit: ReadUnit, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of the unit's rows, in the same tables."""
        types = pa.schema([self.row_schema.field(name) for name in columns])
        for batch in stream_unit(unit, columns):
            yield to_plain(pa.Table.from_batches([batch]), types)

    def disk_bytes(self) -> dict[str, int]:
        """Compressed bytes of the schema's columns, as logged."""
        return self.bytes_per_column

    def counts(self) -> dict[str, int]:
        """Nothing beyond what every build counts."""
        return {}


def open_impressions(paths: Sequence[str], schema: Schema) -> ImpressionLog:
    """Lists the files at ``paths`` and reads their footers.

    Raises one DataError where a file is missing, truncated or not Parquet, lacks a column of the schema, or
    has another type for it than the other files.
    """
    inputs = read_footers(paths)
    row_schema = common_schema(inputs, schema.columns)
    units = make_units(inputs, set(schema.columns), "impressions")
    if not units:
        raise DataError(f"{', '.join(paths)}: {len(inputs)} Parquet files without a single row")
    return ImpressionLog(row_schema, units, compressed_bytes(inputs, schema.columns), codecs(inputs))
