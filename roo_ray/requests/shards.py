"""Request shards: Parquet files of request rows, one UTC day each, written once and never changed.

A file appears under its name complete or not at all, and the same rows give the same bytes. Rows are ordered by
user and time, which compresses best; each column is encoded with or without a dictionary, whichever is smaller
on a sample.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.requests.compare import Ints, sort_codes
from roo_ray.requests.grouping import NUM_IMPRESSIONS
from roo_ray.requests.manifest import ShardFile, Unit
from roo_ray.requests.times import Seconds, day_name, epoch_seconds, utc_days
from roo_ray.schema import Schema
from roo_ray.sources.base import leaf_columns
from roo_ray.sources.columns import as_array, list_parts
from roo_ray.storage import open_filesystem

DATA = "data"
SAMPLE_ROWS = 1024
DICTIONARY_GAIN = 0.98


@dataclass(frozen=True)
class WriteOptions:
    """``row_group_requests``: requests per row group, the unit of reading; ``compression_level``: of zstd."""

    row_group_requests: int
    compression_level: int

    def writer(self, stream: pa.NativeFile, schema: pa.Schema, dictionary: list[str]) -> pq.ParquetWriter:
        """A Parquet writer with these options; ``dictionary``: the columns that are dictionary-encoded."""
        return pq.ParquetWriter(
            stream,
            schema,
            compression="zstd",
            compression_level=self.compression_level,
            use_dictionary=dictionary or False,
            write_page_index=False,
        )


def version_folder(version: int, token: str = "") -> str:
    """``data/v000001``: where the files of a version lie in its data set; with the ``token`` of a build where no
    lock keeps a second one out (``data/v000001-1f3a...``)."""
    return f"{DATA}/v{version:06d}-{token}" if token else f"{DATA}/v{version:06d}"


def column_bytes(metadata: pq.FileMetaData) -> dict[str, int]:
    """Compressed bytes of each top-level column, from the footer."""
    names = leaf_columns(metadata)
    totals = dict.fromkeys(names, 0)
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for leaf, name in enumerate(names):
            totals[name] += row_group.column(leaf).total_compressed_size
    return totals


def _leaf_paths(schema: pa.Schema, name: str) -> list[str]:
    stream = pa.BufferOutputStream()
    with pq.ParquetWriter(stream, pa.schema([schema.field(name)])) as writer:
        writer.write_table(pa.schema([schema.field(name)]).empty_table())
    footer = pq.read_metadata(pa.BufferReader(stream.getvalue()))
    return [footer.schema.column(i).path for i in range(footer.num_columns)]


def dictionary_columns(requests: pa.Table, options: WriteOptions) -> list[str]:
    """The leaf columns for which dictionary encoding makes the first rows smaller; found by writing them both
    ways."""
    sample = requests.slice(0, min(SAMPLE_ROWS, options.row_group_requests)).combine_chunks()

    def size(name: str, paths: list[str]) -> int:
        stream = pa.BufferOutputStream()
        one = sample.select([name])
        with options.writer(stream, one.schema, paths) as writer:
            writer.write_table(one)
        return sum(column_bytes(pq.read_metadata(pa.BufferReader(stream.getvalue()))).values())

    chosen: list[str] = []
    for name in requests.column_names:
        paths = _leaf_paths(requests.schema, name)
        if size(name, paths) < DICTIONARY_GAIN * size(name, []):
            chosen += paths
    return chosen


def order_for_shards(requests: pa.Table, schema: Schema, times: Seconds) -> Ints:
    """(rows,) the order by user, time and request key."""
    keys = [sort_codes(requests.column(name)) for name in schema.keys.request]
    return np.lexsort([*reversed(keys), times, sort_codes(requests.column(schema.keys.user))])


def history_tokens(requests: pa.Table, schema: Schema) -> Ints:
    """(rows,) int64: history events of each request, all sequences together."""
    tokens = np.zeros(requests.num_rows, np.int64)
    for feature in schema.sequences:
        tokens += list_parts(as_array(requests.column(feature.source_columns[0])))[0]
    return tokens


def write_shards(
    requests: pa.Table, schema: Schema, options: WriteOptions, data_set: str, version: int, part: int, token: str = ""
) -> Iterator[tuple[ShardFile, dict[str, int]]]:
    """Writes request rows as one file per UTC day, ``data/v000001/day=2023-02-27/part-00007.parquet``.

    Yields (what the manifest says of the file, compressed bytes per column), day by day.
    """
    if requests.num_rows == 0:
        return
    filesystem, base = open_filesystem(data_set)
    times = epoch_seconds(requests.column(schema.keys.time), schema.keys.time)
    order = order_for_shards(requests, schema, times)
    days = utc_days(times)[order]
    in_order = requests.take(pa.array(order)).combine_chunks()
    dictionary = dictionary_columns(in_order, options)
    by_day = np.argsort(days, kind="stable")
    for day in np.unique(days):
        left, right = np.searchsorted(days[by_day], [day, day + 1])
        rows = by_day[left:right]
        shard = in_order.take(pa.array(rows)).combine_chunks()
        name = f"{version_folder(version, token)}/day={day_name(int(day))}/part-{part:05d}.parquet"
        footer, size = _write(filesystem, f"{base}/{name}", shard, options, dictionary)
        day_times = times[order][rows]
        tokens = history_tokens(shard, schema)
        impressions = np.asarray(shard.column(NUM_IMPRESSIONS)).astype(np.int64)
        units = [
            Unit(
                requests=len(tokens[at : at + options.row_group_requests]),
                impressions=int(impressions[at : at + options.row_group_requests].sum()),
                tokens=int(tokens[at : at + options.row_group_requests].sum()),
            )
            for at in range(0, shard.num_rows, options.row_group_requests)
        ]
        file = ShardFile(
            path=name,
            day=day_name(int(day)),
            requests=shard.num_rows,
            impressions=int(impressions.sum()),
            tokens=int(tokens.sum()),
            bytes=size,
            time_min=float(day_times.min()),
            time_max=float(day_times.max()),
            units=units,
        )
        yield file, column_bytes(footer)


def _write(
    filesystem: pafs.FileSystem, path: str, shard: pa.Table, options: WriteOptions, dictionary: list[str]
) -> tuple[pq.FileMetaData, int]:
    """(footer, bytes) of the finished file. Locally a complete temporary file is renamed into place; an object
    store shows an object only when its upload is complete."""
    local = isinstance(filesystem, pafs.LocalFileSystem)
    if local:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    target = f"{os.path.dirname(path)}/.{os.path.basename(path)}.{os.getpid()}.tmp" if local else path
    with filesystem.open_output_stream(target) as stream:
        with options.writer(stream, shard.schema, dictionary) as writer:
            for at in range(0, shard.num_rows, options.row_group_requests):
                rows = shard.slice(at, options.row_group_requests)
                writer.write_table(rows, row_group_size=options.row_group_requests)
        size = stream.tell()
    with filesystem.open_input_file(target) as source:
        footer = pq.read_metadata(source)
    if local:
        with open(target, "rb") as file:
            os.fsync(file.fileno())
        os.replace(target, path)
    return footer, size


def read_row_group(data_set: str, path: str, row_group: int, columns: list[str] | None = None) -> pa.Table:
    """The request rows of a unit; ``path`` as in the manifest. Raises DataError naming the file where it is
    missing, truncated or damaged."""
    filesystem, base = open_filesystem(data_set)
    name = f"{data_set.rstrip('/')}/{path}"
    advice = "published files never change: restore it, or build the data set again"
    try:
        with pq.ParquetFile(filesystem.open_input_file(f"{base}/{path}")) as file:
            return file.read_row_group(row_group, columns=columns, use_threads=False)
    except FileNotFoundError:
        raise DataError(f"shard {name} is missing; {advice}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"shard {name} is truncated or damaged ({error}); {advice}") from None
