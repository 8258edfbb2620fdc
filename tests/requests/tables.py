"""Schemas and hypothesis strategies for impression tables, and brute-force references over Python rows."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from roo_ray.schema import Schema, parse_schema

Row = dict[str, Any]

TEXT = """
name: small
keys: {request: [rid, shard], user: user, time: time, impression: item, position: position}
tables:
  item: {rows: 50, dim: 4}
  word: {rows: 50, dim: 4, hash: true}
features:
  - {name: profile, level: request, kind: dense, columns: [age], fill: 0}
  - {name: tags, level: request, kind: ids, columns: tags, table: word, pooling: sum}
  - {name: history, level: request, kind: sequence, max_length: 8, time: h_time,
     sequence: [{column: h_item, table: item}, {column: h_dwell}]}
  - {name: item, level: impression, kind: ids, columns: item, table: item}
  - {name: words, level: impression, kind: ids, columns: words, table: word, pooling: mean}
  - {name: price, level: impression, kind: dense, columns: [price], fill: 0}
labels: [{name: click, column: click}]
carry: {request: [note], impression: [slot]}
"""

TYPES = pa.schema(
    [
        ("rid", pa.string()),
        ("shard", pa.int64()),
        ("user", pa.int32()),
        ("time", pa.timestamp("us")),
        ("age", pa.float32()),
        ("tags", pa.list_(pa.string())),
        ("h_item", pa.list_(pa.int32())),
        ("h_dwell", pa.list_(pa.float32())),
        ("h_time", pa.list_(pa.timestamp("us"))),
        ("note", pa.string()),
        ("item", pa.int32()),
        ("position", pa.int16()),
        ("words", pa.list_(pa.string())),
        ("price", pa.float64()),
        ("click", pa.int8()),
        ("slot", pa.bool_()),
    ]
)
START = datetime.datetime(2023, 2, 27, 12)


def small_schema(change: Callable[[str], str] = lambda text: text) -> Schema:
    """The schema of the tables here; ``change`` edits its YAML."""
    return parse_schema(change(TEXT))


def request_row(number: int, **changes: Any) -> Row:
    """Request-level values of a request."""
    row: Row = {
        "rid": f"r{number}",
        "shard": number % 3,
        "user": number % 5,
        "time": START + datetime.timedelta(hours=5 * number),
        "age": 20.0 + number,
        "tags": ["a"] * (number % 3),
        "h_item": list(range(number % 4)),
        "h_dwell": [0.5] * (number % 4),
        "h_time": [START - datetime.timedelta(days=9 - i) for i in range(number % 4)],
        "note": f"note {number}",
    }
    return row | changes


def impression_row(request: Row, number: int, **changes: Any) -> Row:
    """A row of the impression log."""
    row = request | {
        "item": number,
        "position": number,
        "words": ["x"] * (number % 2),
        "price": float(number),
        "click": number % 2,
        "slot": None,
    }
    return row | changes


def table_of(rows: list[Row]) -> pa.Table:
    """An Arrow table of rows."""
    return pa.Table.from_pylist(rows, TYPES)


def canonical(table: pa.Table) -> list[str]:
    """The rows as sorted text: equal for tables that hold the same rows in any order, NaNs included."""
    return sorted(repr(sorted(row.items())) for row in table.to_pylist())


def _history(length: int) -> st.SearchStrategy[Row]:
    return st.fixed_dictionaries(
        {
            "h_item": st.lists(st.integers(0, 49), min_size=length, max_size=length),
            "h_dwell": st.lists(st.one_of(st.none(), st.floats(0, 9, width=32)), min_size=length, max_size=length),
            "h_time": st.just([START - datetime.timedelta(hours=length - i) for i in range(length)]),
        }
    )


WORDS = st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "", "ø"]), max_size=3))
REQUEST = st.builds(
    lambda scalars, history: scalars | history,
    st.fixed_dictionaries(
        {
            "user": st.integers(0, 3),
            "time": st.integers(0, 10**6).map(lambda s: START + datetime.timedelta(seconds=s)),
            "age": st.one_of(st.none(), st.floats(0, 90, width=32), st.just(float("nan"))),
            "tags": WORDS,
            "note": st.one_of(st.none(), st.text(max_size=3)),
        }
    ),
    st.one_of(
        st.just({"h_item": None, "h_dwell": None, "h_time": None}),
        st.integers(0, 4).flatmap(_history),
    ),
)
IMPRESSION = st.fixed_dictionaries(
    {
        "position": st.one_of(st.none(), st.integers(0, 3)),
        "words": WORDS,
        "price": st.one_of(st.none(), st.floats(-5, 5), st.just(float("nan"))),
        "click": st.sampled_from([0, 1, None]),
        "slot": st.sampled_from([True, False, None]),
    }
)


@st.composite
def impression_logs(draw: st.DrawFn) -> list[Row]:
    """Rows of an impression log in any order; items are unique within a request."""
    keys = draw(st.lists(st.tuples(st.sampled_from(["a", "b", "", "é"]), st.integers(-2, 2)), unique=True, max_size=6))
    rows = []
    for rid, shard in keys:
        request = {"rid": rid, "shard": shard} | draw(REQUEST)
        items = draw(st.lists(st.integers(0, 49), unique=True, min_size=1, max_size=5))
        rows += [request | {"item": item} | draw(IMPRESSION) for item in items]
    return draw(st.permutations(rows))


def group_by_hand(rows: list[Row], schema: Schema) -> list[Row]:
    """The reference: request rows from a dictionary of lists."""

    def nulls_last(value: Any) -> tuple[bool, Any]:
        return (value is None, 0 if value is None else value)

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in schema.keys.request), []).append(row)
    result = []
    for key in sorted(groups):
        members = sorted(groups[key], key=lambda row: (nulls_last(row["position"]), row["item"]))
        request = {name: members[0][name] for name in schema.request_columns}
        request |= {name: [row[name] for row in members] for name in schema.impression_columns}
        result.append(request | {"num_impressions": len(members)})
    return result
