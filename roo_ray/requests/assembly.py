"""Logs that are joined: their rows dealt to buckets by their keys, and the rows of a bucket joined.

What a joined source gives is staged, and is then dealt to the exchange's buckets as the rows of any source are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.errors import DataError, RooError
from roo_ray.requests.exchange import add_surveys, survey_rows
from roo_ray.requests.plan import BuildPlan, Joined, key_hashes
from roo_ray.requests.shards import write_whole
from roo_ray.requests.staging import BATCH_ROWS, Piece, Runs, StagingWriter, read_pieces
from roo_ray.sources.base import JoinedSource, ReadUnit
from roo_ray.sources.columns import take_table
from roo_ray.sources.hashing import hash_rows
from roo_ray.storage import open_filesystem

ASIDE = "aside"


@dataclass(frozen=True)
class Assembly:
    """What one bucket of a joined source gave. ``read``: rows of each log; ``aside``: reason -> rows and file."""

    joined: Joined | None
    read: dict[str, int]
    counts: dict[str, int]
    aside: dict[str, tuple[int, str | None]]


def deal(plan: BuildPlan, unit: ReadUnit, buckets: int) -> Runs:
    """Deals the rows of a unit of one log to buckets by the log's keys. Raises DataError for null keys."""
    assert isinstance(plan.source, JoinedSource)
    log = plan.source.logs[unit.log]
    with StagingWriter(plan.staging, f"log-{unit.index:06d}.arrow", log.schema, plan.codec) as writer:
        for table in plan.source.batches(unit):
            for name in log.keys:
                if table.column(name).null_count:
                    raise DataError(
                        f"{unit.path}: column '{name}' is null in {table.column(name).null_count} rows; rows of the "
                        "logs are joined by it: remove these rows or correct the source"
                    )
            bucket = (hash_rows(table, log.keys) % np.uint64(buckets)).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            bounds = np.searchsorted(bucket[order], np.arange(buckets + 1))
            writer.write_sorted(take_table(table, order), np.arange(buckets), bounds)
        return writer.runs


def assemble(plan: BuildPlan, bucket: int, pieces: dict[str, list[Piece]]) -> Assembly:
    """Joins the rows of one bucket of all logs, stages the result and writes what is kept aside."""
    assert isinstance(plan.source, JoinedSource)
    parts = {
        name: pa.Table.from_batches(read_pieces(plan.staging, pieces.get(name, [])), log.schema)
        for name, log in plan.source.logs.items()
    }
    read = {name: part.num_rows for name, part in parts.items()}
    result = plan.source.assemble(parts)
    del parts
    aside = {reason: _write_aside(plan, reason, bucket, rows) for reason, rows in result.aside.items() if rows.num_rows}
    if not result.rows.num_rows:
        return Assembly(None, read, result.counts, aside)
    if not result.rows.schema.equals(plan.source.row_schema):
        raise RooError(f"a joined source gave rows of {result.rows.schema}, not of {plan.source.row_schema}")
    name = f"joined-{bucket:06d}.arrow"
    surveys = []
    with StagingWriter(plan.staging, name, plan.source.row_schema, plan.codec) as writer:
        for at in range(0, result.rows.num_rows, BATCH_ROWS):
            part = result.rows.slice(at, BATCH_ROWS)
            writer.write(part, 0)
            surveys.append(survey_rows(*key_hashes(part, plan.schema), part.nbytes))
    return Assembly(Joined(name, add_surveys(surveys)), read, result.counts, aside)


def _write_aside(plan: BuildPlan, reason: str, bucket: int, rows: pa.Table) -> tuple[int, str | None]:
    if not plan.build.keep_aside:
        return rows.num_rows, None
    filesystem, base = open_filesystem(plan.data_set)
    path = f"{aside_folder(plan.version, plan.token)}/{reason}/part-{bucket:05d}.parquet"
    stream = pa.BufferOutputStream()
    pq.write_table(rows, stream, compression="zstd", compression_level=plan.build.compression_level)
    write_whole(filesystem, f"{base}/{path}", stream.getvalue())
    return rows.num_rows, path


def aside_folder(version: int, token: str = "") -> str:
    """``aside/v000001``: where the rows that a version keeps aside lie in its data set."""
    return f"{ASIDE}/v{version:06d}-{token}" if token else f"{ASIDE}/v{version:06d}"
