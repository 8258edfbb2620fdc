"""The ledger against arithmetic by hand, and its table and metrics."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings

from roo_ray.requests.grouping import explode_requests, group_impressions
from roo_ray.requests.ledger import (
    add_sizes,
    exploded_disk_bytes,
    ledger_metrics,
    ledger_table,
    make_ledger,
    measure,
    measure_requests,
)
from roo_ray.requests.shards import WriteOptions
from tests.requests.tables import TYPES, impression_logs, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()


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
        kinds["disk_bytes"] = {"impression": 3000, "request": 1000}
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
    assert by_name["h_item"] == ["h_item", "RO", "60", "12", "5.00x", "3.0 kB", "1.0 kB", "3.00x", "5.00x"]
    assert by_name["num_impressions"][4:] == ["-", "0 B", "16 B", "-", "-"]
    assert ledger_metrics({}) == {}


def test_sizes_add_up() -> None:
    requests, _ = example()
    whole = measure_requests(requests, SCHEMA)
    halves = [measure_requests(requests.slice(0, 1), SCHEMA), measure_requests(requests.slice(1), SCHEMA)]
    summed = add_sizes(halves)
    assert {n: s["elements"] for n, s in summed.items()} == {n: s["elements"] for n, s in whole.items()}


def test_exploded_disk_bytes_are_those_of_the_written_table() -> None:
    requests, _ = example()
    sizes = exploded_disk_bytes(requests, SCHEMA, WriteOptions(1024, 3))
    stream = io.BytesIO()
    table = explode_requests(requests, SCHEMA)
    pq.write_table(table, stream, compression="zstd", compression_level=3)
    group = pq.read_metadata(stream).row_group(0)
    written: dict[str, int] = {}
    for leaf in range(group.num_columns):
        name = group.column(leaf).path_in_schema.split(".")[0]
        written[name] = written.get(name, 0) + group.column(leaf).total_compressed_size
    assert sizes == written
