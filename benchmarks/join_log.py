"""The impression log of the join's benchmark: 22 columns, histories of about 100 events, 10 impressions a request.

A row per impression, request-level columns repeated on each, rows of a block of 2 million in random order: what a
serving system logs when nothing has been joined yet. The same options give the same bytes of data.

The skewed log: a third of its rows are impressions of one request (1 million at its full size, each with a position of
its own), and 30 % of the other requests are one user's.
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
from roo_ray.sources.compare import Ints

PER_REQUEST, SHORTEST, LONGEST, STREAM, ITEMS = 10, 60, 140, 400, 20_000
BLOCK, FILE_ROWS, GROUP_ROWS = 2_000_000, 250_000, 50_000
DAYS_PER_BLOCK = 2
HEAVY_REQUEST, HEAVY_USER = 3, 0.3  # of the skewed log: one row in so many is of one request; requests of one user
COMPLETE, LOG_SCHEMA = "_complete.json", "_schema.yaml"
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


def schema(log: Path | None = None) -> Schema:
    """The request schema of a log that was written here, or of the plain ones."""
    return parse_schema(SCHEMA if log is None else (log / LOG_SCHEMA).read_text())


def requests_of(log: Path) -> int:
    """How many requests a log has."""
    return int(json.loads((log / COMPLETE).read_text())["requests"])


def _requests(rng: np.random.Generator, requests: int, first: int, block: int, heavy: float) -> pa.Table:
    """Request-level columns; a user's histories are windows of one stream of events. ``heavy``: share of user 0."""
    users = max(requests // 10, 1)
    shape = (users, STREAM)
    items = (ITEMS * rng.random(shape) ** 3).astype(np.int32)
    midnight = int(START.replace(tzinfo=datetime.timezone.utc).timestamp()) + block * DAYS_PER_BLOCK * 86_400
    gaps = 600 * rng.integers(1, 13, shape)  # events are logged by ten minutes
    events = (midnight - gaps[:, ::-1].cumsum(1)[:, ::-1]) * 1_000_000  # before all requests, increasing
    dwell = np.minimum(rng.gamma(2.0, 10.0, shape).round(), 120).astype(np.float32)
    user = rng.integers(0, users, requests)
    if heavy:
        user[rng.random(requests) < heavy] = 0
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


def _impressions(rng: np.random.Generator, of_request: Ints) -> pa.Table:
    """Impression-level columns of requests in order; ``of_request``: (requests,) impressions of each."""
    rows = int(of_request.sum())
    position = np.arange(rows) - np.repeat(np.cumsum(of_request) - of_request, of_request)
    item = (np.repeat(rng.integers(0, ITEMS, len(of_request)), of_request) + position * 991) % ITEMS
    relevance = rng.random(rows).astype(np.float32)
    return pa.table(
        {
            "item_id": item.astype(np.int32),
            "position": position.astype(np.int16 if position.max() < 2**15 else np.int32),
            "category_id": (item % 500).astype(np.int32),
            "seller_id": (item % 2_000).astype(np.int32),
            "price": np.round((item % 977) * 1.3 + 1, 2).astype(np.float32),
            "item_age": ((item * 31) % 365).astype(np.float32),
            "relevance": relevance,
            "clicked": (rng.random(rows) < 0.2 * relevance).astype(np.int8),
            "bought": (rng.random(rows) < 0.02 * relevance).astype(np.int8),
        }
    )


def _blocks(rows: int, skewed: bool) -> Iterator[Ints]:
    """(requests,) the impressions of each request, block by block."""
    if skewed:
        yield np.append(np.full((rows - rows // HEAVY_REQUEST) // PER_REQUEST, PER_REQUEST), rows // HEAVY_REQUEST)
        return
    for begin in range(0, rows, BLOCK):
        yield np.full(min(BLOCK, rows - begin) // PER_REQUEST, PER_REQUEST)


def write_log(folder: Path, rows: int, skewed: bool = False) -> Path:
    """Writes the log of so many impressions into a folder below ``folder``, unless it is there; returns it."""
    target = folder / f"{'skewed' if skewed else 'log'}-{rows}"
    if (target / COMPLETE).is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    requests_so_far = 0
    for block, of_request in enumerate(_blocks(rows, skewed)):
        rng = np.random.default_rng(1000 + block)
        requests = _requests(rng, len(of_request), block * BLOCK, block, HEAVY_USER if skewed else 0.0)
        requests_so_far += len(of_request)
        impressions = _impressions(rng, of_request)
        request_of = np.repeat(np.arange(len(of_request)), of_request)
        order = rng.permutation(len(request_of))
        for number, begin in enumerate(range(0, len(order), FILE_ROWS)):
            path = target / f"part-{block:03d}-{number:03d}.parquet"
            _write_file(path, requests, impressions, request_of, order[begin : begin + FILE_ROWS])
    # items repeat in the heavy request: there an impression is an item at a position
    names = SCHEMA.replace("impression: item_id,", "impression: [item_id, position],") if skewed else SCHEMA
    (target / LOG_SCHEMA).write_text(names)
    (target / COMPLETE).write_text(json.dumps({"rows": rows, "requests": requests_so_far}))
    return target


def _write_file(path: Path, requests: pa.Table, impressions: pa.Table, request_of: Ints, order: Ints) -> None:
    writer = None
    for at in range(0, len(order), GROUP_ROWS):
        some = order[at : at + GROUP_ROWS]
        shared, own = take_table(requests, request_of[some]), take_table(impressions, some)
        table = pa.table(
            dict(zip([*shared.column_names, *own.column_names], [*shared.columns, *own.columns], strict=True))
        )
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=3)
        writer.write_table(table)
    assert writer is not None
    writer.close()
