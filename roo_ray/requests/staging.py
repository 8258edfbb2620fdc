"""The files between the stages of a build: Arrow record batches, each with rows of one bucket.

A task writes one file; which bucket each of its batches belongs to goes back to the driver as ``Runs``, so that
the next stage opens just the files, and reads just the batches, that it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.ipc as ipc

from roo_ray.errors import RooError
from roo_ray.sources.compare import Ints
from roo_ray.storage import open_filesystem

BATCH_ROWS = 65_536
Codec = Literal["lz4", "zstd"] | None


@dataclass(frozen=True)
class Runs:
    """``buckets``: (batches,) the bucket of each record batch of the staging file ``name``."""

    name: str
    buckets: Ints


@dataclass(frozen=True)
class Piece:
    """The batches of one staging file that a task reads."""

    name: str
    batches: tuple[int, ...]


def pieces_of(runs: Sequence[Runs], buckets: int) -> list[list[Piece]]:
    """For each bucket the pieces that hold its rows, in order of ``runs``."""
    found: list[list[Piece]] = [[] for _ in range(buckets)]
    for run in runs:
        order = np.argsort(run.buckets, kind="stable")
        ordered = run.buckets[order]
        bounds = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(order) else order
        for begin, end in pairwise([*bounds.tolist(), len(order)]):
            found[int(ordered[begin])].append(Piece(run.name, tuple(order[begin:end].tolist())))
    return found


def staged_path(staging: str, name: str) -> str:
    """Where a staging file lies in its file system."""
    return f"{open_filesystem(staging)[1]}/{name}"


class StagingWriter:
    """Writes the staging file ``name``; it appears when the block ends without an error."""

    def __init__(self, staging: str, name: str, schema: pa.Schema, codec: Codec = None) -> None:
        self.filesystem, base = open_filesystem(staging)
        self.codec = codec
        self.path = f"{base}/{name}"
        self.name = name
        self.schema = schema
        self.buckets: list[int] = []
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        self.target = f"{self.path}.{os.getpid()}.tmp" if local else self.path

    def __enter__(self) -> StagingWriter:
        self.stream = self.filesystem.open_output_stream(self.target)
        self.writer = ipc.new_file(self.stream, self.schema, options=ipc.IpcWriteOptions(compression=self.codec))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.writer.close()
        self.stream.close()
        if kind is None and self.target != self.path:
            os.replace(self.target, self.path)

    def write(self, table: pa.Table, bucket: int) -> None:
        """Appends rows (at least one) of a bucket as one batch."""
        self.writer.write_batch(table.combine_chunks().to_batches()[0])
        self.buckets.append(bucket)

    def write_sorted(self, table: pa.Table, buckets: Ints, bounds: Ints) -> None:
        """Appends a table whose rows ``bounds[i] .. bounds[i + 1]`` belong to ``buckets[i]``; empty parts are
        left out."""
        whole = table.combine_chunks()
        for bucket, begin, end in zip(buckets.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if end > begin:
                self.writer.write_batch(whole.slice(begin, end - begin).to_batches()[0])
                self.buckets.append(bucket)

    @property
    def runs(self) -> Runs:
        """The batches written."""
        return Runs(self.name, np.array(self.buckets, np.int64))


def _missing(path: str) -> RooError:
    return RooError(
        f"{path} was written by the build and is not there; on a cluster of several nodes the data set's path "
        "(requests) must be on storage that all nodes share, such as s3://..."
    )


def read_pieces(staging: str, pieces: Sequence[Piece]) -> Iterator[pa.RecordBatch]:
    """The batches of the pieces, in order. Raises RooError where a file is not there."""
    for piece in pieces:
        yield from _batches(staging, piece.name, piece.batches)


def read_staged(staging: str, name: str) -> Iterator[pa.RecordBatch]:
    """All batches of a staging file."""
    yield from _batches(staging, name, None)


def _batches(staging: str, name: str, numbers: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
    filesystem, base = open_filesystem(staging)
    path = f"{base}/{name}"
    local = isinstance(filesystem, pafs.LocalFileSystem)  # mapped: the batches are pages of the file
    try:
        stream = pa.memory_map(path) if local else filesystem.open_input_file(path)
    except FileNotFoundError:
        raise _missing(path) from None
    with stream, ipc.open_file(stream) as reader:
        for number in range(reader.num_record_batches) if numbers is None else numbers:
            yield reader.get_batch(number)
