"""Impression tables as they are (RecD's way, arXiv 2211.05239): a table whose rows of a request lie together is
streamed without rewriting it.

``index_impressions`` reads the key columns once, checks that every request lies in one piece, and publishes a
manifest whose units are runs of rows that no request crosses, whatever the row groups are. Requests are formed
while a unit is read, so that user features leave the reader once per request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.ingest.faults import BadShard, Watch, read_or_tell
from roo_ray.ingest.read import NUM_IMPRESSIONS, refuse_another_file
from roo_ray.ingest.units import UnitRef
from roo_ray.requests.manifest import Manifest, ShardFile, Unit, manifest_versions, publish_manifest
from roo_ray.schema import Schema
from roo_ray.sources.base import (
    AGAIN,
    UNREADABLE,
    ParquetInput,
    common_schema,
    open_parquet,
    plain_type,
    read_footers,
    read_group,
    to_plain,
)
from roo_ray.sources.columns import as_array, is_list, list_parts, offsets_of
from roo_ray.sources.compare import differing_rows, same_as_previous, sort_codes
from roo_ray.sources.hashing import Hashes, hash_rows
from roo_ray.sources.times import day_name, epoch_seconds, utc_days
from roo_ray.storage import open_filesystem
from roo_ray.watched import parquet_fault

Integers = npt.NDArray[np.int64]

THREADS = 8
BATCH_ROWS = 8192  # decoded at a time
INDEX = "index it again with jobs/index_impressions.py"
MIXED_DAYS = ""
"""``ShardFile.day`` of a file whose requests are of several days."""


def form_requests(table: pa.Table, schema: Schema, columns: Sequence[str], name: str) -> pa.Table:
    """Request rows of impressions, in the order in which requests begin; ``columns``: what is wanted of them.

    Impressions are in order of ``keys.position``, then ``keys.impression``, as a build has them. Raises DataError
    where a request-level column varies within a request, and where an impression's key comes again in its request.
    ``name``: what rows these are, of which file.
    """
    keys = hash_rows(table, schema.keys.request)
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    request = np.argsort(np.argsort(first, kind="stable"), kind="stable")[which]  # (rows,) in order of appearance
    own = [column for column in schema.keys.impression if column not in schema.keys.request]
    within = dict.fromkeys([*([schema.keys.position] if schema.keys.position else []), *own])
    codes = {column: sort_codes(table.column(column)) for column in within}
    order = np.lexsort([*reversed(codes.values()), request])
    _refuse_duplicates(table, schema, own, [request, *(codes[column] for column in own)], order, name)
    lengths = np.bincount(request)
    starts = np.cumsum(lengths) - lengths
    kept, offsets = pa.array(order[starts]), offsets_of(lengths)
    firsts = np.repeat(order[starts], lengths)
    formed = {}
    for column in columns:
        if column == NUM_IMPRESSIONS:
            formed[column] = pa.array(lengths.astype(np.int32))
        elif column in schema.request_columns:
            differs = differing_rows(table.column(column), order, firsts)
            if differs.any():
                key = _key(table, schema.keys.request, int(order[np.argmax(differs)]))
                raise DataError(
                    f"{name}: column '{column}' varies within request {key}, but the schema has it once per request; "
                    "correct the log, declare the column impression-level, or add columns to keys.request"
                )
            formed[column] = as_array(table.column(column)).take(kept)
        else:
            formed[column] = pa.ListArray.from_arrays(offsets, as_array(table.column(column)).take(pa.array(order)))
    return pa.table(formed)


def _key(table: pa.Table, columns: Sequence[str], row: int) -> str:
    return ", ".join(f"{column}={table.column(column)[row]}" for column in columns)


def _refuse_duplicates(
    table: pa.Table, schema: Schema, own: Sequence[str], codes: Sequence[Integers], order: Integers, name: str
) -> None:
    """``codes``: of the request and of each of its impressions' ``own`` key columns, (rows,) each. ``order``: the rows
    by the request, by position where there is one, and by these."""
    if not own:
        return
    if schema.keys.position and schema.keys.position not in own:  # equal ones may be apart
        order = np.lexsort([*reversed(codes)])
    again = same_as_previous(codes, order)
    if again.any():
        row = int(order[np.argmax(again)])
        raise DataError(
            f"{name}: {int(again.sum())} impressions repeat the key of another one of their request, the first: "
            f"{_key(table, own, row)} in request {_key(table, schema.keys.request, row)}; remove the duplicates from "
            "the log, correct keys.impression, or build request shards with build.on_duplicate_impression: drop"
        )


def plain_rows(table: pa.Table, schema: Schema) -> pa.Table:
    """Rows in types that those of all files fit, where the index has found their kinds the same: plain ones, whatever
    way of storing a file has chosen. A sequence without a type, as a file without any history has it, is of lists."""
    events = {column for feature in schema.sequences for column in feature.source_columns}
    fields = []
    for field in table.schema:
        kind = plain_type(field.type)
        fields.append(pa.field(field.name, pa.list_(kind) if kind == pa.null() and field.name in events else kind))
    return to_plain(table, pa.schema(fields))


class RowCursor:
    """Reads runs of rows of a Parquet file. Runs that are asked for in order share the decoding of their row group,
    and beside a run no more than ``BATCH_ROWS`` rows are held, whatever the size of the row group."""

    def __init__(self, file: pq.ParquetFile, columns: Sequence[str]) -> None:
        self.file, self.columns = file, list(columns)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self.starts: Integers = np.cumsum([0, *rows])
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._rest = pa.RecordBatch.from_pylist([])
        self._at = 0  # the row of the file that the rest begins with

    def _decode(self, group: int) -> Iterator[pa.RecordBatch]:
        for number in range(group, self.file.metadata.num_row_groups):
            yield from self.file.iter_batches(BATCH_ROWS, [number], self.columns, use_threads=False)

    def read(self, begin: int, count: int) -> pa.Table:
        """``count`` rows from the file's row ``begin`` on, which it must have."""
        group = int(np.searchsorted(self.starts, begin, side="right")) - 1
        if self._batches is None or not self.starts[group] <= self._at <= begin:
            self._batches, self._at = self._decode(group), int(self.starts[group])
            self._rest = self._rest.slice(0, 0)
        parts: list[pa.RecordBatch] = []
        while count:
            if not self._rest.num_rows:
                decoded = next(self._batches, None)
                if decoded is None:
                    raise pa.ArrowInvalid("a row group has fewer rows than its footer says")
                self._rest = decoded
            passed = min(begin - self._at, self._rest.num_rows)
            part = self._rest.slice(passed, count)
            self._at += passed + part.num_rows
            self._rest = self._rest.slice(passed + part.num_rows)
            if part.num_rows:
                parts.append(part)
                begin, count = begin + part.num_rows, count - part.num_rows
        return pa.Table.from_batches(parts)


class ClusteredReader:
    """Reads units of an impression table as request rows; keeps the last file open, and its place in it."""

    def __init__(self, schema: Schema, columns: Sequence[str]) -> None:
        self.schema, self.columns = schema, list(columns)
        wanted = [*columns, *schema.keys.impression, *([schema.keys.position] if schema.keys.position else [])]
        self.stored = [name for name in dict.fromkeys(wanted) if name != NUM_IMPRESSIONS]
        self._open: tuple[str, RowCursor] | None = None

    def _rows(self, unit: UnitRef, watch: Watch) -> RowCursor:
        path = unit.path
        if self._open is not None and self._open[0] == path and not watch.watching:
            return self._open[1]
        self._open = None
        filesystem, inner = open_filesystem(path)
        local = isinstance(filesystem, pafs.LocalFileSystem)
        source = filesystem.open_input_file(inner)
        source = watch.over(source, None if local else source.size(), local)
        file = pq.ParquetFile(source, pre_buffer=not local)
        size = data_bytes(file.metadata)
        if unit.file_bytes and size != unit.file_bytes:
            raise BadShard(
                f"{path} has {size:,} bytes of data, the index says {unit.file_bytes:,}: it is another file; {INDEX}"
            )
        cursor = RowCursor(file, self.stored)
        if not watch.watching:
            self._open = (path, cursor)
        return cursor

    def read(self, unit: UnitRef) -> pa.Table:
        """The unit's request rows. Raises BadShard where the file is missing, damaged or changed, and StorageError
        where storage fails."""
        assert unit.rows is not None
        begin, count = unit.rows

        def run(watch: Watch) -> pa.Table:
            rows = self._rows(unit, watch)
            if begin + count > rows.starts[-1]:
                raise BadShard(f"{unit.path} has {rows.starts[-1]} rows, fewer than the manifest says; {INDEX}")
            return rows.read(begin, count)

        restore = f"restore it, or {INDEX}"
        table = plain_rows(read_or_tell(run, unit.path, restore, restore), self.schema)
        name = f"{unit.path}, rows {begin} to {begin + count}"
        refuse_another_file(unit, table, self.schema.keys.time, name, INDEX)
        requests = form_requests(table, self.schema, self.columns, name)
        if requests.num_rows != unit.requests:
            raise BadShard(f"{name}: {requests.num_rows} requests, the manifest says {unit.requests}; {INDEX}")
        return requests


# ---- the index -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Indexed:
    """A file's entry in the manifest, and the hash of each request once per piece that it lies in."""

    file: ShardFile | None
    pieces: Hashes


def _uri(root: str, inner: str) -> str:
    """The path as a reader opens it: with the scheme of the configured path."""
    scheme, separator, _ = root.partition("://")
    return f"{scheme}://{inner}" if separator and scheme != "file" else inner


def data_bytes(metadata: pq.FileMetaData) -> int:
    """Bytes of a file's row groups before compression, from its footer."""
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


def unit_starts(requests: Integers, groups: Integers, most: int) -> tuple[npt.NDArray[np.bool_], Integers]:
    """How the runs of a file, which lie in one piece each, become units of up to ``most`` requests (or one run).

    ``requests`` (runs,) of each run, ``groups`` (runs,) the row group that it begins in. Row groups are not cut where
    they fit; larger ones become units of about equal sizes. Returns, each (runs,): whether the run begins a unit; the
    row group that its unit shares with others, or -1.
    """
    of_group = np.bincount(groups, requests).astype(np.int64)
    block_of_group = np.zeros(len(of_group), np.int64)
    block, filled = 0, 0
    for group, count in enumerate(of_group.tolist()):
        if filled and filled + count > most:
            block, filled = block + 1, 0
        block_of_group[group] = block
        filled += count
    block_of = block_of_group[groups]
    total = np.bincount(block_of, requests).astype(np.int64)
    parts = -(-total // most)  # units of each block
    before = np.cumsum(requests) - requests - (np.cumsum(total) - total)[block_of]  # within the block
    part = before * parts[block_of] // total[block_of]
    opens = np.concatenate([[True], (part[1:] != part[:-1]) | (block_of[1:] != block_of[:-1])])
    return opens, np.where(parts[block_of] > 1, groups, -1)


def _index_file(
    item: ParquetInput, schema: Schema, cluster: Sequence[str], unit_requests: int, mean_tokens: float
) -> _Indexed:
    names = list(dict.fromkeys([*schema.keys.request, *cluster, schema.keys.time]))

    def read(file: pq.ParquetFile) -> pa.Table:
        return plain_rows(file.read(columns=names, use_threads=False), schema)

    with open_parquet(item.root, item.path) as file:
        try:
            table = read(file)
        except (pa.ArrowException, OSError) as error:
            filesystem, _ = open_filesystem(item.root)
            raise parquet_fault(error, filesystem, item.path, item.path, AGAIN, says=UNREADABLE, again=read) from None
    for name in {*schema.keys.request, *cluster}:
        if table.column(name).null_count:
            raise DataError(f"{item.path}: key column '{name}' has {table.column(name).null_count} nulls; remove them")
    rows = table.num_rows
    if not rows:
        return _Indexed(None, np.zeros(0, np.uint64))
    keys, clusters = hash_rows(table, schema.keys.request), hash_rows(table, cluster)
    run = np.concatenate([[0], np.cumsum(clusters[1:] != clusters[:-1])])  # (rows,)
    order = np.lexsort([keys, run])  # pieces: distinct (run, request)
    new = np.concatenate([[True], (keys[order][1:] != keys[order][:-1]) | (run[order][1:] != run[order][:-1])])
    pieces = order[new]
    requests_of_run = np.bincount(run[pieces])
    first_of_run = np.flatnonzero(np.concatenate([[True], run[1:] != run[:-1]]))
    sizes = [item.metadata.row_group(group).num_rows for group in range(item.metadata.num_row_groups)]
    group_of_run = np.searchsorted(np.cumsum(sizes), first_of_run, side="right")
    opens, shared = unit_starts(requests_of_run, group_of_run, unit_requests)
    starts = first_of_run[opens]
    stops = np.append(starts[1:], rows)
    requests = np.add.reduceat(requests_of_run, np.flatnonzero(opens))
    seconds = epoch_seconds(table.column(schema.keys.time), schema.keys.time)
    days = utc_days(seconds)
    units = [
        Unit(
            requests=int(r),
            impressions=int(stop - start),
            tokens=round(mean_tokens * int(r)),
            first_row=int(start),
            time_min=float(seconds[start:stop].min()),
            time_max=float(seconds[start:stop].max()),
            row_group=int(group) if group >= 0 else None,
        )
        for r, start, stop, group in zip(requests, starts, stops, shared[opens], strict=True)
    ]
    entry = ShardFile(
        path=_uri(item.root, item.path),
        day=day_name(int(days[0])) if (days == days[0]).all() else MIXED_DAYS,
        requests=len(pieces),
        impressions=rows,
        tokens=sum(unit.tokens for unit in units),
        bytes=data_bytes(item.metadata),
        time_min=float(seconds.min()),
        time_max=float(seconds.max()),
        units=units,
    )
    return _Indexed(entry, keys[pieces])


def _mean_tokens(item: ParquetInput, schema: Schema) -> float:
    """Mean history events of an impression's request, on the first row group: for cost estimates alone. 0 where that
    has no lists, which is said where they are read."""
    names = [feature.source_columns[0] for feature in schema.sequences]
    if not names or not item.metadata.num_row_groups:
        return 0.0
    table = plain_rows(read_group(item, 0, names), schema)
    lists = [as_array(column) for column in table.columns if is_list(column.type)]
    return float(sum(list_parts(array)[0].mean() for array in lists)) if table.num_rows else 0.0


def index_impressions(
    data_set: str, paths: Sequence[str], schema: Schema, cluster: Sequence[str] = (), unit_requests: int = 1024
) -> Manifest:
    """Publishes, as a data set at ``data_set``, the impression table at ``paths``: nothing of it is rewritten.

    ``cluster``: the columns by which its rows lie together (a session), by default the request key. Raises
    DataError where a request does not lie in one piece, with the fraction that does not and the command that
    clusters the table.
    """
    inputs = read_footers(paths)
    common_schema(inputs, list(dict.fromkeys([*schema.columns, *cluster])))
    by = list(cluster) or list(schema.keys.request)
    tokens = _mean_tokens(next((item for item in inputs if item.metadata.num_rows), inputs[0]), schema)
    with ThreadPoolExecutor(THREADS) as pool:
        indexed = list(pool.map(lambda item: _index_file(item, schema, by, unit_requests, tokens), inputs))
    pieces = np.sort(np.concatenate([part.pieces for part in indexed]))
    if not len(pieces):
        raise DataError(f"{', '.join(paths)}: {len(inputs)} Parquet files without a single row")
    again = np.unique(pieces[1:][pieces[1:] == pieces[:-1]])
    if len(again):
        distinct = int((np.diff(pieces) != 0).sum()) + 1
        raise DataError(
            f"{', '.join(paths)} is not clustered by {', '.join(by)}: {len(again):,} of {distinct:,} requests "
            f"({len(again) / distinct:.1%}) lie in several places; group it into request shards with "
            "python jobs/build_requests.py --config FILE, or write it sorted by these columns"
        )
    files = [part.file for part in indexed if part.file]
    version = max(manifest_versions(data_set), default=0) + 1
    manifest = Manifest(
        version=version,
        schema_yaml=schema.to_yaml(),
        schema_digest=schema.digest,
        files=files,
        counts={"requests": len(pieces), "impressions": sum(file.impressions for file in files)},
    )
    publish_manifest(data_set, manifest)
    return manifest
