"""Separate logs as a serving system writes them, made from Python rows, and the schema and config they go with."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.schema import parse_schema
from roo_ray.source_config import EventLogsSource

Row = dict[str, Any]
NOON = datetime.datetime(2024, 3, 1, 12, tzinfo=datetime.timezone.utc)

SCHEMA = parse_schema("""
name: shop
keys: {request: request_id, user: user_id, time: request_time, impression: item_id, position: position}
tables: {item: {rows: 1000, dim: 4, hash: true}}
features:
  - {name: age, level: request, kind: dense, columns: age}
  - {name: history, level: request, kind: sequence, max_length: 8, time: history_time,
     sequence: [{column: history_item, table: item}]}
  - {name: item, level: impression, kind: ids, columns: item_id, table: item}
  - {name: price, level: impression, kind: dense, columns: price}
labels:
  - {name: click, column: clicked}
  - {name: stay, column: stayed}
  - {name: buy, column: bought}
carry: {impression: [dwell_seconds]}
""")

TYPES = {
    "requests": pa.schema(
        [
            ("rid", pa.string()),
            ("user_id", pa.int64()),
            ("request_time", pa.timestamp("ms", tz="UTC")),
            ("age", pa.float32()),
            ("history_item", pa.list_(pa.string())),
            ("history_time", pa.list_(pa.timestamp("ms", tz="UTC"))),
        ]
    ),
    "impressions": pa.schema(
        [
            ("request_id", pa.large_string()),
            ("item_id", pa.string()),
            ("position", pa.int16()),
            ("price", pa.float64()),
            ("shown_at", pa.timestamp("us", tz="UTC")),
        ]
    ),
    "clicks": pa.schema([("request_id", pa.string()), ("item_id", pa.string()), ("at", pa.timestamp("us", tz="UTC"))]),
    "dwell": pa.schema(
        [("request_id", pa.string()), ("item_id", pa.string()), ("ms", pa.int64()), ("seconds", pa.float32())]
    ),
    "purchases": pa.schema([("request_id", pa.string()), ("item", pa.string()), ("at", pa.timestamp("s"))]),
}


def at(seconds: float) -> datetime.datetime:
    """A time, in seconds after noon."""
    return NOON + datetime.timedelta(seconds=seconds)


def request(number: int, seconds: float, **changes: Any) -> Row:
    """A row of the request log."""
    history = [f"h{n}" for n in range(number % 3)]
    row = {
        "rid": f"r{number}",
        "user_id": number % 5,
        "request_time": at(seconds),
        "age": 20.0 + number,
        "history_item": history,
        "history_time": [at(seconds - 100 + n) for n in range(len(history))],
    }
    return row | changes


def impression(number: int, item: int, position: int, shown: float, **changes: Any) -> Row:
    """A row of the impression log."""
    row = {"request_id": f"r{number}", "item_id": f"i{item}", "position": position, "price": 1.5 * item}
    return row | {"shown_at": at(shown)} | changes


def click(number: int, item: int, seconds: float) -> Row:
    """A row of the click log."""
    return {"request_id": f"r{number}", "item_id": f"i{item}", "at": at(seconds)}


def dwell(number: int, item: int, seconds: float, value: float | None) -> Row:
    """A row of the dwell log: its time is a number of milliseconds since 1970."""
    row: Row = {"request_id": f"r{number}", "item_id": f"i{item}", "seconds": value}
    return row | {"ms": round(at(seconds).timestamp() * 1000)}


def purchase(number: int, item: int, seconds: float) -> Row:
    """A row of the purchase log."""
    return {"request_id": f"r{number}", "item": f"i{item}", "at": at(seconds).replace(tzinfo=None)}


def write_logs(folder: Path, files: int = 1, **logs: list[Row]) -> None:
    """Writes each log to a folder of its name, its rows dealt to so many files."""
    for name, types in TYPES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(files):
            table = pa.Table.from_pylist(logs.get(name, [])[number::files], types)
            pq.write_table(table, folder / name / f"part-{number}.parquet", row_group_size=50)


def source_of(folder: Path, **changes: Any) -> EventLogsSource:
    """The config of the logs that ``write_logs`` writes."""
    content = {
        "kind": "event_logs",
        "requests": {"path": str(folder / "requests"), "columns": {"request_id": "rid"}},
        "impressions": {"path": str(folder / "impressions"), "time": "shown_at"},
        "events": {
            "clicks": {"path": str(folder / "clicks"), "time": "at"},
            "dwell": {"path": str(folder / "dwell"), "time": "ms", "value": "seconds"},
            "purchases": {"path": str(folder / "purchases"), "time": "at", "columns": {"item_id": "item"}},
        },
        "labels": {
            "clicked": {"event": "clicks", "window": "30m"},
            "stayed": {"event": "dwell", "window": "1h", "min_value": 10, "value_column": "dwell_seconds"},
            "bought": {"event": "purchases", "window": "7d"},
        },
        "observed_until": at(3600),
    }
    return EventLogsSource.model_validate(content | changes)
