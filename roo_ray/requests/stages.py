"""The two stages of a build, each a function that any node can run by itself.

``scatter`` reads one unit of the source and deals its rows to hash buckets of the request key, in one Arrow
file whose record batches are the buckets. ``gather`` reads one bucket from all those files, groups it into
requests, checks them and writes their shards. All rows of a request meet in one bucket; memory is that of a
bucket.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.ipc as ipc

from roo_ray.config import Build
from roo_ray.errors import DataError, RooError
from roo_ray.requests.examine import examine
from roo_ray.requests.grouping import require_keys
from roo_ray.requests.hashing import hash_rows
from roo_ray.requests.ledger import Sizes, measure_bucket
from roo_ray.requests.manifest import ShardFile
from roo_ray.requests.report import Finding, stops_writing
from roo_ray.requests.shards import WriteOptions, write_shards
from roo_ray.schema import Schema
from roo_ray.sources.base import ReadUnit, RowKind, Source
from roo_ray.sources.columns import as_array, list_parts
from roo_ray.storage import open_filesystem

REFUSED = "REFUSED"


@dataclass(frozen=True)
class BuildPlan:
    """What every task of a build knows. ``staging``: folder of the files between the stages; ``kind``: what the
    source's rows are."""

    source: Source
    schema: Schema
    build: Build
    kind: RowKind
    buckets: int
    staging: str
    data_set: str
    version: int
    token: str = ""

    @property
    def options(self) -> WriteOptions:
        """How shards are written."""
        return WriteOptions(self.build.row_group_requests, self.build.compression_level)


@dataclass(frozen=True)
class Scattered:
    """What one unit gave."""

    rows: int
    impressions: int


@dataclass(frozen=True)
class Gathered:
    """What one bucket gave: ``rows`` read from staging, the files written, what the checks found, and the
    ledger's sizes."""

    rows: int
    files: list[ShardFile] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    sizes: Sizes = field(default_factory=dict)


def _staging_file(plan: BuildPlan, unit: int) -> str:
    return f"{open_filesystem(plan.staging)[1]}/unit-{unit:06d}.arrow"


def _impressions(table: pa.Table, plan: BuildPlan) -> int:
    if plan.kind == "impressions":
        return int(table.num_rows)
    return int(list_parts(as_array(table.column(plan.schema.impression_columns[0])))[0].sum())


def scatter(plan: BuildPlan, unit: ReadUnit) -> Scattered:
    """Reads a unit and writes its rows, dealt to buckets, as one staging file: batch ``n * buckets + b`` holds
    bucket ``b`` of the unit's n-th table. Raises DataError for a file that cannot be read and null keys."""
    filesystem, _ = open_filesystem(plan.staging)
    path = _staging_file(plan, unit.index)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    target = f"{path}.{os.getpid()}.tmp" if local else path
    types = plan.source.row_schema
    rows = impressions = 0
    with (
        filesystem.open_output_stream(target) as stream,
        ipc.new_file(stream, types, options=ipc.IpcWriteOptions(compression="lz4")) as writer,
    ):
        for table in plan.source.batches(unit):
            require_keys(table, plan.schema)
            hashes = hash_rows(table, plan.schema.keys.request)
            bucket = (hashes % np.uint64(plan.buckets)).astype(np.int64)
            order = np.lexsort([hashes, bucket])  # rows of a request together: they compress each other
            dealt = table.take(pa.array(order)).combine_chunks()
            bounds = np.searchsorted(bucket[order], np.arange(plan.buckets + 1))
            for begin, end in pairwise(bounds):
                part = dealt.slice(begin, end - begin)
                writer.write_batch(part.to_batches()[0] if part.num_rows else _empty_batch(types))
            rows += table.num_rows
            impressions += _impressions(table, plan)
    if local:
        os.replace(target, path)
    return Scattered(rows, impressions)


def _empty_batch(types: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], kind) for kind in types.types], schema=types)


def _read_bucket(plan: BuildPlan, bucket: int, units: int) -> pa.Table:
    filesystem, _ = open_filesystem(plan.staging)
    batches = []
    for unit in range(units):
        path = _staging_file(plan, unit)
        try:
            with filesystem.open_input_file(path) as stream, ipc.open_file(stream) as reader:
                for number in range(bucket, reader.num_record_batches, plan.buckets):
                    batches.append(reader.get_batch(number))
        except FileNotFoundError:
            raise RooError(
                f"{path} was written by the build and is not there; on a cluster of several nodes the "
                "data set's path (requests) must be on storage that all nodes share, such as s3://..."
            ) from None
    return pa.Table.from_batches(batches, plan.source.row_schema)


def gather(plan: BuildPlan, bucket: int, units: int) -> Gathered:
    """Groups, checks and writes one bucket of ``units`` staging files; nothing is written where a check fails."""
    table = _read_bucket(plan, bucket, units)
    if table.num_rows == 0:
        return Gathered(0)
    rows = table.num_rows
    requests, findings = examine(table, plan.schema, plan.kind, plan.build)
    del table
    if _refused(plan, findings):
        return Gathered(rows, findings=findings)
    sizes = measure_bucket(requests, plan.schema, plan.options, plan.build.ledger, bucket, plan.buckets)
    files = []
    for file, column_bytes in write_shards(
        requests, plan.schema, plan.options, plan.data_set, plan.version, bucket, plan.token
    ):
        files.append(file)
        for name, size in column_bytes.items():
            sizes[name]["disk_bytes"]["request"] += size
    return Gathered(rows, files, findings, sizes)


def _refused(plan: BuildPlan, findings: list[Finding]) -> bool:
    """Whether a check failed here or in another task: what is left is then examined and not written."""
    filesystem, staging = open_filesystem(plan.staging)
    if stops_writing(findings):
        filesystem.open_output_stream(f"{staging}/{REFUSED}").close()
        return True
    return bool(filesystem.get_file_info(f"{staging}/{REFUSED}").type != pafs.FileType.NotFound)


def readable_failure(error: Exception, what: str) -> RooError:
    """The error for the user: roo_ray's own as they are; others named with the step that failed."""
    if isinstance(error, RooError):
        return error
    if isinstance(error, (pa.ArrowException, OSError)):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return DataError(f"{what} failed: {reason}")
    return RooError(f"{what} failed: {type(error).__name__}: {error}")
