"""Reading what is damaged, replaced or wrong: one error that names file, column and request, or counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from roo_ray.errors import DataError
from roo_ray.ingest.pack import pack_window
from roo_ray.ingest.plan import Window
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.schema import parse_schema
from tests.ingest import shard_maker
from tests.ingest.test_pack import COUNTS, SCHEMA, pack_settings, window_of


def test_bad_shards_are_skipped_and_counted_where_that_is_wanted(tmp_path: Path) -> None:
    rows = shard_maker.random_rows(COUNTS[:40], 5)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    settings, window = replace(pack_settings(tmp_path), on_bad_shard="skip"), window_of(manifest)
    whole = PackedBatches(pack_window(settings, window), SCHEMA)
    assert sum(whole.counts["skipped_requests"]) == 0
    first, second = (tmp_path / file.path for file in manifest.files)
    first.write_bytes(first.read_bytes()[:500])
    packed = PackedBatches(pack_window(settings, window), SCHEMA)
    keys = [key for row in range(packed.rows) for key in packed.batch(row).request_key.tolist()]
    assert sorted(keys) == sorted(shard_maker.request_key(row, SCHEMA) for row in rows[20:])
    assert sum(packed.counts["skipped_requests"]) == 20
    second.unlink()
    nothing = PackedBatches(pack_window(settings, window), SCHEMA)
    assert (nothing.tags["batches"][0], nothing.counts["skipped_requests"][0]) == (0, 40)
    rows[0] |= {"bought": [9.0] * rows[0]["num_impressions"]}  # bad values are never skipped
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    with pytest.raises(DataError, match="labels are 0 or 1"):
        pack_window(settings, window_of(manifest))


def test_another_file_of_as_many_requests_is_noticed(tmp_path: Path) -> None:
    """By its size, which costs nothing, and where that is the same by its impressions and times: both columns are
    read anyway."""
    rows = shard_maker.random_rows(COUNTS[:40], 5)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    first, second = (tmp_path / file.path for file in manifest.files)
    settings, window = pack_settings(tmp_path), window_of(manifest)
    pack_window(settings, window)
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert len(kept) != second.stat().st_size
    with pytest.raises(
        DataError, match=rf"{second.name} has [\d,]+ bytes, the manifest says {len(kept):,}: .*or another"
    ):
        pack_window(settings, window)
    skipped = PackedBatches(pack_window(replace(settings, on_bad_shard="skip"), window), SCHEMA)
    assert sum(skipped.counts["skipped_requests"]) == 20

    def with_rows(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Window:
        """Other rows in the same file, under the size that it then has."""
        shard_maker.rewrite(second, [row | change(row) for row in rows[20:]])
        size = second.stat().st_size
        units = tuple(replace(u, file_bytes=size) if u.path.endswith(second.name) else u for u in window.units)
        return replace(window, units=units)

    pack_window(settings, with_rows(lambda row: {}))
    lists = ("num_impressions", *SCHEMA.impression_columns)
    other = {name: rows[0][name] for name in lists}
    with pytest.raises(DataError, match=rf"{second.name}, row group \d: \d+ impressions, the manifest says \d+; "):
        pack_window(settings, with_rows(lambda row: other if row is rows[23] else {}))
    later = with_rows(lambda row: {"request_time": row["request_time"] + timedelta(days=1)})
    with pytest.raises(
        DataError, match=rf"{second.name}, row group \d: requests of 2024-03-0\dT.*it is another file; "
    ):
        pack_window(settings, later)


def broken(row: dict[str, Any], column: str, value: Any, at: int | None = None) -> None:
    if at is None:
        row[column] = value
    else:
        row[column] = [*row[column][:at], value, *row[column][at + 1 :]]


@pytest.mark.parametrize(
    ("column", "value", "at", "words"),
    [
        ("topic_id", 12, 0, "column 'topic_id' has id 12, and table 'topic' has 12 rows"),
        ("history_topic", -1, 0, "column 'history_topic' has id -1, and table 'topic' has 12 rows"),
        ("history_item", None, 0, "column 'history_item' is null"),
        ("history_time", None, 0, "time column 'history_time' is null"),
        ("item_id", None, 0, "column 'item_id' is null"),
        ("is_subscriber", None, None, "column 'is_subscriber' is null or NaN"),
        ("activity", math.inf, None, "column 'activity' is inf"),
        ("bought", math.nan, 0, "label column 'bought' is NaN"),
        ("bought", 3.0, 0, "label column 'bought' is 3"),
        ("price", [1.0] * 30, None, "column 'price' has 30 values"),
        ("clicked", None, None, "column 'clicked' has 0 values"),
        ("history_dwell", [1.0] * 30, None, "must be aligned"),
        ("num_impressions", 0, None, "num_impressions"),
        ("request_time", None, None, "time column 'request_time' is null"),
    ],
)
def test_wrong_values_name_column_request_and_file(
    tmp_path: Path, column: str, value: Any, at: int | None, words: str
) -> None:
    rows = shard_maker.random_rows(COUNTS[:12], 5)
    bad = next(row for row in rows[5:] if 0 < len(row["history_item"] or []) <= 4)
    manifest_rows = [dict(row) for row in rows]
    target = manifest_rows[bad["request_id"]]
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    broken(target, column, value, at)
    path = tmp_path / manifest.files[0].path
    shard_maker.rewrite(path, manifest_rows)
    with pytest.raises(DataError) as error:
        pack_window(pack_settings(tmp_path), window_of(manifest, known=False))
    message = str(error.value)
    assert words in message
    assert f"request_id={bad['request_id']}" in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("columns: country_id, table: country, fill_id: 8->columns: user_id, table: country", "set hash: true"),
        ("columns: is_subscriber->columns: user_id", "must be numeric or boolean"),
        ("columns: item_id, table: item->columns: tag_ids, table: item", "give the feature a pooling"),
        ("columns: [price, rank]->columns: [item_age]", "has no column item_age"),
        ("history_score->age", "holds int32, and the schema needs a list"),
    ],
)
def test_a_schema_that_does_not_fit_the_data(tmp_path: Path, change: str, words: str) -> None:
    manifest = shard_maker.write_data_set(tmp_path, shard_maker.random_rows(COUNTS[:12], 5), SCHEMA)
    old, new = change.split("->")
    assert old in shard_maker.SCHEMA
    text = shard_maker.SCHEMA.replace(old, new).replace("columns: [age, activity]", "columns: [activity]")
    with pytest.raises(DataError) as error:
        pack_window(pack_settings(tmp_path, schema=parse_schema(text)), window_of(manifest))
    assert words in str(error.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    rows = shard_maker.random_rows(COUNTS[:40], 5)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    path = tmp_path / manifest.files[1].path
    window, settings = window_of(manifest), pack_settings(tmp_path)
    complete = path.read_bytes()

    def message() -> str:
        with pytest.raises(DataError) as error:
            pack_window(settings, window)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    path.write_bytes(complete[: len(complete) // 2])
    assert "truncated or damaged" in message()
    path.write_bytes(b"\0" * 100 + complete[100:1000] + b"\0" * 2000 + complete[3000:])
    assert "truncated or damaged" in message()
    shard_maker.rewrite(path, rows[:3])
    assert "the manifest says" in message()
    path.unlink()
    assert "is missing" in message()
