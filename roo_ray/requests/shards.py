"""Request shards: Parquet files of request rows, one UTC day each, written once and never changed.

A file appears under its name complete or not at all, and the same rows give the same bytes. Rows are ordered by
user and time, which compresses best, or by time; each column is written plain, with a dictionary or split
by bytes, whichever is smallest on a sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.config import Build
from roo_ray.errors import DataError
from roo_ray.requests.grouping import NUM_IMPRESSIONS
from roo_ray.requests.manifest import ShardFile, Unit
from roo_ray.schema import Schema
from roo_ray.sources.base import leaf_columns
from roo_ray.sources.columns import as_array, is_list, list_parts, take_table
from roo_ray.sources.compare import Ints, sort_codes
from roo_ray.sources.times import Seconds, day_name, epoch_seconds, utc_days
from roo_ray.storage import join_path, open_filesystem
from roo_ray.watched import parquet_fault

DATA = "data"
SAMPLE_ROWS = 1024
ENCODING_GAIN = 0.98
OFFSET_BYTES = 4
RESTORE = "published files never change: restore it, or build the data set again"


@dataclass(frozen=True)
class Encodings:
    """Leaf columns that are dictionary-encoded, and those whose bytes are split into streams by significance
    (Parquet's BYTE_STREAM_SPLIT), which repeated histories and slowly changing numbers compress better in."""

    dictionary: tuple[str, ...] = ()
    split: tuple[str, ...] = ()


@dataclass(frozen=True)
class WriteOptions:
    """``row_group_requests``, ``row_group_impressions``, ``row_group_bytes`` (in memory): the most of a row group,
    the unit of reading (a single larger request has its own); ``compression_level``: of zstd; ``file_bytes``:
    about the size of a file; ``order`` of its rows."""

    row_group_requests: int
    compression_level: int
    row_group_impressions: int = 65_536
    row_group_bytes: int = 64_000_000
    file_bytes: int = 64_000_000
    order: Literal["user_time", "time"] = "user_time"

    def writer(self, stream: pa.NativeFile, schema: pa.Schema, encodings: Encodings) -> pq.ParquetWriter:
        """A Parquet writer with these options."""
        return pq.ParquetWriter(
            stream,
            schema,
            compression="zstd",
            compression_level=self.compression_level,
            use_dictionary=list(encodings.dictionary) or False,
            use_byte_stream_split=list(encodings.split) or False,
            write_page_index=False,
        )


def write_options(build: Build) -> WriteOptions:
    """How a build's config wants shards written."""
    return WriteOptions(
        row_group_requests=build.row_group_requests,
        compression_level=build.compression_level,
        row_group_impressions=build.row_group_impressions,
        row_group_bytes=build.row_group_bytes,
        file_bytes=build.file_bytes,
        order=build.order,
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


def choose_encodings(sample: pa.Table, options: WriteOptions) -> tuple[Encodings, int]:
    """(encodings that make the columns smaller than plain ones, compressed bytes with them): found by writing each
    column of the sample in each way."""
    dictionary: list[str] = []
    split: list[str] = []
    total = 0
    for name in sample.column_names:
        one = sample.select([name])
        paths = _leaf_paths(sample.schema, name)
        plain = _written_bytes(one, options, Encodings())
        best, chosen, into = plain, [], dictionary
        ways = [(Encodings(dictionary=tuple(paths)), dictionary)]
        if can_split(sample.schema.field(name).type):
            ways.append((Encodings(split=tuple(paths)), split))
        for encodings, kind in ways:
            size = _written_bytes(one, options, encodings)
            if size < ENCODING_GAIN * plain and size < best:
                best, chosen, into = size, paths, kind
        into += chosen
        total += best
    return Encodings(tuple(dictionary), tuple(split)), total


def can_split(kind: pa.DataType) -> bool:
    """Whether all values of this type, or of lists of it, are numbers of 4 or 8 bytes."""
    while is_list(kind):
        kind = kind.value_type
    types = pa.types
    return bool(types.is_float32(kind) or types.is_float64(kind) or types.is_integer(kind) or types.is_timestamp(kind))


def _written_bytes(table: pa.Table, options: WriteOptions, encodings: Encodings) -> int:
    stream = pa.BufferOutputStream()
    with options.writer(stream, table.schema, encodings) as writer:
        writer.write_table(table)
    return sum(column_bytes(pq.read_metadata(pa.BufferReader(stream.getvalue()))).values())


def order_for_shards(
    requests: pa.Table, schema: Schema, times: Seconds, order: Literal["user_time", "time"] = "user_time"
) -> Ints:
    """(rows,) the order by user, time and request key, or by time first."""
    keys = [sort_codes(requests.column(name)) for name in schema.keys.request]
    users = sort_codes(requests.column(schema.keys.user))
    return np.lexsort([*reversed(keys), *((times, users) if order == "user_time" else (users, times))])


def history_tokens(requests: pa.Table, schema: Schema) -> Ints:
    """(rows,) int64: history events of each request, all sequences together."""
    tokens = np.zeros(requests.num_rows, np.int64)
    for feature in schema.sequences:
        tokens += list_parts(as_array(requests.column(feature.source_columns[0])))[0]
    return tokens


def row_bytes(array: pa.Array) -> Ints:
    """(N,) int64: about the bytes that each value takes in memory, lists and text with 4-byte offsets."""
    kind = array.type
    if is_list(kind):
        lengths, values = list_parts(array)
        ends = np.cumsum(lengths)
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(row_bytes(values))])
        sizes: Ints = sums[ends] - sums[ends - lengths] + OFFSET_BYTES
        return sizes
    if pa.types.is_struct(kind):
        return sum((row_bytes(field) for field in array.flatten()), np.zeros(len(array), np.int64))
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return np.asarray(pc.fill_null(pc.binary_length(array), 0)).astype(np.int64) + OFFSET_BYTES
    return np.full(len(array), 0 if pa.types.is_null(kind) else -(-kind.bit_width // 8), np.int64)


def row_group_bounds(impressions: Ints, sizes: Ints, options: WriteOptions) -> Ints:
    """(groups + 1,) where the row groups begin and the last one ends, of requests with so many impressions and
    bytes in memory each."""
    rows = len(sizes)
    limits = [(np.cumsum(impressions), options.row_group_impressions), (np.cumsum(sizes), options.row_group_bytes)]
    bounds = [0]
    while (begin := bounds[-1]) < rows:
        end = min(rows, begin + options.row_group_requests)
        for sums, limit in limits:
            done = sums[begin - 1] if begin else 0
            end = min(end, int(np.searchsorted(sums, done + limit, side="right")))
        bounds.append(max(begin + 1, end))
    return np.array(bounds, np.int64)


def write_shards(
    requests: pa.Table,
    schema: Schema,
    options: WriteOptions,
    data_set: str,
    version: int,
    shard: int,
    token: str = "",
    first_part: int = 0,
) -> Iterator[tuple[ShardFile, dict[str, int]]]:
    """Writes request rows as ``data/vVVVVVV/day=YYYY-MM-DD/shard-SSSSS-PPP.parquet``, for each UTC day one or
    several files of about ``options.file_bytes``, and yields each file with its compressed bytes per column. The
    order of the input rows does not matter.

    Nothing is published by this: the manifest is. ``token``: see ``version_folder``; ``first_part``: the number
    PPP of each day's first file.
    """
    filesystem, base = open_filesystem(data_set)
    times = epoch_seconds(requests.column(schema.keys.time), schema.keys.time)
    order = order_for_shards(requests, schema, times, options.order)
    days = utc_days(times)[order]
    for day in np.unique(days):
        rows = order[days == day]
        table = take_table(requests, rows)
        impressions = np.asarray(table.column(NUM_IMPRESSIONS)).astype(np.int64)
        tokens = history_tokens(table, schema)
        sizes = sum((row_bytes(as_array(column)) for column in table.columns), np.zeros(len(rows), np.int64))
        bounds = row_group_bounds(impressions, sizes, options)
        sample = min(int(bounds[1]), SAMPLE_ROWS)
        encodings, compressed = choose_encodings(table.slice(0, sample).combine_chunks(), options)
        expected = float(sizes.sum()) * compressed / max(int(sizes[:sample].sum()), 1)
        for part, (first, last) in enumerate(_file_bounds(sizes, bounds, expected / options.file_bytes), first_part):
            groups = bounds[first : last + 1]
            begin, end = int(groups[0]), int(groups[-1])
            folder = f"{version_folder(version, token)}/day={day_name(int(day))}"
            name = f"{folder}/shard-{shard:05d}-{part:03d}.parquet"
            content = _encode(table, groups, options, encodings)
            write_whole(filesystem, f"{base}/{name}", content)
            seconds = times[rows[begin:end]]
            file = ShardFile(
                path=name,
                day=day_name(int(day)),
                shard=shard,
                requests=end - begin,
                impressions=int(impressions[begin:end].sum()),
                tokens=int(tokens[begin:end].sum()),
                bytes=content.size,
                digest=hashlib.sha256(content).hexdigest(),
                time_min=float(seconds.min()),
                time_max=float(seconds.max()),
                units=[
                    Unit(
                        requests=int(right - left),
                        impressions=int(impressions[left:right].sum()),
                        tokens=int(tokens[left:right].sum()),
                        time_min=float(seconds[left - begin : right - begin].min()),
                        time_max=float(seconds[left - begin : right - begin].max()),
                    )
                    for left, right in pairwise(groups)
                ],
            )
            yield file, column_bytes(pq.read_metadata(pa.BufferReader(content)))


def _file_bounds(sizes: Ints, bounds: Ints, files: float) -> list[tuple[int, int]]:
    """(first, last) positions in ``bounds`` of each file, for about so many files of about equal bytes."""
    sums = np.cumsum(sizes)[bounds[1:] - 1]  # (groups,) bytes up to the end of each row group
    count = max(1, min(len(sums), round(files)))
    if count == len(sums):  # groups of unequal bytes would not fall into files of one group each by themselves
        return list(pairwise(range(count + 1)))
    ends = np.searchsorted(sums, sums[-1] * np.arange(1, count) / count) + 1
    cuts = np.unique(np.concatenate([[0], ends, [len(sums)]]))
    return [(int(first), int(last)) for first, last in pairwise(cuts)]


def _encode(table: pa.Table, groups: Ints, options: WriteOptions, encodings: Encodings) -> pa.Buffer:
    """The bytes of a Parquet file with these row groups of the table."""
    stream = pa.BufferOutputStream()
    with options.writer(stream, table.schema, encodings) as writer:
        for left, right in pairwise(groups):
            rows = int(right - left)
            writer.write_table(table.slice(int(left), rows), row_group_size=rows)
    return stream.getvalue()


def write_whole(filesystem: pafs.FileSystem, path: str, content: pa.Buffer | bytes) -> None:
    """Writes a file that appears complete or not at all. Locally a finished temporary file is renamed into place;
    an object store shows an object only when its upload is complete."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{folder}/.{os.path.basename(path)}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_row_group(data_set: str, path: str, row_group: int, columns: list[str] | None = None) -> pa.Table:
    """The request rows of a unit; ``path`` as in the manifest. Raises DataError naming the file where it is missing,
    truncated, damaged, or may not be read; StorageError where storage fails."""
    filesystem, base = open_filesystem(data_set)
    name, place = f"shard {join_path(data_set, path)}", f"{base}/{path}"

    def read(file: pq.ParquetFile) -> pa.Table:
        return file.read_row_group(row_group, columns=columns, use_threads=False)

    try:
        with pq.ParquetFile(filesystem.open_input_file(place)) as file:
            return read(file)
    except FileNotFoundError:
        raise DataError(f"{name} is missing; {RESTORE}") from None
    except (pa.ArrowException, OSError) as error:
        raise parquet_fault(
            error, filesystem, place, name, RESTORE, says="is truncated or damaged", again=read
        ) from None
