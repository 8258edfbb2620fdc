"""Request keys must name one request each, over all buckets of a build.

Rows of one key with different users or days fall into different buckets, where neither sees the other. So each
gather stages the hashes of its request keys by ranges of the hash; a range is searched for hashes that come
twice; those, which may be chance, are then compared by their real keys in the files that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.requests.grouping import describe_key
from roo_ray.requests.manifest import ShardFile
from roo_ray.requests.shards import RESTORE
from roo_ray.requests.staging import Piece, Runs, StagingWriter, read_pieces
from roo_ray.schema import Schema
from roo_ray.sources.compare import Ints
from roo_ray.sources.hashing import Hashes, hash_rows
from roo_ray.storage import join_path, open_filesystem
from roo_ray.watched import read_parquet


class HasStaging(Protocol):
    """What knows the folder of the staging files: a build's plan."""

    @property
    def staging(self) -> str:
        """The folder."""
        ...


HASHES_AT_ONCE = 8_000_000
MOST_COMPARED = 1000
HASH = pa.schema([("hash", pa.uint64())])


def ranges_for(requests: float) -> int:
    """Into how many ranges of the hash so many requests are dealt."""
    return 1 + int(requests // HASHES_AT_ONCE)


def split_range(ordered: Hashes, ranges: int) -> Ints:
    """(ranges + 1,) where in sorted hashes each range begins, and the end."""
    starts = [-(-(number << 64) // ranges) for number in range(1, ranges)]
    return np.array([0, *np.searchsorted(ordered, np.array(starts, np.uint64)).tolist(), len(ordered)])


def stage_hashes(staging: str, shard: int, hashes: Hashes, ranges: int) -> Runs:
    """Stages the key hashes of a shard's requests, sorted and by range."""
    ordered = np.sort(hashes)
    with StagingWriter(staging, f"keys-{shard:06d}.arrow", HASH) as writer:
        writer.write_sorted(pa.table([ordered], schema=HASH), np.arange(ranges), split_range(ordered, ranges))
        return writer.runs


def stage_kept_hashes(
    plan: HasStaging, data_set: str, columns: Sequence[str], number: int, files: Sequence[ShardFile], ranges: int
) -> Runs:
    """``stage_hashes`` of the request keys (``columns``) of files that an earlier version has written."""
    hashes = [np.zeros(0, np.uint64)]
    for file in files:
        hashes.append(hash_rows(_read(data_set, file, columns), columns))
    return stage_hashes(plan.staging, number, np.concatenate(hashes), ranges)


def _read(data_set: str, file: ShardFile, columns: Sequence[str]) -> pa.Table:
    filesystem, base = open_filesystem(data_set)

    def read(opened: pq.ParquetFile) -> pa.Table:
        return opened.read(list(columns))

    return read_parquet(filesystem, f"{base}/{file.path}", read, join_path(data_set, file.path), RESTORE)


def repeated_hashes(plan: HasStaging, pieces: Sequence[Piece]) -> list[tuple[int, list[int]]]:
    """(hash, positions in ``pieces`` that hold it) for the first hashes of a range that come twice."""
    parts = [np.asarray(batch.column(0)) for batch in read_pieces(plan.staging, pieces)]
    if not parts:
        return []
    hashes = np.concatenate(parts)
    holder = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    several = np.unique(np.concatenate([repeated, repeated + 1]))[: 2 * MOST_COMPARED]
    found = zip(hashes[order][several].tolist(), holder[order][several].tolist(), strict=True)
    return [(value, sorted({at for _, at in group})) for value, group in groupby(found, key=lambda pair: pair[0])]


def refuse_repeated_keys(
    data_set: str,
    schema: Schema,
    repeated: Sequence[tuple[int, list[int]]],
    files_of: Sequence[Sequence[ShardFile]],
    can_settle: bool = False,
) -> None:
    """Raises DataError where request keys behind equal hashes are equal. ``files_of``: the files of each shard
    that a hash names; ``can_settle``: whether a rule for conflicts could settle two times of one user."""
    if not repeated:
        return
    columns = list(dict.fromkeys([*schema.keys.request, schema.keys.user, schema.keys.time]))
    wanted = np.array([value for value, _ in repeated], np.uint64)
    found = []
    for shard in sorted({shard for _, shards in repeated for shard in shards}):
        for file in files_of[shard]:
            table = _read(data_set, file, columns)
            found.append(table.filter(pa.array(np.isin(hash_rows(table, schema.keys.request), wanted))))
    rows = pa.concat_tables(found).combine_chunks()
    keys = [tuple(row[name] for name in schema.keys.request) for row in rows.select(schema.keys.request).to_pylist()]
    first: dict[tuple[object, ...], int] = {}
    pairs: dict[tuple[object, ...], tuple[int, int]] = {}
    for row, key in enumerate(keys):
        if first.setdefault(key, row) != row:
            pairs.setdefault(key, (first[key], row))
    if pairs:
        left, right = next(iter(pairs.values()))
        who = [
            describe_key(rows, row, list(dict.fromkeys([schema.keys.user, schema.keys.time]))) for row in (left, right)
        ]
        same_user = all(
            rows.column(schema.keys.user)[a].equals(rows.column(schema.keys.user)[b]) for a, b in pairs.values()
        )
        settle = ", or set build.on_request_conflict to first, last or max_time" if can_settle and same_user else ""
        raise DataError(
            f"the request key names several requests: {len(pairs)} keys have different users or times (first: "
            f"{describe_key(rows, left, schema.keys.request)}: {who[0]}, and {who[1]}); add columns to keys.request, "
            f"or correct the log{settle}"
        )
