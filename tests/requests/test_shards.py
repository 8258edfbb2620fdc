"""Shards: one UTC day a file, ordered, the manifest's figures, the same bytes twice, and clear read errors."""

import datetime
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roo_ray.errors import DataError
from roo_ray.requests.grouping import explode_requests, group_impressions
from roo_ray.requests.manifest import ShardFile
from roo_ray.requests.shards import (
    Encodings,
    WriteOptions,
    choose_encodings,
    column_bytes,
    read_row_group,
    row_bytes,
    row_group_bounds,
    write_shards,
)
from tests.requests.tables import (
    canonical,
    impression_logs,
    impression_row,
    request_row,
    small_schema,
    table_of,
)

SCHEMA = small_schema()
OPTIONS = WriteOptions(row_group_requests=4, compression_level=3)


def requests_of(count: int) -> pa.Table:
    rows = [impression_row(request_row(n), item) for n in range(count) for item in range(1 + n % 4)]
    return group_impressions(table_of(rows), SCHEMA)


def write(table: pa.Table, folder: Path, version: int = 1, shard: int = 7) -> list[ShardFile]:
    return [file for file, _ in write_shards(table, SCHEMA, OPTIONS, str(folder), version, shard)]


def test_files_units_and_order(tmp_path: Path) -> None:
    requests = requests_of(40)
    files = write(requests, tmp_path)
    assert [file.path for file in files] == [f"data/v000001/day={file.day}/shard-00007-000.parquet" for file in files]
    on_disk = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert on_disk == [file.path for file in files]  # and no temporary file is left
    read = []
    for file in files:
        metadata = pq.read_metadata(tmp_path / file.path)
        assert metadata.num_row_groups == len(file.units)
        assert file.bytes == (tmp_path / file.path).stat().st_size
        rows = []
        for number, unit in enumerate(file.units):
            table = read_row_group(str(tmp_path), file.path, number)
            assert table.schema == requests.schema
            part = table.to_pylist()
            assert unit.requests == len(part) <= OPTIONS.row_group_requests
            assert unit.impressions == sum(row["num_impressions"] for row in part)
            assert unit.tokens == sum(len(row["h_item"]) for row in part)
            moments = [row["time"].replace(tzinfo=datetime.timezone.utc).timestamp() for row in part]
            assert (unit.time_min, unit.time_max) == (min(moments), max(moments))
            rows += part
        keys = [(row["user"], row["time"], row["rid"]) for row in rows]
        assert keys == sorted(keys)
        times = [row["time"].replace(tzinfo=datetime.timezone.utc) for row in rows]
        assert {str(time.date()) for time in times} == {file.day}
        assert (file.time_min, file.time_max) == (min(times).timestamp(), max(times).timestamp())
        totals = (file.requests, file.impressions, file.tokens)
        assert totals == tuple(np.sum([[u.requests, u.impressions, u.tokens] for u in file.units], axis=0))
        read.append(pq.ParquetFile(tmp_path / file.path).read())
    assert len(files) == 9  # 40 requests, 5 hours apart
    assert canonical(pa.concat_tables(read)) == canonical(requests)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=impression_logs())
def test_nothing_is_lost_on_disk(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    table = table_of(rows).select(SCHEMA.columns)
    files = write(group_impressions(table, SCHEMA), tmp_path)
    units = [(file.path, unit) for file in files for unit in range(len(file.units))]
    parts = [explode_requests(read_row_group(str(tmp_path), *unit), SCHEMA) for unit in units]
    assert canonical(pa.concat_tables([table.slice(0, 0), *parts])) == canonical(table)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    requests = requests_of(30)
    shuffled = requests.take(np.random.default_rng(0).permutation(requests.num_rows))
    first, second = write(requests, tmp_path), write(shuffled, tmp_path, version=2)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert (tmp_path / one.path).read_bytes() == (tmp_path / other.path).read_bytes()


def sizes_with(table: pa.Table, encodings: Encodings) -> dict[str, int]:
    stream = pa.BufferOutputStream()
    with WriteOptions(1024, 3).writer(stream, table.schema, encodings) as writer:
        writer.write_table(table)
    content = pa.BufferReader(stream.getvalue())
    assert pq.read_table(content).equals(table)
    return column_bytes(pq.read_metadata(content))


def test_encodings_where_they_help() -> None:
    rng = np.random.default_rng(0)
    few = rng.choice([10**15 + i * 7919**3 for i in range(50)], 1000)
    table = pa.table({"few": few, "many": rng.integers(0, 2**62, 1000), "word": [f"w{i}" for i in range(1000)]})
    offsets, values = pa.array(np.arange(0, 10_001, 10), pa.int32()), pa.array(rng.choice(few, 10_000))
    table = table.append_column("few_lists", pa.ListArray.from_arrays(offsets, values))
    dwell = pa.array(rng.gamma(2, 20, 10_000), pa.float32())
    table = table.append_column("dwell", pa.ListArray.from_arrays(offsets, dwell))
    chosen, total = choose_encodings(table, WriteOptions(1024, 3))
    assert chosen.dictionary == ("few", "few_lists.list.element")
    assert "dwell.list.element" in chosen.split
    assert not {"word", "few"} & set(chosen.split)
    plain, best = sizes_with(table, Encodings()), sizes_with(table, chosen)
    assert best["few_lists"] < 0.7 * plain["few_lists"]
    assert best["dwell"] < 0.95 * plain["dwell"]
    assert all(best[name] <= plain[name] for name in plain)
    assert total == sum(best.values())


def test_broken_shards_are_named(tmp_path: Path) -> None:
    path = write(requests_of(5), tmp_path)[0].path
    content = (tmp_path / path).read_bytes()
    (tmp_path / path).write_bytes(content[:-20])
    with pytest.raises(DataError, match=rf"shard .*{path} is truncated or damaged .*build the data set again"):
        read_row_group(str(tmp_path), path, 0)
    (tmp_path / path).unlink()
    with pytest.raises(DataError, match=rf"shard .*{path} is missing"):
        read_row_group(str(tmp_path), path, 0)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 500)), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 60),
    st.integers(1, 900),
)
def test_row_groups_end_at_the_first_limit(
    rows: list[tuple[int, int]], requests: int, impressions: int, size: int
) -> None:
    counts, sizes = np.array(rows).T
    options = WriteOptions(requests, 3, row_group_impressions=impressions, row_group_bytes=size)
    bounds = row_group_bounds(counts, sizes, options)
    assert (bounds[0], bounds[-1]) == (0, len(rows))

    def fits(begin: int, end: int) -> bool:
        within = counts[begin:end].sum() <= impressions and sizes[begin:end].sum() <= size
        return end - begin <= requests and bool(within)

    for begin, end in itertools.pairwise(bounds.tolist()):
        assert end > begin
        assert fits(begin, end) or end == begin + 1
        assert end == len(rows) or not fits(begin, end + 1)


def test_bytes_of_rows() -> None:
    nested = pa.array([[["ab", None], []], None, [["c"]]], pa.list_(pa.list_(pa.string())))
    assert row_bytes(nested).tolist() == [4 + (4 + 6 + 4) + 4, 4, 4 + 4 + 5]
    assert row_bytes(nested.slice(2)).tolist() == [13]
    assert row_bytes(pa.array([1, None], pa.int64())).tolist() == [8, 8]
    assert row_bytes(pa.array([True, False])).tolist() == [1, 1]
    pair = pa.StructArray.from_arrays([pa.array([1, 2], pa.int16()), pa.array(["", "x"])], ["a", "b"])
    assert row_bytes(pair).tolist() == [6, 7]


def test_files_are_split_by_size(tmp_path: Path) -> None:
    requests = requests_of(400)
    one_day = requests.set_column(
        requests.column_names.index("time"), "time", pa.array(np.arange(400) * 10**6, pa.timestamp("us"))
    )
    whole = write(one_day, tmp_path)
    assert [file.path for file in whole] == ["data/v000001/day=1970-01-01/shard-00007-000.parquet"]
    options = WriteOptions(4, 3, file_bytes=whole[0].bytes // 5)
    parts = [file for file, _ in write_shards(one_day, SCHEMA, options, str(tmp_path), 2, 1, first_part=3)]
    assert 3 <= len(parts) <= 8
    assert [file.path[-11:-8] for file in parts] == [f"{3 + number:03d}" for number in range(len(parts))]
    assert sum(file.requests for file in parts) == 400
    for file in parts:
        content = (tmp_path / file.path).read_bytes()
        assert (file.digest, file.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    read = pa.concat_tables(pq.ParquetFile(tmp_path / file.path).read() for file in parts)
    assert canonical(read) == canonical(one_day)
