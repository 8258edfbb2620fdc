"""Reading row groups of request shards: only the named columns, and every failure names the file."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.ingest.plan import UnitRef
from roo_ray.schema import Schema
from roo_ray.storage import open_filesystem

NUM_IMPRESSIONS = "num_impressions"


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


class BadShard(DataError):
    """A file that is missing, damaged, or not what the manifest says."""


class UnitReader:
    """Reads units of one data set; keeps the last file open, as units of a window are often neighbours."""

    def __init__(self, data_set: str, columns: Sequence[str]) -> None:
        self.data_set = data_set
        self.columns = list(columns)
        self.filesystem, self.base = open_filesystem(data_set)
        self._open: tuple[str, pq.ParquetFile] | None = None

    def _file(self, path: str) -> pq.ParquetFile:
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        source = self.filesystem.open_input_file(f"{self.base}/{path}")
        info = self.filesystem.get_file_info(f"{self.base}/{path}")
        key = (self.data_set, path, info.size, info.mtime_ns)
        file = pq.ParquetFile(source, pre_buffer=not local, metadata=_footers.get(key))
        if key not in _footers:
            if len(_footers) >= FOOTERS:
                _footers.pop(next(iter(_footers)), None)
            _footers[key] = file.metadata
        there = set(file.schema_arrow.names)
        missing = [c for c in self.columns if c not in there]
        if missing:
            raise DataError(
                f"{self.data_set}/{path} has no column {', '.join(missing)}, which the schema reads; use the schema "
                "that the data set was built with, or build it again with this one"
            )
        self._open = (path, file)
        return file

    def read(self, unit: UnitRef) -> pa.Table:
        """The unit's rows. Raises DataError where the file is missing, damaged, changed or lacks a column."""
        name = f"{self.data_set}/{unit.path}"
        rebuild = "the data set's files must stay as they were published; restore it or build the data set again"
        try:
            file = self._file(unit.path)
            if unit.row_group >= file.metadata.num_row_groups:
                raise BadShard(f"{name} has no row group {unit.row_group}, which the manifest lists; {rebuild}")
            table = file.read_row_group(unit.row_group, columns=self.columns, use_threads=False)
        except FileNotFoundError:
            raise BadShard(f"{name} is missing; {rebuild}") from None
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadShard(f"{name} cannot be read, it is truncated or damaged ({reason}); {rebuild}") from None
        if table.num_rows != unit.requests:
            raise BadShard(
                f"{name}, row group {unit.row_group}: {table.num_rows} requests, the manifest says "
                f"{unit.requests}; {rebuild}"
            )
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
