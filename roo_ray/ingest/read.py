"""Reading row groups of request shards: only the named columns, and every failure names the file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.ingest.faults import BadShard as BadShard
from roo_ray.ingest.faults import Watch, read_or_tell
from roo_ray.ingest.units import UnitRef
from roo_ray.schema import Schema
from roo_ray.sources.times import epoch_seconds, is_time_type
from roo_ray.storage import join_path, open_filesystem

NUM_IMPRESSIONS = "num_impressions"
REBUILD = "the data set's files must stay as they were published; restore it or build the data set again"


def columns_to_read(schema: Schema) -> list[str]:
    """The columns that batches are made of; carried columns and keys that no feature reads stay on disk."""
    names = [NUM_IMPRESSIONS, *schema.keys.request, schema.keys.user, schema.keys.time]
    names += [column for feature in schema.features for column in feature.source_columns]
    names += [label.column for label in schema.labels]
    names += [label.oracle for label in schema.labels if label.oracle]
    return list(dict.fromkeys(names))


FOOTERS = 512
_footers: dict[tuple[str, str, int, int], pq.FileMetaData] = {}
"""Footers of files of this process, by what they are of: a file's units are read in many windows."""


CLOCK = 1e-3  # seconds: what the same time may differ by in the manifest and in a column of another unit


def refuse_another_file(unit: UnitRef, table: pa.Table, time: str | None, name: str, advice: str) -> None:
    """Raises BadShard where the rows of a unit (of requests or of impressions) cannot be those that the manifest
    counts, although they are as many: by their impressions and their times. What costs a pass over two columns of
    numbers. ``time``: the time column; ``name``: of file and rows."""
    columns = table.column_names
    if unit.impressions and NUM_IMPRESSIONS in columns:
        impressions = pc.sum(table.column(NUM_IMPRESSIONS)).as_py()
        if impressions != unit.impressions:
            raise BadShard(f"{name}: {impressions} impressions, the manifest says {unit.impressions}; {advice}")
    if time is None or time not in columns or not is_time_type(table.column(time).type):
        return
    times = table.column(time)
    if times.null_count or not len(times):
        return  # said where times are read, with the request
    if pa.types.is_timestamp(times.type):  # the order of timestamps is that of their seconds
        ends = pc.min_max(times)
        times = pa.array([ends["min"], ends["max"]], times.type)
    seconds = epoch_seconds(times)
    first, last = float(seconds.min()), float(seconds.max())
    if first < unit.time_min - CLOCK or last > unit.time_max + CLOCK:
        span = [np.datetime64(round(end * 1000), "ms") for end in (first, last, unit.time_min, unit.time_max)]
        raise BadShard(
            f"{name}: requests of {span[0]} to {span[1]}, the manifest says {span[2]} to {span[3]}: it is another "
            f"file; {advice}"
        )


class UnitReader:
    """Reads units of one data set; keeps the last file open, as units of a window are often neighbours. ``time``: the
    column of the requests' time, where it is among the ``columns``."""

    def __init__(self, data_set: str, columns: Sequence[str], time: str | None = None) -> None:
        self.data_set, self.time = data_set, time
        self.columns = list(columns)
        self.filesystem, self.base = open_filesystem(data_set)
        self._open: tuple[str, pq.ParquetFile] | None = None

    def _file(self, path: str, size: int, watch: Watch) -> pq.ParquetFile:
        if self._open is not None and self._open[0] == path and not watch.watching:
            return self._open[1]
        self._open = None
        name = join_path(self.data_set, path)
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        source = self.filesystem.open_input_file(f"{self.base}/{path}")
        info = self.filesystem.get_file_info(f"{self.base}/{path}")
        if size and info.size is not None and info.size != size:
            raise BadShard(
                f"{name} has {info.size:,} bytes, the manifest says {size:,}: it is truncated or "
                f"damaged, or another file; {REBUILD}"
            )
        key = (self.data_set, path, info.size, info.mtime_ns)
        source = watch.over(source, info.size, local)
        file = pq.ParquetFile(source, pre_buffer=not local, metadata=_footers.get(key))
        if key not in _footers:
            if len(_footers) >= FOOTERS:
                _footers.pop(next(iter(_footers)), None)
            _footers[key] = file.metadata
        there = set(file.schema_arrow.names)
        missing = [c for c in self.columns if c not in there]
        if missing:
            raise DataError(
                f"{name} has no column {', '.join(missing)}, which the schema reads; use the schema "
                "that the data set was built with, or build it again with this one"
            )
        if not watch.watching:
            self._open = (path, file)
        return file

    def read(self, unit: UnitRef) -> pa.Table:
        """The unit's rows. Raises DataError where the file lacks a column, BadShard where it is missing, damaged, or
        another one than the manifest is of, and StorageError where storage fails."""
        name = join_path(self.data_set, unit.path)

        def group(watch: Watch) -> pa.Table:
            file = self._file(unit.path, unit.file_bytes, watch)
            if unit.row_group >= file.metadata.num_row_groups:
                raise BadShard(f"{name} has no row group {unit.row_group}, which the manifest lists; {REBUILD}")
            return file.read_row_group(unit.row_group, columns=self.columns, use_threads=False)

        table = read_or_tell(group, name, REBUILD, REBUILD)
        if table.num_rows != unit.requests:
            raise BadShard(
                f"{name}, row group {unit.row_group}: {table.num_rows} requests, the manifest says "
                f"{unit.requests}; {REBUILD}"
            )
        refuse_another_file(unit, table, self.time, f"{name}, row group {unit.row_group}", REBUILD)
        return table


def join_units(data_set: str, tables: Sequence[pa.Table], units: Sequence[UnitRef]) -> pa.Table:
    """The tables of units, one after the other. Raises DataError where their types do not fit each other."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        paths = ", ".join(sorted({unit.path for unit in units}))
        raise DataError(
            f"{data_set}: the files {paths} hold a column under types that do not fit each other ({error}); "
            "build the data set again from one source"
        ) from None
