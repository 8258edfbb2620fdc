"""Request shards for the ingest benchmark: 10 impressions a request, a history of 100 events, written as a build
would write them (zstd, row groups of 1024 requests), without the time that a real build takes."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.manifest import Manifest, ShardFile, Unit, manifest_versions, publish_manifest
from roo_ray.schema import Schema, parse_schema

IMPRESSIONS, HISTORY = 10, 100  # means; histories are half to one and a half times as long, cut to HISTORY
FILE_REQUESTS, GROUP_REQUESTS = 16_384, 1_024
ITEMS, TOPICS, COUNTRIES = 100_000, 50, 32
DAY = datetime.date(2024, 3, 1)

SCHEMA = f"""
name: ingest-benchmark
keys: {{request: request_id, user: user_id, time: request_time, impression: item_id}}
tables:
  item: {{rows: {ITEMS}, dim: 32}}
  topic: {{rows: {TOPICS}, dim: 32}}
  country: {{rows: {COUNTRIES}, dim: 32}}
features:
  - {{name: profile, level: request, kind: dense, columns: [age, activity]}}
  - {{name: country, level: request, kind: ids, columns: country_id, table: country}}
  - name: history
    level: request
    kind: sequence
    max_length: {HISTORY}
    time: history_time
    sequence:
      - {{column: history_item, table: item}}
      - {{column: history_topic, table: topic}}
  - {{name: item, level: impression, kind: ids, columns: item_id, table: item}}
  - {{name: item_topic, level: impression, kind: ids, columns: topic_id, table: topic}}
  - {{name: placement, level: impression, kind: dense, columns: [position, item_age], scale: log1p}}
labels:
  - {{name: click, column: clicked}}
"""


def schema() -> Schema:
    """A small ranking model's inputs: what the README's synthetic log has."""
    return parse_schema(SCHEMA)


def _lists(lengths: npt.NDArray[np.int64], values: npt.NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values).cast(kind))


def request_rows(first: int, count: int, users: int, day: datetime.date = DAY) -> pa.Table:
    """Request rows ``first`` to ``first + count`` of a day, drawn from a generator seeded by ``first``."""
    draw = np.random.default_rng(first)
    impressions = np.minimum(1 + draw.geometric(1 / (IMPRESSIONS - 1), count), 8 * IMPRESSIONS)
    events = draw.integers(HISTORY // 2, HISTORY * 3 // 2, count)
    rows, tokens = int(impressions.sum()), int(events.sum())
    midnight = int(datetime.datetime.combine(day, datetime.time(), datetime.timezone.utc).timestamp())
    times = (midnight + draw.integers(0, 86_400, count)).astype(np.int64)
    ages = np.sort(draw.integers(60, 3_000_000, tokens))[::-1]
    owner = np.repeat(np.arange(count), events)
    ages = ages[np.argsort(owner[np.argsort(owner, kind="stable")], kind="stable")]
    position = np.arange(rows) - np.repeat(np.cumsum(impressions) - impressions, impressions)
    return pa.table(
        {
            "request_id": np.arange(first, first + count),
            "user_id": draw.integers(0, users, count),
            "request_time": pa.array(times * 1_000_000, pa.timestamp("us", tz="UTC")),
            "age": draw.integers(15, 90, count).astype(np.int32),
            "activity": draw.random(count).astype(np.float32),
            "country_id": draw.integers(0, COUNTRIES, count).astype(np.int32),
            "history_item": _lists(events, (ITEMS * draw.random(tokens) ** 3).astype(np.int64), pa.int64()),
            "history_topic": _lists(events, draw.integers(0, TOPICS, tokens), pa.int32()),
            "history_time": _lists(events, (times[owner] - ages) * 1_000, pa.timestamp("ms", tz="UTC")),
            "item_id": _lists(impressions, (ITEMS * draw.random(rows) ** 2).astype(np.int64), pa.int64()),
            "topic_id": _lists(impressions, draw.integers(0, TOPICS, rows), pa.int32()),
            "position": _lists(impressions, position, pa.int32()),
            "item_age": _lists(impressions, draw.random(rows).astype(np.float32), pa.float32()),
            "clicked": _lists(impressions, (draw.random(rows) < 0.1).astype(np.int8), pa.int8()),
            "num_impressions": impressions.astype(np.int32),
        }
    )


def write_data_set(folder: Path, requests: int) -> Manifest:
    """Writes a data set of so many requests on one day, and few on the next, to be held out."""
    if manifest_versions(str(folder)):
        raise FileExistsError(f"{folder} holds a data set already; give another folder")
    files = []
    parts = [(DAY, first, min(FILE_REQUESTS, requests - first)) for first in range(0, requests, FILE_REQUESTS)]
    parts.append((DAY + datetime.timedelta(days=1), requests, max(requests // 50, 1)))
    for number, (day, first, count) in enumerate(parts):
        rows = request_rows(first, count, max(requests // 5, 1), day)
        path = folder / f"data/v000001/day={day}/part-{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path, row_group_size=GROUP_REQUESTS, compression="zstd", compression_level=3)
        impressions = np.asarray(rows["num_impressions"]).astype(np.int64)
        tokens = np.diff(np.asarray(rows["history_item"].combine_chunks().offsets)).astype(np.int64)
        seconds = np.asarray(rows["request_time"].cast(pa.int64())) / 1e6
        units = [
            Unit(
                requests=len(impressions[at : at + GROUP_REQUESTS]),
                impressions=int(impressions[at : at + GROUP_REQUESTS].sum()),
                tokens=int(tokens[at : at + GROUP_REQUESTS].sum()),
            )
            for at in range(0, len(impressions), GROUP_REQUESTS)
        ]
        files.append(
            ShardFile(
                path=str(path.relative_to(folder)),
                day=str(day),
                requests=len(impressions),
                impressions=int(impressions.sum()),
                tokens=int(tokens.sum()),
                bytes=path.stat().st_size,
                time_min=float(seconds.min()),
                time_max=float(seconds.max()),
                units=units,
            )
        )
    manifest = Manifest(version=1, schema_yaml=schema().to_yaml(), schema_digest=schema().digest, files=files)
    publish_manifest(str(folder), manifest)
    return manifest


def impression_table(data_set: str) -> str:
    """The path of ``write_impressions``."""
    return f"{data_set}/impressions.parquet"


def write_impressions(folder: Path, manifest: Manifest, shards: int = 3) -> int:
    """Writes the requests of the first so many shards as impression rows, as a log holds them; returns how many."""
    target = impression_table(str(folder))
    rows, writer = 0, None
    for shard in manifest.files[: min(shards, len(manifest.files) - 1)]:
        with pq.ParquetFile(folder / shard.path) as file:
            for group in range(file.metadata.num_row_groups):
                exploded = explode_requests(file.read_row_group(group), schema())
                ones = pa.array(np.ones(exploded.num_rows, np.int32))
                exploded = exploded.append_column("num_impressions", ones)
                writer = writer or pq.ParquetWriter(target, exploded.schema, compression="zstd", compression_level=3)
                writer.write_table(exploded, row_group_size=exploded.num_rows)
                rows += exploded.num_rows
    assert writer is not None
    writer.close()
    return rows
