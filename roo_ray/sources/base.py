"""What every source of rows offers: units that tasks read on their own, with exactly the schema's columns."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.sources.columns import is_list
from roo_ray.storage import open_filesystem, without_secrets
from roo_ray.watched import parquet_fault, read_parquet, storage_fault

RowKind = Literal["impressions", "requests"]
UNIT_BYTES = 128_000_000
BATCH_BYTES = 64_000_000
FOOTER_THREADS = 16
AGAIN = "write or copy it again"
UNREADABLE = "cannot be read"
PARQUET_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


@dataclass(frozen=True)
class ReadUnit:
    """Row groups of one Parquet file that one task reads. ``root``: the configured path that led to the file
    (it names the file system); ``bytes``: estimated size in memory; ``kind``: what a row is; ``log``: which of
    the logs of a ``JoinedSource`` it belongs to."""

    index: int
    root: str
    path: str
    row_groups: tuple[int, ...]
    kind: RowKind
    rows: int
    bytes: int
    log: str = ""


class Source(Protocol):
    """Rows to build requests from. Picklable: tasks get it with their unit."""

    @property
    def row_schema(self) -> pa.Schema:
        """Names and types of the rows that ``batches`` yields: exactly the request schema's columns."""
        ...

    def units(self) -> list[ReadUnit]:
        """All units, in a fixed order."""
        ...

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's rows in tables of bounded size. Raises DataError that names the file."""
        ...

    def disk_bytes(self) -> dict[str, int] | None:
        """Compressed bytes on disk per column, where the source is impression-level; else None."""
        ...

    @property
    def codec(self) -> str:
        """The compression of the source's files, such as ``snappy``."""
        ...

    def counts(self) -> dict[str, int]:
        """What opening the source has counted, by name; it goes into the manifest."""
        ...


@runtime_checkable
class KeyedSource(Protocol):
    """A source that can read a few columns of a unit without the rest: a build counts its rows by their keys
    first."""

    def key_batches(self, unit: ReadUnit, columns: Sequence[str]) -> Iterator[pa.Table]:
        """``columns`` of the unit's rows, in tables of the same rows as those of ``batches``."""
        ...


@dataclass(frozen=True)
class Log:
    """One of several logs that are joined. ``schema``: its rows; ``keys``: the columns by which rows of all logs
    that belong together meet (equal in number and in meaning over the logs, never null)."""

    schema: pa.Schema
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Assembled:
    """What the rows of one bucket of all logs give: ``rows`` of the source's ``row_schema``, ``counts`` by name,
    and rows kept ``aside`` by reason (an event without its impression, ...), as tables of any columns."""

    rows: pa.Table
    counts: dict[str, int]
    aside: dict[str, pa.Table]


@runtime_checkable
class JoinedSource(Source, Protocol):
    """A source whose rows come from several logs, or from rows of a user that must be seen together. A build
    deals the rows of each log to buckets by a hash of the log's keys, calls ``assemble`` with all rows of a
    bucket, and goes on with the result as with the rows of a plain source. ``batches(unit)`` yields rows of
    ``logs[unit.log].schema``. Otherwise as ``Source``."""

    @property
    def logs(self) -> dict[str, Log]:
        """The logs by name."""
        ...

    def assemble(self, parts: dict[str, pa.Table]) -> Assembled:
        """Joins the rows of one bucket: log -> all its rows that fell into the bucket (maybe none), in any order;
        the result must not depend on that order. Raises DataError."""
        ...


def read(source: Source, unit: ReadUnit) -> pa.Table:
    """All rows of a unit in one table."""
    return pa.concat_tables([source.row_schema.empty_table(), *source.batches(unit)])


# ---- types ---------------------------------------------------------------------------------------


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without storage variants: dictionaries, large and fixed-size lists, large strings and views
    become plain ones. Two files whose plain types are equal hold the same kind of values."""
    types = pa.types
    if is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    return kind


def to_plain(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table's columns in the order and types of ``schema``; a no-op where they are so already."""
    table = table.select(schema.names).replace_schema_metadata(None)
    return table if table.schema.equals(schema) else table.cast(schema)


# ---- Parquet files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetInput:
    """A Parquet file's footer."""

    root: str
    path: str
    schema: pa.Schema
    metadata: Any


def list_parquet(root: str) -> list[str]:
    """The Parquet files at a path: the file itself, or all ``*.parquet`` below a folder but for files and
    folders whose names begin with ``_`` or ``.``. Raises DataError where there is none or they may not be listed,
    StorageError where storage fails."""
    filesystem, inner = open_filesystem(root)
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"source not found: {root}")
        if info.type == pafs.FileType.File:
            return [inner]
        items = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    except OSError as error:
        raise storage_fault(without_secrets(root), error) from None
    found = []
    for item in items:
        parts = item.path[len(inner) :].strip("/").split("/")
        hidden = any(part.startswith(("_", ".")) for part in parts)
        if item.type == pafs.FileType.File and item.path.endswith(".parquet") and not hidden:
            found.append(item.path)
    if not found:
        raise DataError(f"{root} holds no Parquet files (*.parquet); check source.path")
    return sorted(found)


def open_parquet(root: str, path: str) -> pq.ParquetFile:
    """Opens a Parquet file for reading. Raises DataError that names it where it is missing, damaged or may not be
    read, StorageError where storage fails."""
    filesystem, _ = open_filesystem(root)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (pa.ArrowException, OSError) as error:
        raise parquet_fault(error, filesystem, path, path, AGAIN) from None


def read_group(item: ParquetInput, group: int, columns: Sequence[str]) -> pa.Table:
    """Columns of a row group. Raises as ``open_parquet`` does."""
    filesystem, _ = open_filesystem(item.root)

    def read(file: pq.ParquetFile) -> pa.Table:
        return file.read_row_group(group, list(columns), use_threads=False)

    return read_parquet(filesystem, item.path, read, item.path, AGAIN)


def read_footers(roots: Sequence[str]) -> list[ParquetInput]:
    """The footers of all Parquet files at the given paths, each file once, in order of path."""
    files = {path: root for root in roots for path in list_parquet(root)}

    def footer(path: str) -> ParquetInput:
        with open_parquet(files[path], path) as file:
            return ParquetInput(files[path], path, file.schema_arrow, file.metadata)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(footer, sorted(files)))


def common_schema(inputs: Sequence[ParquetInput], columns: Sequence[str]) -> pa.Schema:
    """The plain schema of ``columns`` over all files; a column that is null in one file takes its type from
    the others. Raises one DataError that names the file and the column that is missing or differs."""
    fields = []
    for column in columns:
        lacking = [item for item in inputs if column not in item.schema.names]
        if lacking:
            there = sorted(set(lacking[0].schema.names))
            close = difflib.get_close_matches(column, there, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(there)}"
            raise DataError(
                f"{lacking[0].path}: column '{column}' of the schema is missing "
                f"(in {len(lacking)} of {len(inputs)} files); {hint}"
            )
        kinds: dict[str, tuple[pa.DataType, str]] = {}
        for item in inputs:
            kind = plain_type(item.schema.field(column).type)
            kinds.setdefault(str(kind), (kind, item.path))
        kinds.pop("null", None) if len(kinds) > 1 else None
        if len(kinds) > 1:
            (first, first_path), (second, second_path) = list(kinds.values())[:2]
            raise DataError(
                f"column '{column}' has type {first} in {first_path} and {second} in {second_path}; "
                "write all files with one type"
            )
        fields.append(pa.field(column, next(iter(kinds.values()))[0]))
    return pa.schema(fields)


def leaf_columns(metadata: Any) -> list[str]:
    """The top-level column of each leaf of a Parquet file, in file order."""
    arrow = metadata.schema.to_arrow_schema()
    names = sorted(arrow.names, key=len, reverse=True)
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return [next(n for n in names if path == n or path.startswith(f"{n}.")) for path in paths]


def memory_estimate(metadata: Any, columns: set[str]) -> list[int]:
    """Estimated bytes in memory of each row group's ``columns``: values by their width, text by its size."""
    leaves = [(i, name) for i, name in enumerate(leaf_columns(metadata)) if name in columns]
    sizes = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        total = 0
        for i, _ in leaves:
            chunk = row_group.column(i)
            width = PARQUET_WIDTHS.get(chunk.physical_type)
            total += (
                chunk.num_values * width
                if width is not None
                else max(chunk.total_uncompressed_size, 8 * chunk.num_values)
            )
        sizes.append(total)
    return sizes


def codecs(inputs: Sequence[ParquetInput]) -> str:
    """The compression of the files' columns, such as ``snappy``."""
    names = {
        item.metadata.row_group(group).column(column).compression.lower()
        for item in inputs
        for group in range(item.metadata.num_row_groups)
        for column in range(item.metadata.num_columns)
    }
    return " and ".join(sorted(names))


def compressed_bytes(inputs: Sequence[ParquetInput], columns: Sequence[str]) -> dict[str, int]:
    """Compressed bytes on disk of each column over all files."""
    totals = dict.fromkeys(columns, 0)
    for item in inputs:
        leaves = leaf_columns(item.metadata)
        for group in range(item.metadata.num_row_groups):
            row_group = item.metadata.row_group(group)
            for i, name in enumerate(leaves):
                if name in totals:
                    totals[name] += row_group.column(i).total_compressed_size
    return totals


def make_units(inputs: Sequence[ParquetInput], columns: set[str], kind: RowKind) -> list[ReadUnit]:
    """Units of about ``UNIT_BYTES``: neighbouring row groups of a file together, large ones alone."""
    units: list[ReadUnit] = []
    for item in inputs:
        together: list[list[int]] = []
        sizes = memory_estimate(item.metadata, columns)
        room = 0
        for group, size in enumerate(sizes):
            if not together or size > room:
                together.append([])
                room = UNIT_BYTES
            together[-1].append(group)
            room -= size
        for groups in together:
            rows = sum(item.metadata.row_group(group).num_rows for group in groups)
            if rows:
                size = sum(sizes[group] for group in groups)
                units.append(ReadUnit(len(units), item.root, item.path, tuple(groups), kind, rows, size))
    return units


def stream_unit(unit: ReadUnit, columns: Sequence[str], batch_bytes: int = BATCH_BYTES) -> Iterator[pa.RecordBatch]:
    """The unit's rows in record batches of about ``batch_bytes``. Raises as ``open_parquet`` does."""
    rows = max(1, min(131_072, int(unit.rows * batch_bytes / max(unit.bytes, 1))))

    def batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        yield from file.iter_batches(rows, list(unit.row_groups), list(columns), use_threads=False)

    with open_parquet(unit.root, unit.path) as file:
        try:
            yield from batches(file)
        except (pa.ArrowException, OSError) as error:
            filesystem, _ = open_filesystem(unit.root)
            raise parquet_fault(
                error, filesystem, unit.path, unit.path, AGAIN, says=UNREADABLE, again=lambda f: deque(batches(f), 0)
            ) from None
