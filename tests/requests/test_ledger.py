"""The ledger against arithmetic by hand, and its table and metrics."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from roo_ray.requests import ledger as ledger_module
from roo_ray.requests.grouping import explode_requests, group_impressions
from roo_ray.requests.ledger import (
    add_sizes,
    build_ledger,
    files_table,
    ledger_metrics,
    ledger_table,
    make_ledger,
    measure,
    measure_bucket,
    measure_requests,
    sorted_disk_bytes,
)
from roo_ray.requests.manifest import ShardFile, Unit
from roo_ray.requests.shards import WriteOptions
from tests.requests.tables import TYPES, impression_logs, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()
OPTIONS = WriteOptions(1024, 3)


def elements(value: Any) -> int:
    return sum(elements(item) for item in value) if isinstance(value, list) else 1


def elements_of(value: Any, kind: pa.DataType) -> int:
    return 0 if value is None and pa.types.is_list(kind) else elements(value)


@settings(max_examples=30, deadline=None)
@given(impression_logs())
def test_elements_against_counting_rows(rows: list[dict[str, object]]) -> None:
    """Impression level: what the exploded table holds; request level: what the request rows hold."""
    requests = group_impressions(table_of(rows), SCHEMA)
    sizes = measure_requests(requests, SCHEMA)
    exploded = explode_requests(requests, SCHEMA)
    for name in SCHEMA.columns:
        kind = TYPES.field(name).type
        logged = sum(elements_of(row[name], kind) for row in exploded.to_pylist())
        assert sizes[name]["elements"]["impression"] == logged
        whole = [measure(exploded.column(name).combine_chunks(), np.ones(exploded.num_rows, np.int64))]
        in_memory = sizes[name]["memory_bytes"]["impression"]
        assert (logged, in_memory) == whole[0]
        if name in SCHEMA.request_columns:
            stored = sum(elements_of(row[name], kind) for row in requests.to_pylist())
        else:
            stored = logged
        assert sizes[name]["elements"]["request"] == stored
    assert sizes["num_impressions"]["elements"] == {"impression": 0, "request": requests.num_rows}


def test_memory_bytes_by_hand() -> None:
    ones = np.ones(3, np.int64)
    assert measure(pa.array([1, 2, None], pa.int32()), ones) == (3, 12)
    assert measure(pa.array([1, 2, 3], pa.int64()), np.array([2, 0, 5])) == (7, 56)
    assert measure(pa.array(["ab", None, "c"]), np.array([3, 1, 1])) == (5, 3 * 2 + 1 + 5 * 4)
    lists = pa.array([[1, 2], None, [3]], pa.list_(pa.int16()))
    assert measure(lists, np.array([10, 1, 1])) == (21, 21 * 2 + 12 * 4)
    assert measure(pa.array([True] * 3), ones) == (3, 1)


def example() -> tuple[pa.Table, dict[str, Any]]:
    """4 requests with 5 impressions each, history of 3 events, disk bytes set by hand."""
    rows = [impression_row(request_row(n, **HISTORY), item) for n in range(4) for item in range(5)]
    requests = group_impressions(table_of(rows), SCHEMA)
    sizes = measure_requests(requests, SCHEMA)
    for kinds in sizes.values():
        kinds["disk_bytes"] = {"impression": 3000, "sorted": 2000, "request": 1000}
    sizes["num_impressions"]["disk_bytes"] = {"impression": 0, "request": 16}
    return requests, make_ledger(sizes, SCHEMA, "by hand")


HISTORY = {"h_item": [1, 2, 3], "h_dwell": [0.0] * 3, "h_time": [request_row(0)["time"].replace(year=2020)] * 3}


def test_ledger_table_and_metrics() -> None:
    _, ledger = example()
    history = ledger["columns"]["h_item"]
    assert history["level"] == "request"
    assert history["elements"] == {"impression": 60, "request": 12}
    assert history["memory_bytes"] == {"impression": 60 * 4 + 20 * 4, "request": 12 * 4 + 4 * 4}
    item = ledger["columns"]["item"]
    assert item["level"] == "impression"
    assert item["elements"] == {"impression": 20, "request": 20}
    assert item["memory_bytes"] == {"impression": 80, "request": 80 + 4 * 4}
    for kind in ("elements", "memory_bytes", "disk_bytes"):
        for side in ("impression", "request"):
            total = sum(column[kind][side] for column in ledger["columns"].values())
            assert ledger["totals"][kind][side] == total
    metrics = ledger_metrics(ledger)
    assert metrics["disk_bytes_impression_level"] == 3000 * 16
    assert metrics["disk_bytes_request_level"] == 1000 * 16 + 16
    assert metrics["dedup_ratio_disk_bytes"] == 48_000 / 16_016
    header, lines = ledger_table(ledger)
    assert {len(line) for line in lines} == {len(header)}
    assert lines[-1][0] == "total"
    by_name = {line[0]: line for line in lines}
    assert by_name["h_item"] == ["h_item", "RO", "60", "12", "5.00x", "3.0 kB", "2.0 kB", "1.0 kB", "3.00x", "2.00x"]
    assert by_name["num_impressions"][4:] == ["-", "0 B", "-", "16 B", "-", "-"]
    assert metrics["disk_bytes_impression_level_sorted"] == 2000 * 16
    assert ledger_metrics({}) == {}


def test_sizes_add_up() -> None:
    requests, _ = example()
    whole = measure_requests(requests, SCHEMA)
    halves = [measure_requests(requests.slice(0, 1), SCHEMA), measure_requests(requests.slice(1), SCHEMA)]
    summed = add_sizes(halves)
    assert {n: s["elements"] for n, s in summed.items()} == {n: s["elements"] for n, s in whole.items()}


def test_sorted_disk_bytes_are_those_of_the_written_table() -> None:
    requests, _ = example()
    sizes, part = sorted_disk_bytes(requests, SCHEMA, OPTIONS)
    assert part.num_rows == requests.num_rows
    stream = io.BytesIO()
    table = explode_requests(requests, SCHEMA)
    pq.write_table(table, stream, compression="zstd", compression_level=3)
    group = pq.read_metadata(stream).row_group(0)
    written: dict[str, int] = {}
    for leaf in range(group.num_columns):
        name = group.column(leaf).path_in_schema.split(".")[0]
        written[name] = written.get(name, 0) + group.column(leaf).total_compressed_size
    assert sizes == written


def log_of(requests: int) -> pa.Table:
    rows = [
        impression_row(request_row(n, **HISTORY), item, price=float(n * 31 % 97))
        for n in range(requests)
        for item in range(1 + n % 5)
    ]
    return group_impressions(table_of(rows), SCHEMA)


def test_a_sampled_ledger_is_near_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "SAMPLED_IMPRESSIONS", 400)
    parts = [log_of(300).slice(0, 150), log_of(300).slice(150)]
    ledgers = {}
    for mode in ("full", "sample", "off"):
        sizes = [measure_bucket(part, SCHEMA, OPTIONS, mode, n, 2) for n, part in enumerate(parts)]
        ledgers[mode] = build_ledger(SCHEMA, sizes, [], logged=None, codec="zstd", level=3)
    full, sampled, off = (ledgers[mode]["totals"]["disk_bytes"] for mode in ("full", "sample", "off"))
    assert full["sorted"] == full["impression"] > 0
    assert 0.8 < sampled["sorted"] / full["sorted"] < 1.25
    assert (off["sorted"], off["impression"]) == (0, 0)
    assert "written whole" in ledgers["full"]["how"]
    assert "% of all elements" in ledgers["sample"]["how"]
    assert "not measured (build.ledger: off)" in ledgers["off"]["how"]
    logged = build_ledger(SCHEMA, sizes, [], logged=dict.fromkeys(SCHEMA.columns, 7), codec="snappy", level=3)
    assert logged["totals"]["disk_bytes"]["impression"] == 7 * len(SCHEMA.columns)
    assert "(snappy)" in logged["how"]


def test_a_request_larger_than_the_sample_is_left_out_of_it() -> None:
    rows = [impression_row(request_row(0), item % 50, position=item) for item in range(500)]
    rows += [impression_row(request_row(n), 1) for n in (1, 2)]
    requests = group_impressions(table_of(rows), SCHEMA)
    assert sorted_disk_bytes(requests, SCHEMA, OPTIONS, 100)[1].column("rid").to_pylist() == ["r1", "r2"]
    sizes = measure_bucket(requests.slice(0, 1), SCHEMA, OPTIONS, "sample", 0, 1)
    assert build_ledger(SCHEMA, [sizes], [], None, "", 3)["columns"]["item"]["elements"]["request"] == 500


def test_files_table() -> None:
    def file(requests: int) -> ShardFile:
        unit = Unit(requests=requests, impressions=10 * requests, tokens=0)
        return ShardFile(
            path="p",
            day="2023-02-27",
            requests=requests,
            impressions=10 * requests,
            tokens=0,
            bytes=1000 * requests,
            time_min=0,
            time_max=1,
            units=[unit],
        )

    ledger = build_ledger(
        SCHEMA, [measure_bucket(log_of(5), SCHEMA, OPTIONS, "off", 0, 1)], [file(2), file(4)], None, "", 3
    )
    header, rows = files_table(ledger)
    assert header[0] == "2 files, 2 row groups"
    assert rows[0] == ["requests per file", "2", "3", "4"]
    assert rows[2] == ["bytes per file", "2.0 kB", "3.0 kB", "4.0 kB"]
    assert ledger_metrics(ledger)["requests_per_file"] == 3
