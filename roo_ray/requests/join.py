"""Builds a request data set: two Ray Data stages through hash-bucket files, then the manifest.

Stage 1, a task per unit of the source: rows are dealt to buckets by a hash of their request key and written to
a staging folder beside the data set. Stage 2, a task per bucket: its rows are grouped, checked and written as
shards. Memory is bounded by the size of a bucket, and nothing passes through the object store but counts. The
manifest is published last; a build that fails leaves nothing.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data

from roo_ray.config import Build, Config
from roo_ray.errors import DataError, RooError
from roo_ray.requests import ledger
from roo_ray.requests.checks import check_requests
from roo_ray.requests.grouping import explode_requests, group_impressions, with_num_impressions
from roo_ray.requests.hashing import hash_rows
from roo_ray.requests.manifest import Manifest, ShardFile, manifest_versions, publish_manifest
from roo_ray.requests.shards import day_slices, write_shard
from roo_ray.schema import Schema
from roo_ray.sources import open_source
from roo_ray.sources.base import ReadUnit, Source
from roo_ray.storage import open_filesystem

Progress = Callable[[str], None]
BUCKET_BYTES = 128_000_000  # of rows in memory; grouping takes about three times that
SMALL_BUCKET_BYTES = 8_000_000  # a small log is cut into up to MIN_BUCKETS of these, to use the cores
MIN_BUCKETS = 4


@dataclass(frozen=True)
class BuildTask:
    """What every task of a build needs. ``staging`` and ``folder`` are relative to the data set."""

    data_set: str
    staging: str
    folder: str
    schema: Schema
    build: Build
    source: Source
    buckets: int

    def deal(self, unit: ReadUnit) -> dict[str, Any]:
        """Stage 1: writes a unit's rows to their buckets; returns counts."""
        filesystem, base = open_filesystem(self.data_set)
        rows = 0
        for number, table in enumerate(self.source.batches(unit)):
            rows += table.num_rows
            bucket = hash_rows(table, self.schema.keys.request) % np.uint64(self.buckets)
            order = np.argsort(bucket, kind="stable")
            table = table.take(pa.array(order))
            cuts = np.searchsorted(bucket[order], np.arange(self.buckets + 1, dtype=np.uint64))
            for index in np.flatnonzero(np.diff(cuts)):
                name = f"{base}/{self.staging}/bucket={index:05d}/{unit.index:06d}-{number:06d}.arrow"
                part = table.slice(cuts[index], cuts[index + 1] - cuts[index])
                filesystem.create_dir(os.path.dirname(name), recursive=True)
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                with (
                    filesystem.open_output_stream(name) as stream,
                    pa.ipc.new_stream(stream, part.schema, options=options) as writer,
                ):
                    writer.write_table(part)
        return {"rows": rows}

    def write(self, bucket: int) -> dict[str, Any]:
        """Stage 2: a bucket's rows to shards; returns their descriptions, counts and ledger."""
        rows = self._bucket_rows(bucket)
        if rows is None:
            return {"files": [], "counts": {"rows_read": 0}, "costs": {}}
        counts: dict[str, int] = {"rows_read": rows.num_rows}
        if self.source.units()[0].kind == "impressions":
            requests, conflicts = group_impressions(rows, self.schema, self.build.on_request_conflict)
            counts |= conflicts
        else:
            requests = with_num_impressions(rows, self.schema)
            _refuse_repeated_requests(requests, self.schema)
        counts |= check_requests(requests, self.schema)
        costs = ledger.table_costs(requests, self.schema)
        if self.source.disk_bytes() is None:
            exploded = explode_requests(requests, self.schema)
            for name, size in ledger.exploded_bytes(exploded, self.build.compression_level).items():
                costs[name]["disk_bytes"]["impression"] = size
        files = []
        for day, part in day_slices(requests, self.schema):
            path = f"{self.folder}/day={day}/part-{bucket:05d}.parquet"
            files.append(write_shard(self.data_set, path, day, part, self.schema, self.build))
            for name, size in self._disk_bytes(path).items():
                costs[name]["disk_bytes"]["request"] += size
        return {"files": [file.model_dump() for file in files], "counts": counts, "costs": costs}

    def _bucket_rows(self, bucket: int) -> pa.Table | None:
        filesystem, base = open_filesystem(self.data_set)
        folder = pafs.FileSelector(f"{base}/{self.staging}/bucket={bucket:05d}", allow_not_found=True)
        tables = []
        for path in sorted(info.path for info in filesystem.get_file_info(folder)):
            with filesystem.open_input_file(path) as file:
                tables.append(pa.ipc.open_stream(file).read_all())
        return pa.concat_tables(tables) if tables else None

    def _disk_bytes(self, path: str) -> dict[str, int]:
        filesystem, base = open_filesystem(self.data_set)
        with filesystem.open_input_file(f"{base}/{path}") as file:
            return ledger.footer_bytes(pq.read_metadata(file), self.schema.columns)


def default_buckets(size: int) -> int:
    """Hash buckets for a log of ``size`` bytes in memory."""
    return max(min(MIN_BUCKETS, -(-size // SMALL_BUCKET_BYTES)), -(-size // BUCKET_BYTES), 1)


def _refuse_repeated_requests(requests: pa.Table, schema: Schema) -> None:
    hashes = np.sort(hash_rows(requests, schema.keys.request))
    repeated = int((hashes[1:] == hashes[:-1]).sum())
    if repeated:
        raise DataError(
            f"{repeated} requests repeat the key of another ({', '.join(schema.keys.request)}); published ids are "
            "not always unique: name more columns in keys.request"
        )


def build_requests(config: Config, progress: Progress) -> Manifest:
    """Builds and publishes the next version of ``config.requests`` from ``config.source``; Ray is running.

    Raises DataError, one message, for whatever the source, the kernel or the checks refuse; then nothing of this
    build is left.
    """
    if config.source is None:
        raise DataError("the config has no 'source' section: there is nothing to build requests from")
    source = open_source(config.source, config.request_schema)
    units = source.units()
    version = max(manifest_versions(config.requests), default=0) + 1
    size = sum(unit.bytes for unit in units)
    build_id = uuid.uuid4().hex[:12]
    task = BuildTask(
        data_set=config.requests,
        staging=f"_staging/{build_id}",
        folder=f"data/v{version:06d}-{build_id}",
        schema=config.request_schema,
        build=config.build,
        source=source,
        buckets=config.build.buckets or default_buckets(size),
    )
    published = False
    try:
        manifest = _run(task, units, version, progress)
        publish_manifest(config.requests, manifest)
        published = True
    finally:
        _remove(config.requests, task.staging)
        if not published:
            _remove(config.requests, task.folder)
    progress(
        f"published version {version} of {config.requests}: {manifest.requests:,} requests, "
        f"{manifest.impressions:,} impressions in {len(manifest.files)} files"
    )
    return manifest


def every_seconds(seconds: float) -> Callable[[], bool]:
    """A function that is true at most once in so many seconds."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last < seconds:
            return False
        last = time.monotonic()
        return True

    return due


def _run(task: BuildTask, units: list[ReadUnit], version: int, progress: Progress) -> Manifest:
    total = sum(unit.rows for unit in units)
    dealt = 0
    time_for_a_line = every_seconds(2.0)
    for done, result in enumerate(_map(task.deal, units), start=1):
        dealt += result["rows"]
        if time_for_a_line() or done == len(units):
            progress(f"reading: {done}/{len(units)} units, {dealt:,}/{total:,} rows")
    files: list[ShardFile] = []
    counts: dict[str, int] = {}
    costs: ledger.Costs = {}
    for done, result in enumerate(_map(task.write, list(range(task.buckets))), start=1):
        files += [ShardFile.model_validate(file) for file in result["files"]]
        for name, value in result["counts"].items():
            counts[name] = counts.get(name, 0) + value
        ledger.add_costs(costs, result["costs"])
        if time_for_a_line() or done == task.buckets:
            progress(f"grouping: {done}/{task.buckets} buckets, {sum(f.requests for f in files):,} requests")
    impression_rows = units[0].kind == "impressions"
    written = sum(f.impressions if impression_rows else f.requests for f in files)
    if not total == dealt == counts.get("rows_read", 0) == written:
        raise DataError(
            f"rows were lost: the source has {total:,}, {dealt:,} were read, {counts.get('rows_read', 0):,} grouped "
            f"and {written:,} written; nothing is published"
        )
    counts |= {"requests": sum(f.requests for f in files), "impressions": sum(f.impressions for f in files)}
    task.source.verify(counts)
    logged = task.source.disk_bytes()
    for name, size in (logged or {}).items():
        costs[name]["disk_bytes"]["impression"] = size
    how = "as logged" if logged is not None else "of the exploded rows, written with the same codec"
    return Manifest(
        version=version,
        schema_yaml=task.schema.to_yaml(),
        schema_digest=task.schema.digest,
        files=sorted(files, key=lambda file: file.path),
        counts=counts,
        ledger=ledger.make_ledger(costs, task.schema, f"impression-level disk bytes: {how}"),
    )


def _map(function: Callable[[Any], dict[str, Any]], items: list[Any]) -> Iterator[dict[str, Any]]:
    """Applies ``function`` to each item in Ray Data tasks; yields results as they come. An error of ours in a
    task is raised as it was."""

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": [function(row["item"])]}
        except RooError as error:  # brought home as a value: Ray would wrap it in pages of traceback
            return {"result": [error]}

    data = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    for row in data.map(run).iter_rows():
        result = row["result"][0]
        if isinstance(result, RooError):
            raise result
        yield result


def _remove(data_set: str, folder: str) -> None:
    filesystem, base = open_filesystem(data_set)
    if filesystem.get_file_info(f"{base}/{folder}").type == pafs.FileType.Directory:
        filesystem.delete_dir(f"{base}/{folder}")
    parent = os.path.dirname(f"{base}/{folder}")
    left = filesystem.get_file_info(pafs.FileSelector(parent, allow_not_found=True))
    if os.path.basename(parent) == "_staging" and not left and filesystem.get_file_info(parent).type.name != "NotFound":
        filesystem.delete_dir(parent)
