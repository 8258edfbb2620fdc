"""EB-NeRD's adapter on small files in the publisher's format."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_ray.errors import DataError
from roo_ray.schema import load_schema
from roo_ray.sources.base import read
from roo_ray.sources.ebnerd import open_ebnerd

SCHEMA = load_schema(Path(__file__).parents[2] / "configs/schemas/ebnerd.yaml")
TIME = datetime.datetime(2023, 2, 27, 3, 0)
KINDS = {
    "impression_id": pa.uint32(),
    "user_id": pa.uint32(),
    "impression_time": pa.timestamp("us"),
    "is_sso_user": pa.bool_(),
    "is_subscriber": pa.bool_(),
    "device_type": pa.int8(),
    "gender": pa.int8(),
    "session_id": pa.uint32(),
    "age": pa.int8(),
    "postcode": pa.int8(),
    "article_id": pa.int32(),
    "read_time": pa.float32(),
    "scroll_percentage": pa.float32(),
    "next_read_time": pa.float32(),
    "next_scroll_percentage": pa.float32(),
    "article_ids_inview": pa.large_list(pa.int32()),
    "article_ids_clicked": pa.large_list(pa.int32()),
}


def write_files(folder: Path, clicked: list[list[int]], history_users: list[int]) -> None:
    """Three requests of users 1, 2, 1 and a history row for each of ``history_users``."""
    values: dict[str, Any] = {name: [None] * 3 for name in KINDS}
    values |= {"impression_id": [7, 0, 0], "user_id": [1, 2, 1], "impression_time": [TIME] * 3}
    values |= {"article_ids_inview": [[10, 11, 12], [11], [12, 10]], "article_ids_clicked": clicked}
    pq.write_table(
        pa.table({name: pa.array(values[name], kind) for name, kind in KINDS.items()}), folder / "behaviors.parquet"
    )
    count = len(history_users)
    history = {
        "user_id": pa.array(history_users, pa.uint32()),
        "impression_time_fixed": pa.array([[TIME] * 2] * count, pa.large_list(pa.timestamp("us"))),
        "scroll_percentage_fixed": pa.array([[1.0, None]] * count, pa.large_list(pa.float32())),
        "article_id_fixed": pa.array([[u, u + 1] for u in history_users], pa.large_list(pa.int32())),
        "read_time_fixed": pa.array([[3.0, 4.0]] * count, pa.large_list(pa.float32())),
    }
    pq.write_table(pa.table(history), folder / "history.parquet")


def test_labels_and_histories_are_joined(tmp_path: Path) -> None:
    write_files(tmp_path, [[11], [11], [10, 12]], [1, 3])
    source = open_ebnerd(str(tmp_path), SCHEMA)
    (unit,) = source.units()
    table = read(source, unit)
    assert unit.kind == "requests"
    assert sorted(table.column_names) == sorted(SCHEMA.columns)
    assert table.column("article_id_inview").to_pylist() == [[10, 11, 12], [11], [12, 10]]
    assert table.column("clicked").to_pylist() == [[0, 1, 0], [1], [1, 1]]
    assert table.column("article_id_fixed").to_pylist() == [[1, 2], [], [1, 2]]
    with pytest.raises(DataError, match="none of the 3 requests has a history"):
        source.verify({"requests": 3, "empty_histories": 3})
    source.verify({"requests": 3, "empty_histories": 1})


def test_a_click_out_of_view_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, [[11], [12], []], [1])
    source = open_ebnerd(str(tmp_path), SCHEMA)
    with pytest.raises(DataError, match=r"behaviors\.parquet: 1 clicked articles are not in view.*article 12, user 2"):
        read(source, source.units()[0])


def test_a_user_with_two_histories_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, [[], [], []], [1, 1])
    source = open_ebnerd(str(tmp_path), SCHEMA)
    with pytest.raises(DataError, match=r"history\.parquet: 1 rows repeat a user_id"):
        read(source, source.units()[0])


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"behaviors\.parquet.*source\.path must be the folder"):
        open_ebnerd(str(tmp_path), SCHEMA)
    write_files(tmp_path, [[], [], []], [1])
    table = pq.read_table(tmp_path / "behaviors.parquet").drop_columns(["gender"])
    pq.write_table(table, tmp_path / "behaviors.parquet")
    with pytest.raises(DataError, match=r"behaviors\.parquet: column 'gender' of the schema is missing"):
        open_ebnerd(str(tmp_path), SCHEMA)
