"""A version of a request data set back to an impression table: one Parquet file per shard file, by Ray Data tasks.

The rows are those that the version was built from, in the types that they had, ordered by request. The table is
complete or absent: files are written beside it and renamed at the end; on an object store, which cannot rename a
folder, ``_SUCCESS`` is written last, and what fails is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.errors import DataError, RooError
from roo_ray.requests.grouping import explode_in_slices
from roo_ray.requests.manifest import Manifest, ShardFile, load_manifest
from roo_ray.requests.shards import read_row_group
from roo_ray.requests.tasks import Say, run_tasks
from roo_ray.requests.versions import is_local, remove_folder
from roo_ray.schema import Schema
from roo_ray.storage import open_filesystem

SUCCESS = "_SUCCESS"
INCOMPLETE = ".incomplete"
COMPRESSION_LEVEL = 3
IMPRESSIONS_AT_ONCE = 100_000
VALUES_AT_ONCE = 8_000_000


@dataclass(frozen=True)
class ExplodePlan:
    """What every task knows. ``staging``: where the files are written."""

    data_set: str
    schema: Schema
    staging: str
    compression_level: int


@dataclass(frozen=True)
class Exploded:
    """What one shard file gave."""

    impressions: int
    bytes: int


@dataclass(frozen=True)
class ImpressionTable:
    """The table that was written. ``version``, ``digest``: of the manifest that it holds the impressions of."""

    path: str
    version: int
    digest: str
    files: int
    requests: int
    impressions: int
    bytes: int


def explode_data_set(
    data_set: str,
    out: str,
    progress: Say,
    version: int | None = None,
    compression_level: int = COMPRESSION_LEVEL,
) -> ImpressionTable:
    """Writes the impressions of a data set's version (default: the newest) to the folder or URI ``out``.

    Ray must be initialised. Raises DataError where ``out`` is not empty, the version is not there or was purged, or
    a shard is damaged; then nothing is left at ``out``.
    """
    manifest = load_manifest(data_set, version)
    with _empty_folder(out) as staging:
        plan = ExplodePlan(data_set, manifest.request_schema(), staging, compression_level)
        progress(
            f"exploding version {manifest.version} of {data_set}: {manifest.requests:,} requests to "
            f"{manifest.impressions:,} impressions ({len(manifest.files):,} tasks)"
        )
        tasks = [(file, number) for number, file in enumerate(manifest.files)]
        written = run_tasks(plan, "exploding", explode_file, tasks, progress)
        table = _account(manifest, out, written)
        filesystem, base = open_filesystem(staging)
        with filesystem.open_output_stream(f"{base}/{SUCCESS}") as stream:
            about = {name: value for name, value in vars(table).items() if name != "path"} | {"data_set": data_set}
            stream.write(json.dumps(about, indent=1).encode())
    return table


def explode_file(plan: ExplodePlan, file: ShardFile, number: int) -> Exploded:
    """Writes the impressions of a shard file as ``part-NNNNN.parquet``; memory is that of a row group."""
    filesystem, base = open_filesystem(plan.staging)
    path = f"{base}/part-{number:05d}.parquet"
    target = f"{path}.{os.getpid()}.tmp" if isinstance(filesystem, pafs.LocalFileSystem) else path
    impressions = 0
    writer: pq.ParquetWriter | None = None
    with filesystem.open_output_stream(target) as stream:
        for unit in range(len(file.units)):
            requests = read_row_group(plan.data_set, file.path, unit)
            for table in explode_in_slices(requests, plan.schema, IMPRESSIONS_AT_ONCE, VALUES_AT_ONCE):
                writer = writer or pq.ParquetWriter(
                    stream, table.schema, compression="zstd", compression_level=plan.compression_level
                )
                writer.write_table(table)
                impressions += table.num_rows
        assert writer is not None  # a shard file has rows
        writer.close()
        size = stream.tell()
    if impressions != file.impressions:
        raise RooError(f"{file.path} gave {impressions:,} impressions; its manifest says {file.impressions:,}")
    if target != path:
        os.replace(target, path)
    return Exploded(impressions, size)


def _account(manifest: Manifest, out: str, written: list[Exploded]) -> ImpressionTable:
    return ImpressionTable(
        path=out,
        version=manifest.version,
        digest=manifest.digest(),
        files=len(written),
        requests=manifest.requests,
        impressions=sum(file.impressions for file in written),
        bytes=sum(file.bytes for file in written),
    )


@contextmanager
def _empty_folder(out: str) -> Iterator[str]:
    """The folder to write to, which becomes ``out`` where the block ends well. Raises DataError where ``out`` has
    files, or another process is writing it."""
    filesystem, base = open_filesystem(out)
    there = filesystem.get_file_info(base)
    if there.type == pafs.FileType.File or filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True)):
        raise DataError(f"{out} is not empty; name another folder, or remove it")
    if not is_local(out):
        try:
            filesystem.create_dir(base, recursive=True)
            yield out
        except BaseException:
            remove_folder(filesystem, base)
            raise
        return
    incomplete = f"{base}{INCOMPLETE}"
    os.makedirs(incomplete, exist_ok=True)
    folder = os.open(incomplete, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing {out}; wait for it or stop it") from None
        try:
            for item in filesystem.get_file_info(pafs.FileSelector(incomplete)):  # of one that was killed
                remove_folder(filesystem, item.path)
                if item.type == pafs.FileType.File:
                    filesystem.delete_file(item.path)
            inner = f"{incomplete}/{uuid.uuid4().hex[:12]}"
            os.makedirs(inner)
            yield inner
            _remove_temporaries(inner)
            os.replace(inner, base)
        finally:
            remove_folder(filesystem, incomplete)
    finally:
        os.close(folder)


def _remove_temporaries(folder: str) -> None:
    for name in os.listdir(folder):  # of a task that was killed and run again
        if name.endswith(".tmp"):
            os.unlink(f"{folder}/{name}")
