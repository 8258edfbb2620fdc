"""The impression log of the join's benchmark: 22 columns, histories of about 100 events, 10 impressions a request.

A row per impression, request-level columns repeated on each, rows of a block of 2 million in random order: what a
serving system logs when nothing has been joined yet. The same options give the same bytes of data.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.schema import Schema, parse_schema
from roo_ray.sources.columns import take_table

PER_REQUEST, SHORTEST, LONGEST, STREAM, ITEMS = 10, 60, 140, 400, 20_000
BLOCK, FILE_ROWS, GROUP_ROWS = 2_000_000, 250_000, 50_000
DAYS_PER_BLOCK = 2
START = datetime.datetime(2026, 3, 1)
SCHEMA = """
name: join_benchmark
keys: {request: request_id, user: user_id, time: request_time, impression: item_id, position: position}
tables:
  item: {rows: 20000, dim: 32}
  country: {rows: 64, dim: 16}
  device: {rows: 16, dim: 16}
  category: {rows: 500, dim: 16}
  seller: {rows: 2000, dim: 16}
features:
  - {name: profile, level: request, kind: dense, columns: [user_age, user_activity, user_tenure, user_spend]}
  - {name: country, level: request, kind: ids, columns: country_id, table: country}
  - {name: device, level: request, kind: ids, columns: device_id, table: device}
  - {name: history, level: request, kind: sequence, max_length: 100, time: history_time,
     sequence: [{column: history_item, table: item}, {column: history_dwell}]}
  - {name: item, level: impression, kind: ids, columns: item_id, table: item}
  - {name: category, level: impression, kind: ids, columns: category_id, table: category}
  - {name: seller, level: impression, kind: ids, columns: seller_id, table: seller}
  - {name: offer, level: impression, kind: dense, columns: [price, item_age, relevance]}
labels: [{name: click, column: clicked}, {name: buy, column: bought}]
carry: {request: [session_id]}
"""


def schema() -> Schema:
    """The log's request schema."""
    return parse_schema(SCHEMA)


def _requests(rng: np.random.Generator, requests: int, first: int, block: int) -> pa.Table:
    """Request-level columns; a user's histories are windows of one stream of events."""
    users = max(requests // 10, 1)
    shape = (users, STREAM)
    items = (ITEMS * rng.random(shape) ** 3).astype(np.int32)
    midnight = int(START.replace(tzinfo=datetime.timezone.utc).timestamp()) + block * DAYS_PER_BLOCK * 86_400
    gaps = 600 * rng.integers(1, 13, shape)  # events are logged by ten minutes
    events = (midnight - gaps[:, ::-1].cumsum(1)[:, ::-1]) * 1_000_000  # before all requests, increasing
    dwell = np.minimum(rng.gamma(2.0, 10.0, shape).round(), 120).astype(np.float32)
    user = rng.integers(0, users, requests)
    length = rng.integers(SHORTEST, LONGEST + 1, requests)
    end = rng.integers(LONGEST, STREAM + 1, requests)
    offsets = np.concatenate([[0], np.cumsum(length)])
    index = np.repeat(user * STREAM + end - length - offsets[:-1], length) + np.arange(offsets[-1])
    lists = pa.array(offsets, pa.int32())
    seconds = rng.integers(0, DAYS_PER_BLOCK * 86_400, requests) + midnight
    profile = np.random.default_rng(7)
    age, activity = profile.integers(16, 90, users), np.round(profile.random(users), 3)
    tenure, spend = profile.integers(0, 4000, users), np.round(profile.gamma(1.0, 50.0, users), 2)
    country, device = profile.integers(0, 64, users), profile.integers(0, 16, users)
    return pa.table(
        {
            "request_id": first + rng.permutation(requests).astype(np.int64),
            "user_id": user.astype(np.int64),
            "request_time": pa.array(seconds * 1_000_000, pa.timestamp("us")),
            "user_age": age[user].astype(np.float32),
            "user_activity": activity[user].astype(np.float32),
            "user_tenure": tenure[user].astype(np.float32),
            "user_spend": spend[user].astype(np.float32),
            "country_id": country[user].astype(np.int32),
            "device_id": device[user].astype(np.int32),
            "session_id": pa.array([f"s{u}-{s // 3600}" for u, s in zip(user, seconds - midnight, strict=True)]),
            "history_item": pa.ListArray.from_arrays(lists, pa.array(items.ravel()[index])),
            "history_time": pa.ListArray.from_arrays(lists, pa.array(events.ravel()[index], pa.timestamp("us"))),
            "history_dwell": pa.ListArray.from_arrays(lists, pa.array(dwell.ravel()[index])),
        }
    )


def _impressions(rng: np.random.Generator, rows: int) -> pa.Table:
    """Impression-level columns of requests in order, ``PER_REQUEST`` each."""
    start = rng.integers(0, ITEMS, rows // PER_REQUEST)
    item = (np.repeat(start, PER_REQUEST) + np.tile(np.arange(PER_REQUEST) * 991, rows // PER_REQUEST)) % ITEMS
    relevance = rng.random(rows).astype(np.float32)
    return pa.table(
        {
            "item_id": item.astype(np.int32),
            "position": np.tile(np.arange(PER_REQUEST), rows // PER_REQUEST).astype(np.int16),
            "category_id": (item % 500).astype(np.int32),
            "seller_id": (item % 2_000).astype(np.int32),
            "price": np.round((item % 977) * 1.3 + 1, 2).astype(np.float32),
            "item_age": ((item * 31) % 365).astype(np.float32),
            "relevance": relevance,
            "clicked": (rng.random(rows) < 0.2 * relevance).astype(np.int8),
            "bought": (rng.random(rows) < 0.02 * relevance).astype(np.int8),
        }
    )


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    for block, begin in enumerate(range(0, rows, BLOCK)):
        yield block, min(BLOCK, rows - begin)


def write_log(folder: Path, rows: int) -> Path:
    """Writes the log of so many impressions into a folder below ``folder``, unless it is there; returns it."""
    target = folder / f"log-{rows}"
    done = target / "_complete.json"
    if done.is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for block, size in _blocks(rows):
        rng = np.random.default_rng(1000 + block)
        requests = _requests(rng, size // PER_REQUEST, block * BLOCK, block)
        impressions = _impressions(rng, size)
        order = rng.permutation(size)
        for number, begin in enumerate(range(0, size, FILE_ROWS)):
            writer = None
            for at in range(begin, min(begin + FILE_ROWS, size), GROUP_ROWS):
                some = order[at : min(at + GROUP_ROWS, size)]
                shared, own = take_table(requests, some // PER_REQUEST), take_table(impressions, some)
                table = pa.table(dict(zip([*shared.column_names, *own.column_names],
                                          [*shared.columns, *own.columns], strict=True)))  # fmt: skip
                if writer is None:
                    path = target / f"part-{block:03d}-{number:03d}.parquet"
                    writer = pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=3)
                writer.write_table(table)
            assert writer is not None
            writer.close()
    done.write_text(json.dumps({"rows": rows}))
    return target
