"""Request shards: Parquet files of request rows, a folder per UTC day, row groups as units of reading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.config import Build
from roo_ray.errors import DataError
from roo_ray.lists import as_array, list_parts
from roo_ray.requests.grouping import NUM_IMPRESSIONS
from roo_ray.requests.hashing import hash_rows
from roo_ray.requests.manifest import ShardFile, Unit
from roo_ray.requests.times import day_name, epoch_seconds, utc_days
from roo_ray.schema import Schema
from roo_ray.storage import open_filesystem


def day_slices(table: pa.Table, schema: Schema) -> Iterator[tuple[str, pa.Table]]:
    """(UTC day of the request's time, its request rows ordered by user and time), days in order."""
    seconds = epoch_seconds(table.column(schema.keys.time))
    days = utc_days(seconds)
    user = hash_rows(table, [schema.keys.user])
    order = np.lexsort([hash_rows(table, schema.keys.request), seconds, user, days])
    cuts = np.flatnonzero(days[order][1:] != days[order][:-1]) + 1
    for rows in np.split(order, cuts):
        if len(rows):
            yield day_name(int(days[rows[0]])), table.take(pa.array(rows))


def _tokens(table: pa.Table, schema: Schema) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(requests,) history events of all sequences."""
    total = np.zeros(table.num_rows, np.int64)
    for feature in schema.sequences:
        total += list_parts(as_array(table.column(feature.sequence[0].column)))[0]
    return total


def dictionary_columns(table: pa.Table) -> list[str]:
    """The columns whose values repeat enough for dictionary encoding to pay: at most half are distinct in a
    sample of the first 100,000 values. (Parquet names the values of a list column ``name.list.element``.)"""
    chosen = []
    for name in table.column_names:
        values = as_array(table.column(name))
        path = name
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = values.flatten()
            path += ".list.element"
        sample = values.slice(0, 100_000)
        if pa.types.is_boolean(values.type) or not len(sample):
            continue
        if 2 * pc.count_distinct(sample, mode="all").as_py() <= len(sample):
            chosen.append(path)
    return chosen


def write_shard(data_set: str, path: str, day: str, table: pa.Table, schema: Schema, build: Build) -> ShardFile:
    """Writes request rows as one shard (zstd) and describes it for the manifest. ``path`` is relative to the data
    set. The same rows give the same bytes. Locally the file appears complete or not at all."""
    filesystem, base = open_filesystem(data_set)
    target = f"{base}/{path}"
    local = isinstance(filesystem, pafs.LocalFileSystem)
    temporary = f"{os.path.dirname(target)}/.{os.path.basename(target)}.tmp" if local else target
    filesystem.create_dir(os.path.dirname(target), recursive=True)
    rows = build.row_group_requests
    with (
        filesystem.open_output_stream(temporary) as stream,
        pq.ParquetWriter(
            stream,
            table.schema,
            compression="zstd",
            compression_level=build.compression_level,
            use_dictionary=dictionary_columns(table) or False,
        ) as writer,
    ):
        for start in range(0, table.num_rows, rows):
            writer.write_table(table.slice(start, rows), row_group_size=rows)
    if local:
        os.replace(temporary, target)
    impressions = np.asarray(as_array(table.column(NUM_IMPRESSIONS))).astype(np.int64)
    tokens = _tokens(table, schema)
    seconds = epoch_seconds(table.column(schema.keys.time))
    starts = range(0, table.num_rows, rows)
    units = [
        Unit(
            requests=min(rows, table.num_rows - start),
            impressions=int(impressions[start : start + rows].sum()),
            tokens=int(tokens[start : start + rows].sum()),
        )
        for start in starts
    ]
    return ShardFile(
        path=path,
        day=day,
        requests=table.num_rows,
        impressions=int(impressions.sum()),
        tokens=int(tokens.sum()),
        bytes=filesystem.get_file_info(target).size,
        time_min=float(seconds.min()),
        time_max=float(seconds.max()),
        units=units,
    )


def read_row_group(data_set: str, path: str, row_group: int, columns: list[str]) -> pa.Table:
    """The named columns of one unit. Raises DataError that names the file where it is missing or damaged."""
    filesystem, base = open_filesystem(data_set)
    try:
        with pq.ParquetFile(filesystem.open_input_file(f"{base}/{path}")) as file:
            return file.read_row_group(row_group, columns=columns, use_threads=False)
    except FileNotFoundError:
        raise DataError(
            f"{base}/{path} is missing, and the manifest names it; the data set is damaged: build it again"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{base}/{path} is damaged ({str(error).splitlines()[0]}); build the data set again") from None
