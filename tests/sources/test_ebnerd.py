"""EB-NeRD: made files against a row-by-row reference, the real files, and every way they can disagree."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_ray.errors import DataError
from roo_ray.schema import Schema, load_schema, parse_schema
from roo_ray.sources.base import read
from roo_ray.sources.ebnerd import open_ebnerd

ROOT = Path(__file__).parents[2]
NOON = datetime.datetime(2023, 2, 27, 12)
LARGE = pa.large_list(pa.int32())
SCHEMA = parse_schema(
    "{name: e, keys: {request: [impression_id, user_id], user: user_id, time: impression_time, "
    "impression: article_id_inview}, tables: {a: {rows: 99, dim: 1, hash: true}}, features: ["
    "{name: h, level: request, kind: sequence, max_length: 9, time: impression_time_fixed, "
    "sequence: [{column: article_id_fixed, table: a}]}, "
    "{name: a, level: impression, kind: ids, columns: article_id_inview, table: a}], "
    "labels: [{name: click, column: clicked}]}"
)

BEHAVIORS = [
    {"impression_id": 0, "user_id": 7, "article_ids_inview": [5, 6, 9], "article_ids_clicked": [9]},
    {"impression_id": 0, "user_id": 8, "article_ids_inview": [9, 5], "article_ids_clicked": []},
    {"impression_id": 1, "user_id": 404, "article_ids_inview": [9], "article_ids_clicked": [9]},
    {"impression_id": 2, "user_id": 7, "article_ids_inview": [1, 2, 3], "article_ids_clicked": [1, 3]},
]
HISTORY = {8: [3], 7: [1, 2, 4], 9: []}


def write(folder: Path, behaviors: list[dict[str, Any]], history: dict[int, list[int]]) -> str:
    types = pa.schema(
        [
            ("impression_id", pa.uint32()),
            ("user_id", pa.uint32()),
            ("article_ids_inview", LARGE),
            ("article_ids_clicked", LARGE),
            ("impression_time", pa.timestamp("us")),
        ]
    )
    rows = [row | {"impression_time": NOON} for row in behaviors]
    pq.write_table(pa.Table.from_pylist(rows, types), folder / "behaviors.parquet", row_group_size=3)
    events = [[NOON - datetime.timedelta(days=9 - i) for i in range(len(v))] for v in history.values()]
    table = pa.table(
        {
            "user_id": pa.array(list(history), pa.uint32()),
            "article_id_fixed": pa.array(list(history.values()), LARGE),
            "impression_time_fixed": pa.array(events, pa.large_list(pa.timestamp("us"))),
        }
    )
    pq.write_table(table, folder / "history.parquet", row_group_size=2)
    return str(folder)


def request_rows(folder: str, schema: Schema = SCHEMA) -> pa.Table:
    source = open_ebnerd(folder, schema)
    return pa.concat_tables(read(source, unit) for unit in source.units())


def test_requests_with_labels_and_histories(tmp_path: Path) -> None:
    source = open_ebnerd(write(tmp_path, BEHAVIORS, HISTORY), SCHEMA)
    assert source.counts() == {"requests_without_history": 1}
    assert source.disk_bytes() is None
    assert {unit.kind for unit in source.units()} == {"requests"}
    table = request_rows(str(tmp_path))
    assert table.column_names == SCHEMA.columns
    assert table.schema.field("article_id_inview").type == pa.list_(pa.int32())
    assert table.column("clicked").to_pylist() == [[0, 0, 1], [0, 0], [1], [1, 0, 1]]
    for row, behavior in zip(table.to_pylist(), BEHAVIORS, strict=True):
        assert row["article_id_inview"] == behavior["article_ids_inview"]
        assert row["article_id_fixed"] == HISTORY.get(behavior["user_id"], [])
        assert len(row["impression_time_fixed"]) == len(row["article_id_fixed"])
        assert row["user_id"] == behavior["user_id"]


def test_the_real_files(ebnerd_folder: Path) -> None:
    schema = load_schema(ROOT / "configs" / "schemas" / "ebnerd.yaml")
    table = request_rows(str(ebnerd_folder), schema)
    assert table.column_names == schema.columns
    rows = table.to_pylist()
    behaviors = pq.read_table(ebnerd_folder / "behaviors.parquet").to_pylist()
    histories = {row["user_id"]: row for row in pq.read_table(ebnerd_folder / "history.parquet").to_pylist()}
    assert len(rows) == len(behaviors) == 1046
    assert sum(len(row["clicked"]) for row in rows) == 10_848
    for row, behavior in zip(rows, behaviors, strict=True):
        assert row["article_id_inview"] == behavior["article_ids_inview"]
        clicked = set(behavior["article_ids_clicked"])
        assert row["clicked"] == [int(article in clicked) for article in behavior["article_ids_inview"]]
        assert row["read_time_fixed"] == histories[behavior["user_id"]]["read_time_fixed"]
        assert row["impression_time"] == behavior["impression_time"]


def test_user_ids_that_do_not_match_at_all(tmp_path: Path) -> None:
    folder = write(tmp_path, BEHAVIORS, {100 + user: events for user, events in HISTORY.items()})
    with pytest.raises(
        DataError, match=r"none of the 4 requests in .*has a history in .*user_id values .* do not match"
    ):
        open_ebnerd(folder, SCHEMA)


def test_a_user_with_two_histories(tmp_path: Path) -> None:
    folder = write(tmp_path, BEHAVIORS, HISTORY)
    table = pq.read_table(tmp_path / "history.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), tmp_path / "history.parquet")
    with pytest.raises(DataError, match=r"history\.parquet: 1 rows repeat a user_id"):
        open_ebnerd(folder, SCHEMA)


def test_a_click_that_is_not_in_view(tmp_path: Path) -> None:
    lost = [*BEHAVIORS[:3], BEHAVIORS[3] | {"article_ids_clicked": [1, 9]}]  # 9 is in view, but elsewhere
    folder = write(tmp_path, lost, HISTORY)
    with pytest.raises(DataError, match=r"1 values of 'article_ids_clicked' are not in .*9 of request user_id=7"):
        request_rows(folder)


def test_missing_files_and_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"behaviors\.parquet not found; source\.path must be the folder"):
        open_ebnerd(str(tmp_path), SCHEMA)
    folder = write(tmp_path, BEHAVIORS, HISTORY)
    behaviors = pq.read_table(tmp_path / "behaviors.parquet")
    pq.write_table(behaviors.drop_columns("article_ids_clicked"), tmp_path / "behaviors.parquet")
    with pytest.raises(DataError, match=r"behaviors\.parquet: column 'article_ids_clicked' .* is missing"):
        open_ebnerd(folder, SCHEMA)
    other = SCHEMA.model_copy(update={"carry": SCHEMA.carry.model_copy(update={"impression": ["rank"]})})
    write(tmp_path, BEHAVIORS, HISTORY)
    with pytest.raises(DataError, match=r"impression-level column 'rank' is not in EB-NeRD"):
        open_ebnerd(folder, Schema.model_validate(other.model_dump()))
    (tmp_path / "history.parquet").unlink()
    with pytest.raises(DataError, match=r"history\.parquet not found"):
        open_ebnerd(folder, SCHEMA)
