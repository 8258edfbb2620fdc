"""Small random data sets with every kind of feature, written as a build would write them, and a plain-Python
reading of their rows that the ingest must equal."""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.requests.manifest import Manifest, ShardFile, Unit, manifest_versions, publish_manifest
from roo_ray.schema import Feature, Schema, parse_schema
from roo_ray.sources.hashing import hash_array, hash_rows

SCHEMA = """
name: ingest-test
keys: {request: [request_id, site], user: user_id, time: request_time, impression: item_id}
tables:
  item: {rows: 50, dim: 8, hash: true}
  topic: {rows: 12, dim: 8}
  word: {rows: 30, dim: 4, hash: true}
  country: {rows: 9, dim: 4}
features:
  - {name: profile, level: request, kind: dense, columns: [age, activity], fill: 30, scale: log1p}
  - {name: flag, level: request, kind: dense, columns: is_subscriber}
  - {name: country, level: request, kind: ids, columns: country_id, table: country, fill_id: 8}
  - {name: interests, level: request, kind: ids, columns: interest_words, table: word, pooling: mean,
     max_length: 3}
  - {name: device, level: request, kind: ids, columns: device_id, table: country, pooling: sum}
  - name: history
    level: request
    kind: sequence
    max_length: 4
    time: history_time
    sequence:
      - {column: history_item, table: item}
      - {column: history_dwell, scale: log1p}
      - {column: history_topic, table: topic}
      - history_score
  - {name: item, level: impression, kind: ids, columns: item_id, table: item}
  - {name: topic, level: impression, kind: ids, columns: topic_id, table: topic, fill_id: 0}
  - {name: tags, level: impression, kind: ids, columns: tag_ids, table: topic, pooling: sum, max_length: 2}
  - {name: price, level: impression, kind: dense, columns: [price, rank], fill: -1}
labels:
  - {name: click, column: clicked, oracle: click_probability}
  - {name: buy, column: bought, weight: 0.5}
carry: {request: note}
"""

ARROW: dict[str, pa.DataType] = {
    "request_id": pa.int64(),
    "site": pa.string(),
    "user_id": pa.string(),
    "request_time": pa.timestamp("us", tz="UTC"),
    "age": pa.int32(),
    "activity": pa.float64(),
    "is_subscriber": pa.bool_(),
    "country_id": pa.int16(),
    "interest_words": pa.list_(pa.string()),
    "device_id": pa.int32(),
    "history_time": pa.list_(pa.timestamp("ms")),
    "history_item": pa.list_(pa.string()),
    "history_dwell": pa.list_(pa.float32()),
    "history_topic": pa.list_(pa.int8()),
    "history_score": pa.list_(pa.float64()),
    "item_id": pa.list_(pa.string()),
    "topic_id": pa.list_(pa.int32()),
    "tag_ids": pa.list_(pa.list_(pa.int64())),
    "price": pa.list_(pa.float32()),
    "rank": pa.list_(pa.int64()),
    "clicked": pa.list_(pa.int8()),
    "click_probability": pa.list_(pa.float64()),
    "bought": pa.list_(pa.float32()),
    "note": pa.string(),
    "num_impressions": pa.int32(),
}
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
START = datetime.datetime(2024, 3, 1, tzinfo=datetime.timezone.utc)

Row = dict[str, Any]


def schema() -> Schema:
    """Every kind of feature, hashed and checked tables, fills, two tasks of which one has an oracle."""
    return parse_schema(SCHEMA)


def random_rows(counts: Sequence[int], seed: int, days: int = 1) -> list[Row]:
    """Requests of so many impressions, in order over the days, with nulls where the schema allows them, empty
    and null histories and bags."""
    draw, moments = random.Random(seed), random.Random(seed)

    def maybe(value: Any, null: float = 0.2) -> Any:
        return None if draw.random() < null else value

    def words(most: int) -> list[str]:
        return [f"w{draw.randrange(40)}" for _ in range(draw.randrange(most + 1))]

    rows = []
    for request, impressions in enumerate(counts):
        events = draw.choice([0, 0, 1, 3, 4, 5, 9])
        no_history = events == 0 and draw.random() < 0.5
        time = START + datetime.timedelta(days=request * days // len(counts), microseconds=draw.randrange(10**10))

        def each(value: Any, count: int = impressions) -> list[Any]:
            return [value() for _ in range(count)]

        def around(time: datetime.datetime) -> datetime.datetime:
            """Most events are before their request; some are at it or after."""
            time += datetime.timedelta(seconds=moments.choice([-3600, -60, -1, -1, 0, 90]))
            return time.replace(tzinfo=None, microsecond=time.microsecond // 1000 * 1000)

        def event(value: Any, count: int = events, none: bool = no_history) -> list[Any] | None:
            return None if none else [value() for _ in range(count)]

        rows.append(
            {
                "request_id": request,
                "site": draw.choice(["a", "b"]),
                "user_id": f"u{draw.randrange(20)}",
                "request_time": time,
                "age": maybe(draw.randint(-3, 90)),
                "activity": maybe(draw.choice([draw.random(), math.nan])),
                "is_subscriber": draw.random() < 0.5,
                "country_id": maybe(draw.randrange(8)),
                "interest_words": maybe(words(5)),
                "device_id": maybe(draw.randrange(9)),
                "history_time": event(lambda t=time: around(t)),
                "history_item": event(lambda: f"i{draw.randrange(99)}"),
                "history_dwell": event(lambda: maybe(draw.random() * 100)),
                "history_topic": event(lambda: draw.randrange(12)),
                "history_score": event(lambda: maybe(draw.random())),
                "item_id": each(lambda: f"i{draw.randrange(99)}"),
                "topic_id": each(lambda: maybe(draw.randrange(12))),
                "tag_ids": each(lambda: maybe([draw.randrange(12) for _ in range(draw.randrange(4))])),
                "price": each(lambda: maybe(draw.choice([draw.random(), math.nan]))),
                "rank": each(lambda: maybe(draw.randrange(1000))),
                "clicked": each(lambda: maybe(draw.randrange(2))),
                "click_probability": each(lambda: maybe(draw.random())),
                "bought": each(lambda: maybe(float(draw.randrange(2)))),
                "note": "carried",
                "num_impressions": impressions,
            }
        )
    return rows


def write_data_set(
    folder: Path, rows: Sequence[Row], schema: Schema, *, row_group: int = 5, file_rows: int = 20
) -> Manifest:
    """Writes the rows as a new version of the data set in ``folder``: files of one day and ``file_rows``
    requests, units of ``row_group``."""
    by_day: dict[str, list[Row]] = {}
    for row in rows:
        by_day.setdefault(row["request_time"].date().isoformat(), []).append(row)
    versions = manifest_versions(str(folder))
    version = versions[-1] + 1 if versions else 1
    files = []
    for day, of_day in sorted(by_day.items()):
        for start in range(0, len(of_day), file_rows):
            part = of_day[start : start + file_rows]
            path = folder / "data" / f"v{version}" / day / f"{start // file_rows:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rewrite(path, part, row_group)
            units = [part[i : i + row_group] for i in range(0, len(part), row_group)]
            seconds = [row["request_time"].timestamp() for row in part]
            files.append(
                ShardFile(
                    path=str(path.relative_to(folder)),
                    day=day,
                    requests=len(part),
                    impressions=sum(row["num_impressions"] for row in part),
                    tokens=sum(len(row["history_item"] or []) for row in part),
                    bytes=path.stat().st_size,
                    time_min=min(seconds),
                    time_max=max(seconds),
                    units=[
                        Unit(
                            requests=len(unit),
                            impressions=sum(row["num_impressions"] for row in unit),
                            tokens=sum(len(row["history_item"] or []) for row in unit),
                        )
                        for unit in units
                    ],
                )
            )
    manifest = Manifest(version=version, schema_yaml=schema.to_yaml(), schema_digest=schema.digest, files=files)
    publish_manifest(str(folder), manifest)
    return manifest


def rewrite(path: Path, rows: Sequence[Row], row_group: int = 5) -> None:
    """Overwrites a shard behind the manifest's back."""
    pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(ARROW)), path, row_group_size=row_group)


def request_key(row: Row, schema: Schema) -> int:
    """What ``RequestBatch.request_key`` is for a row."""
    names = schema.keys.request
    table = pa.table({name: pa.array([row[name]], ARROW[name]) for name in names})
    return int(hash_rows(table, names).view(np.int64)[0])


# ---- the plain-Python reading ----------------------------------------------------------------------------


def _seconds(time: datetime.datetime) -> float:
    aware = time if time.tzinfo else time.replace(tzinfo=datetime.timezone.utc)
    return (aware - EPOCH).total_seconds()


def _dense(value: Any, fill: float, scale: str) -> float:
    number = fill if value is None or math.isnan(value) else float(value)
    return math.log1p(max(number, 0.0)) if scale == "log1p" else number


def _id(schema: Schema, name: str, value: Any, fill: int | None) -> int:
    if value is None:
        assert fill is not None
        return fill
    table = schema.tables[name]
    return int(hash_array(pa.array([value]))[0]) % table.rows if table.hash else int(value)


def _ids(schema: Schema, feature: Feature, value: Any) -> list[int]:
    if feature.pooling == "none":
        return [_id(schema, feature.table or "", value, feature.fill_id)]
    bag = value if isinstance(value, list) else [] if value is None else [value]
    return [_id(schema, feature.table or "", v, feature.fill_id) for v in bag[: feature.max_length]]


def _events(feature: Feature, row: Row) -> list[int]:
    """The places of a sequence's events that are kept: the last before the request, where some must go."""
    keep, places = feature.max_length or 0, list(range(len(row[feature.sequence[0].column] or [])))
    if feature.time and len(places) > keep:
        places = [i for i in places if _seconds(row[feature.time][i]) < _seconds(row["request_time"])]
    return places[-keep:]


def reference(schema: Schema, row: Row) -> dict[str, Any]:
    """A row as ``unpack.observed`` gives it back from a batch, read one value at a time."""
    anonymous = row["user_id"] is None
    read: dict[str, Any] = {
        "request_key": request_key(row, schema),
        "request_time": _seconds(row["request_time"]),
        "user_key": request_key(row, schema)
        if anonymous
        else int(hash_array(pa.array([row["user_id"]])).view(np.int64)[0]),
        "num_impressions": row["num_impressions"],
        "impression_index": list(range(row["num_impressions"])),
        "request_dense": [
            _dense(row[c], f.fill or 0.0, f.scale) for f in schema.select("request", "dense") for c in f.columns
        ],
        "impression_dense": [
            [_dense(row[c][i], f.fill or 0.0, f.scale) for f in schema.select("impression", "dense") for c in f.columns]
            for i in range(row["num_impressions"])
        ],
        "labels": [[row[x.column][i] or 0 for x in schema.labels] for i in range(row["num_impressions"])],
        "weights": [
            [float(row[x.column][i] is not None) for x in schema.labels] for i in range(row["num_impressions"])
        ],
        "oracle": [
            [row[x.oracle][i] if x.oracle and row[x.oracle][i] is not None else math.nan for x in schema.labels]
            for i in range(row["num_impressions"])
        ],
    }
    for feature in schema.features:
        if feature.kind == "ids" and feature.level == "request":
            read[feature.name] = _ids(schema, feature, row[feature.columns[0]])
        elif feature.kind == "ids":
            read[feature.name] = [_ids(schema, feature, value) for value in row[feature.columns[0]]]
        elif feature.kind == "sequence":
            events = _events(feature, row)
            for part in feature.sequence_ids:
                values = [row[part.column][i] for i in events]
                read[f"{feature.name}.{part.column}"] = [_id(schema, part.table or "", v, None) for v in values]
            read[f"{feature.name}:dense"] = [
                [_dense(row[p.column][i], 0.0, p.scale) for p in feature.sequence_dense] for i in events
            ]
            if feature.time:
                read[f"{feature.name}:time"] = [_seconds(row[feature.time][i]) for i in events]
    return read
