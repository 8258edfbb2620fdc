"""Rows that are requests already: columns are mapped, labels made from lists of positives, and checked."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.config import load_config
from roo_ray.errors import ConfigError, DataError
from roo_ray.requests.checks import check_types
from roo_ray.source_config import RequestRowsSource
from roo_ray.sources import open_source
from roo_ray.sources.base import read
from roo_ray.sources.positives import positives_to_labels
from roo_ray.sources.request_rows import RequestRows

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs" / "request_rows.yaml")
SCHEMA = CONFIG.request_schema
NOON = datetime.datetime(2024, 3, 1, 12)
ROWS: list[dict[str, Any]] = [
    {"request_id": 1, "user_id": 7, "age": 30.0, "items_in_view": ["a", "b"], "items_clicked": ["b"]},
    {"request_id": 2, "user_id": 8, "age": None, "items_in_view": ["b", "c", "d"], "items_clicked": []},
    {"request_id": 3, "user_id": 7, "age": 30.0, "items_in_view": ["e"], "items_clicked": None},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> pa.Table:
    filled = [row | {"time": NOON, "history_items": ["x"] * row["request_id"]} for row in rows]
    table = pa.Table.from_pylist(filled)
    pq.write_table(table, path, row_group_size=2)
    return table


def opened(path: Path, **changes: Any) -> RequestRows:
    assert isinstance(CONFIG.source, RequestRowsSource)
    content = CONFIG.source.model_dump() | {"path": str(path)} | changes
    source = open_source(RequestRowsSource.model_validate(content), SCHEMA)
    assert isinstance(source, RequestRows)
    return source


def test_columns_are_mapped_and_labels_made(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", [ROWS[0] | {"request_id": 4}])
    source = opened(tmp_path)
    assert {unit.kind for unit in source.units()} == {"requests"}
    check_types(source.row_schema, SCHEMA, "requests")
    table = pa.concat_tables(read(source, unit) for unit in source.units())
    assert table.column_names == SCHEMA.columns
    assert table.column("clicked").to_pylist() == [[0, 1], [0, 0, 0], [0], [0, 1]]
    assert table.column("item_ids").to_pylist()[1] == ["b", "c", "d"]
    assert table.column("request_time").to_pylist() == [NOON] * 4
    assert source.disk_bytes() is None
    assert source.counts() == {}


def test_labels_may_be_columns_too(tmp_path: Path) -> None:
    table = write(tmp_path / "a.parquet")
    clicks = pa.array([[1, 0], [0, 1, None], [1]], pa.list_(pa.int64()))
    pq.write_table(table.append_column("clicks", clicks), tmp_path / "a.parquet")
    columns = {"request_time": "time", "item_ids": "items_in_view", "clicked": "clicks"}
    source = opened(tmp_path, columns=columns, labels_from={})
    assert read(source, source.units()[0]).column("clicked").to_pylist() == [[1, 0], [0, 1, None], [1]]


def test_a_positive_that_is_not_shown(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [*ROWS[:2], ROWS[2] | {"items_clicked": ["a"]}])  # shown, but in another request
    source = opened(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: 1 values of 'items_clicked' .*a of request request_id=3\)"):
        read(source, source.units()[0])


def test_sources_that_do_not_fit(tmp_path: Path) -> None:
    table = write(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"source\.columns: 'item' is no column that schema 'request_rows' reads"):
        opened(tmp_path, columns={"item": "items_in_view"})
    lists = {"impressions": "items_in_view", "positives": "items_clicked"}
    with pytest.raises(ConfigError, match=r"source\.labels_from: 'liked' is no label column"):
        opened(tmp_path, labels_from={"liked": lists})
    with pytest.raises(DataError, match=r"column 'time_of_day' of the schema is missing"):
        opened(tmp_path, columns={"request_time": "time_of_day", "item_ids": "items_in_view"})
    with pytest.raises(DataError, match=r"column 'age' has type double, and source\.labels_from needs a list"):
        opened(tmp_path, labels_from={"clicked": lists | {"positives": "age"}})
    pq.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"1 Parquet files without a single row"):
        opened(tmp_path)


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=6), max_size=6))
def test_labels_equal_membership(rows: list[list[tuple[int, bool]]]) -> None:
    shown = [[item for item, _ in row] for row in rows]
    positives = [[item for item, clicked in row if clicked] for row in rows]
    kind = pa.list_(pa.int32())
    labels = positives_to_labels(pa.array(shown, kind), pa.array(positives, kind), ("a", "b"), "f", str)
    expected = [[int(item in clicked) for item in row] for row, clicked in zip(shown, positives, strict=True)]
    assert labels.to_pylist() == expected
