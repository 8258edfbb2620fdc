"""Impression logs for tests: hypothesis strategies, and grouping by plain Python loops as the reference."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from roo_ray.schema import Schema, parse_schema

SCHEMA = """
name: small
keys: {request: [session, number], user: user, time: time, impression: item, position: position}
tables: {item: {rows: 50, dim: 4}}
features:
  - {name: age, level: request, kind: dense, columns: age, fill: 0}
  - {name: history, level: request, kind: sequence, max_length: 5, time: history_time,
     sequence: [{column: history_item, table: item}, dwell]}
  - {name: item, level: impression, kind: ids, columns: item, table: item}
  - {name: price, level: impression, kind: dense, columns: price, fill: 0}
labels: [{name: click, column: clicked}]
carry: {request: [note], impression: [tags]}
"""

TYPES = pa.schema(
    [
        ("session", pa.string()),
        ("number", pa.int32()),
        ("user", pa.int64()),
        ("time", pa.timestamp("us")),
        ("age", pa.float32()),
        ("history_item", pa.list_(pa.int32())),
        ("dwell", pa.list_(pa.float32())),
        ("history_time", pa.list_(pa.timestamp("us"))),
        ("note", pa.string()),
        ("item", pa.int32()),
        ("position", pa.int32()),
        ("price", pa.float64()),
        ("clicked", pa.int8()),
        ("tags", pa.list_(pa.string())),
    ]
)
START = 1_700_000_000_000_000  # microseconds


def schema() -> Schema:
    """Two key columns, a sequence, nulls where they are allowed, lists on both levels."""
    return parse_schema(SCHEMA)


@st.composite
def impression_rows(draw: st.DrawFn, most: int = 8) -> list[dict[str, Any]]:
    """Rows of a log of up to ``most`` requests, shuffled; user features repeat on every row of a request."""
    keys = draw(
        st.lists(
            st.tuples(st.sampled_from(["a", "b", "longer session"]), st.integers(-2, 3)),
            min_size=1,
            max_size=most,
            unique=True,
        )
    )
    rows = []
    for session, number in keys:
        time = START + draw(st.integers(0, 3 * 86_400)) * 1_000_000
        events = draw(st.integers(0, 7))
        request = {
            "session": session,
            "number": number,
            "user": draw(st.integers(0, 3)),
            "time": time,
            "age": draw(st.one_of(st.none(), st.floats(0, 100, width=32))),
            "history_item": draw(st.lists(st.integers(0, 49), min_size=events, max_size=events)),
            "dwell": draw(st.lists(st.floats(0, 9, width=32), min_size=events, max_size=events)),
            "history_time": [time - (events - i) * 1_000_000 for i in range(events)],
            "note": draw(st.one_of(st.none(), st.text(max_size=3))),
        }
        items = draw(st.lists(st.integers(0, 49), min_size=1, max_size=5, unique=True))
        for position, item in enumerate(items):
            rows.append(
                request
                | {
                    "item": item,
                    "position": position,
                    "price": draw(st.one_of(st.none(), st.floats(0, 9))),
                    "clicked": draw(st.sampled_from([0, 1, None])),
                    "tags": draw(st.one_of(st.none(), st.lists(st.sampled_from(["x", "y"]), max_size=2))),
                }
            )
    return draw(st.permutations(rows))


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table of the types above."""
    return pa.Table.from_pylist(rows, schema=TYPES)


def group_by_loop(rows: list[dict[str, Any]], schema: Schema) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The reference: request key -> request row, impressions in order of position."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in schema.keys.request), []).append(row)
    result = {}
    for key, members in groups.items():
        members = sorted(members, key=lambda row: row["position"])
        request = {name: members[0][name] for name in schema.request_columns}
        request |= {name: [row[name] for row in members] for name in schema.impression_columns}
        result[key] = request | {"num_impressions": len(members)}
    return result
