"""Source kind ``requests``: Parquet rows that are requests already, with impression-level columns as lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import Schema
from roo_ray.source_config import PositivesList, RequestRowsSource
from roo_ray.sources.base import ReadUnit, codecs, common_schema, make_units, read_footers, stream_unit, to_plain
from roo_ray.sources.columns import as_array, is_list
from roo_ray.sources.keys import describe_row
from roo_ray.sources.positives import positives_to_labels


@dataclass(frozen=True)
class RequestRows:
    """Request rows whose footers were read and agree; see ``open_request_rows``. ``names``: schema's column -> the
    file's; ``made``: label column -> the lists it is made from; ``file_types``: what is read from the files."""

    row_schema: pa.Schema
    all_units: list[ReadUnit]
    names: dict[str, str]
    made: dict[str, PositivesList]
    file_types: pa.Schema
    request_key: tuple[str, ...]
    codec: str

    def units(self) -> list[ReadUnit]:
        """All units, in order of path."""
        return self.all_units

    def disk_bytes(self) -> None:
        """None: the rows are requests already."""
        return

    def counts(self) -> dict[str, int]:
        """Nothing beyond what every build counts."""
        return {}

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's requests in tables of bounded size. Raises DataError that names the file, also for a positive
        that is not among the request's impressions."""
        for batch in stream_unit(unit, self.file_types.names):
            read = to_plain(pa.Table.from_batches([batch]), self.file_types)
            columns = {name: read.column(there) for name, there in self.names.items()}
            describe = partial(describe_row, pa.table({name: columns[name] for name in self.request_key}))
            for label, lists in self.made.items():
                columns[label] = positives_to_labels(
                    as_array(read.column(lists.impressions)),
                    as_array(read.column(lists.positives)),
                    (lists.impressions, lists.positives),
                    unit.path,
                    partial(describe, columns=self.request_key),
                )
            yield to_plain(pa.table({name: columns[name] for name in self.row_schema.names}), self.row_schema)


def open_request_rows(source: RequestRowsSource, schema: Schema) -> RequestRows:
    """Lists the files and reads their footers.

    Raises ConfigError where ``columns`` or ``labels_from`` name columns that the schema does not have, DataError
    where a file is missing or broken, lacks a column or has another type for it than the others.
    """
    labels = [label.column for label in schema.labels]
    for name in source.labels_from:
        if name not in labels:
            raise ConfigError(
                f"source.labels_from: '{name}' is no label column of schema '{schema.name}' ({', '.join(labels)})"
            )
    taken = [name for name in schema.columns if name not in source.labels_from]
    for name in source.columns:
        if name not in taken:
            raise ConfigError(
                f"source.columns: '{name}' is no column that schema '{schema.name}' reads from the files; write "
                "schema's name: file's name"
            )
    names = {name: source.columns.get(name, name) for name in taken}
    lists = [column for item in source.labels_from.values() for column in (item.impressions, item.positives)]
    inputs = read_footers(source.path)
    file_types = common_schema(inputs, list(dict.fromkeys([*names.values(), *lists])))
    for column in lists:
        if not is_list(file_types.field(column).type):
            raise DataError(
                f"{inputs[0].path}: column '{column}' has type {file_types.field(column).type}, and source.labels_from "
                "needs a list"
            )
    units = make_units(inputs, set(file_types.names), "requests")
    if not units:
        raise DataError(f"{', '.join(source.path)}: {len(inputs)} Parquet files without a single row")
    kinds = {name: file_types.field(there).type for name, there in names.items()}
    kinds |= dict.fromkeys(source.labels_from, pa.list_(pa.int8()))
    return RequestRows(
        row_schema=pa.schema([pa.field(name, kinds[name]) for name in schema.columns]),
        all_units=units,
        names=names,
        made=source.labels_from,
        file_types=file_types,
        request_key=tuple(schema.keys.request),
        codec=codecs(inputs),
    )
