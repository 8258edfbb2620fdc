"""Impression tables as they are: the same requests as a build forms, whatever the files' row groups are; refused
where a request does not lie in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import DataError
from roo_ray.ingest import clustered
from roo_ray.ingest.clustered import index_impressions, unit_starts
from roo_ray.ingest.holdout import select_files
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Window, block_starts
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.ingest.units import UnitRef, units_of
from roo_ray.requests.grouping import group_impressions
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.schema import Schema
from tests.ingest.unpack import observed, same
from tests.requests.tables import impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()


def impressions(sizes: list[int], first: int = 0) -> list[dict[str, Any]]:
    """Rows of requests of so many impressions, one request after the other, positions not in order."""
    return [
        impression_row(request_row(first + r), n, position=(n * 7) % 5)
        for r, size in enumerate(sizes)
        for n in range(size)
    ]


def write(path: Path, rows: list[dict[str, Any]], row_group: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(rows), path, row_group_size=row_group)


def pack_settings(folder: Path, schema: Schema = SCHEMA) -> PackSettings:
    return PackSettings(str(folder), schema, Holdout(by="request", fraction=1e-12), "train", 20)


def rows_of(
    folder: Path, manifest: Manifest, schema: Schema = SCHEMA, order: list[int] | None = None
) -> list[dict[str, Any]]:
    """What the batches of an indexed table hold, request by request, its units in stored order or another one."""
    units = units_of(manifest.files)
    window = Window(0, 0, 0, tuple(units.ref(unit) for unit in order or range(len(units))), None)
    packed = PackedBatches(pack_window(pack_settings(folder, schema), window), schema)
    return [row for batch in range(packed.rows) for row in observed(packed.batch(batch))]


def by_build(folder: Path, rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The same from request shards, as a build writes them."""
    requests = group_impressions(table_of(rows), SCHEMA)
    path = folder / "shard.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(requests, path)
    window = Window(0, 0, 0, (UnitRef("shard.parquet", 0, requests.num_rows),), None)
    packed = PackedBatches(pack_window(pack_settings(folder), window), SCHEMA)
    return {row["request_key"]: row for batch in range(packed.rows) for row in observed(packed.batch(batch))}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=25),
    row_group=st.integers(1, 12),
    unit_requests=st.integers(1, 8),
    shuffled=st.randoms(),
)
def test_requests_are_those_of_a_build(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], row_group: int, unit_requests: int, shuffled: Any
) -> None:
    folder = tmp_path_factory.mktemp("clustered")
    rows = impressions(sizes)
    write(folder / "log/a.parquet", rows, row_group)
    manifest = index_impressions(str(folder / "index"), [str(folder / "log")], SCHEMA, unit_requests=unit_requests)
    assert (manifest.requests, manifest.impressions) == (len(sizes), sum(sizes))
    starts = [unit.first_row for unit in manifest.files[0].units]
    assert starts == sorted(set(starts))
    assert all(unit.requests <= unit_requests for unit in manifest.files[0].units)
    expected, order = by_build(folder / "built", rows), list(range(len(starts)))
    shuffled.shuffle(order)
    for got in (rows_of(folder / "index", manifest), rows_of(folder / "index", manifest, order=order)):
        assert len({row["request_key"] for row in got}) == len(got) == len(expected) == len(sizes)
        assert all(same(row, expected[row["request_key"]]) for row in got)


def test_a_table_clustered_by_session_has_its_requests_interleaved(tmp_path: Path) -> None:
    """The rows of a session lie together, those of its requests do not."""
    schema = small_schema()
    rows: list[dict[str, Any]] = []
    for session in range(6):
        of = [impression_row(request_row(10 * session + r, note=f"s{session}"), n) for n in range(4) for r in range(3)]
        rows += of
    write(tmp_path / "log/a.parquet", rows, 5)
    with pytest.raises(DataError, match=r"is not clustered by rid, shard: 18 of 18 requests \(100\.0%\)"):
        index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], schema)
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], schema, ["note"], unit_requests=4)
    assert manifest.requests == 18
    got, expected = rows_of(tmp_path / "index", manifest), by_build(tmp_path / "built", rows)
    assert len(got) == 18
    assert all(same(row, expected[row["request_key"]]) for row in got)


def test_a_table_that_is_not_clustered_is_refused_with_the_fraction_and_the_command(tmp_path: Path) -> None:
    rows = impressions([3] * 10)
    write(tmp_path / "log/a.parquet", [*rows[1:], rows[0]])
    write(tmp_path / "log/b.parquet", impressions([2], first=9))  # request 9 begins in the other file
    with pytest.raises(
        DataError, match=r"2 of 10 requests \(20\.0%\) lie in several places; .*python jobs/build_requests\.py --config"
    ):
        index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA)
    assert not (tmp_path / "index").exists()


def test_a_request_with_two_values_of_a_user_feature_is_refused(tmp_path: Path) -> None:
    rows = impressions([3, 3])
    rows[4] = rows[4] | {"age": 99.0}
    write(tmp_path / "log/a.parquet", rows)
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA)
    with pytest.raises(DataError, match=r"log/a\.parquet, rows 0 to 6: column 'age' varies within request rid=r1"):
        rows_of(tmp_path / "index", manifest)


@pytest.mark.parametrize("key", ["position", "no position", "position is a key", "two columns"])
def test_an_impression_that_comes_twice_is_refused_as_a_build_does(tmp_path: Path, key: str) -> None:
    """Also where the two stand at different positions, between others."""
    changes = {
        "position": lambda text: text,
        "no position": lambda text: text.replace(", position: position", ""),
        "position is a key": lambda text: text.replace("impression: item,", "impression: [item, position],"),
        "two columns": lambda text: text.replace("impression: item,", "impression: [item, slot],"),
    }
    schema = small_schema(changes[key])
    rows = impressions([3, 4, 2])
    at = rows[5]["position"] if key == "position is a key" else 9
    rows.insert(6, rows[4] | {"item": rows[5]["item"], "position": at, "click": 1})
    write(tmp_path / "log/a.parquet", rows)
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], schema)
    with pytest.raises(
        DataError,
        match=r"log/a\.parquet, rows 0 to 10: 1 impressions repeat .*: item=2(, \w+=\w+)? in request rid=r1, shard=1; "
        r".*build\.on_duplicate_impression",
    ):
        rows_of(tmp_path / "index", manifest, schema)
    rows[6] |= {"item": 40}
    write(tmp_path / "log/a.parquet", rows)
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], schema)
    assert len(rows_of(tmp_path / "index", manifest, schema)) == 3


def test_the_stream_of_an_impression_table(tmp_path: Path) -> None:
    """Through the plan and the lanes, with a day held out; and one clear error where a file is lost."""
    for day in range(3):
        write(tmp_path / f"log/{day}.parquet", impressions([1 + n % 4 for n in range(4)], first=[0, 3, 8][day]))
    index = str(tmp_path / "index")
    with pytest.raises(DataError, match="lie in several places"):
        index_impressions(index, [str(tmp_path / "log")], SCHEMA)  # request 3 is in two files
    write(tmp_path / "log/0.parquet", impressions([2, 3, 1]))
    index_impressions(index, [str(tmp_path / "log")], SCHEMA, unit_requests=2)
    ingest = Ingest(lanes=2, batch_impressions=6, window_units=1, reader="thread")
    how = StreamSettings(index, 1, SCHEMA, ingest, Holdout(by="request", fraction=0.2), "train", 0, (0,), "shuffled")
    seen: list[int] = []
    for side in ("train", "evaluation"):
        for step in RankStream(replace(how, side=side), 0, 1).epoch(0):  # type: ignore[arg-type]
            if not step.lanes_alive:
                break
            seen += step.batch.request_key.tolist()
    assert len(seen) == len(set(seen)) == load_manifest(index).requests == 11
    (tmp_path / "log/1.parquet").unlink()
    with pytest.raises(DataError, match=r"1\.parquet is missing; .*jobs/index_impressions\.py"):
        list(islice(RankStream(how, 0, 1).epoch(0), 20))


def test_a_wrong_value_is_named_with_the_file_that_has_it(tmp_path: Path) -> None:
    """By the path of the log, which lies nowhere below the index."""
    rows = impressions([3, 2])
    rows[4] |= {"click": 3}
    write(tmp_path / "log/a.parquet", rows)
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA)
    with pytest.raises(DataError, match=rf"'click' is 3.* in request rid=r1, shard=1 of {tmp_path}/log/a\.parquet"):
        rows_of(tmp_path / "index", manifest)


def test_files_of_mixed_days_cannot_be_held_out_by_day(tmp_path: Path) -> None:
    write(tmp_path / "log/a.parquet", impressions([2] * 20))
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA)
    with pytest.raises(DataError, match=r"a\.parquet holds requests of several days.*holdout\.by=request"):
        select_files(manifest, Holdout(), "train")


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(1, 12),
)
@settings(max_examples=80, deadline=None)
def test_units_keep_row_groups_whole_where_they_fit(runs: list[tuple[int, int]], most: int) -> None:
    """Runs of so many requests, each so many row groups behind the one before."""
    requests, groups = np.array([size for size, _ in runs]), np.cumsum([0, *[step for _, step in runs[1:]]])
    opens, shared = unit_starts(requests, groups, most)
    assert opens[0]
    unit = np.cumsum(opens) - 1
    sizes = np.bincount(unit, requests)
    of_group = np.bincount(groups, requests)
    for number in range(len(sizes)):
        mine = unit == number
        assert sizes[number] <= most - 1 + requests[mine].max()
        assert sizes[number] <= most or len(set(groups[mine])) == 1
        if len(set(groups[mine])) > 1:  # whole ones alone
            assert sizes[number] == of_group[sorted(set(groups[mine]))].sum()
    for group in np.unique(groups):
        units = set(unit[groups == group])
        assert len(units) <= -(-of_group[group] // most)
        assert set(shared[groups == group]) == ({group} if of_group[group] > most else {-1})


def counted_decodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(row group, rows decoded of it) of each decoding from now on."""
    decodes: list[tuple[int, int]] = []
    real = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, rows: int, groups: list[int], columns: list[str], **how: Any) -> Iterator[Any]:
        decodes.append((groups[0], 0))
        at = len(decodes) - 1
        for batch in real(self, rows, groups, columns, **how):
            decodes[at] = (groups[0], decodes[at][1] + batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    return decodes


def test_the_units_of_a_row_group_share_its_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are of neighbours: each decodes a row group once, up to what it needs of it, in bounded pieces."""
    monkeypatch.setattr(clustered, "BATCH_ROWS", 10)
    write(tmp_path / "log/a.parquet", impressions([2] * 100), 120)  # row groups of 60 and 40 requests
    index = str(tmp_path / "index")
    manifest = index_impressions(index, [str(tmp_path / "log")], SCHEMA, unit_requests=8)
    assert [unit.row_group for unit in manifest.files[0].units] == [0] * 8 + [1] * 5
    units = units_of(manifest.files)
    assert np.diff(block_starts(units, 4)).tolist() == [4, 4, 3, 2]
    ingest = Ingest(lanes=2, batch_impressions=20, window_units=4, reader="thread")
    holdout = Holdout(by="request", fraction=0.05)
    how = StreamSettings(index, 1, SCHEMA, ingest, holdout, "train", 3, (0, 1), "shuffled")
    decodes = counted_decodes(monkeypatch)
    stream, orders = RankStream(how, 0, 1), []
    for epoch in (0, 1):
        steps = takewhile(lambda step: step.lanes_alive, stream.epoch(epoch))
        orders.append([key for step in steps for key in step.batch.request_key.tolist()])
        assert len(orders[-1]) == len(set(orders[-1])) > 80
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    # each of the four windows of an epoch once, the first of a row group about half of it; and once to see whether so
    # little data leaves a side of the holdout empty
    rows = [[n for group, n in decodes if group == of] for of in (0, 1)]
    assert sorted(rows[0]) == [60, 60, 120, 120, 120]
    assert sorted(rows[1]) == [50, 50, 80, 80, 80]


def test_a_log_that_was_written_anew_is_noticed(tmp_path: Path) -> None:
    rows = impressions([3] * 10)
    write(tmp_path / "log/a.parquet", rows)
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA)
    write(tmp_path / "log/a.parquet", [row | {"note": "x" * 900} for row in rows])
    with pytest.raises(DataError, match=r"a\.parquet has [\d,]+ bytes of data, .* another file; index it again"):
        rows_of(tmp_path / "index", manifest)


def stored_as(rows: list[dict[str, Any]], column: str, dictionary: bool) -> pa.Table:
    """The rows with a column of another way of storing it."""
    table = table_of(rows)
    values = table.column(column).combine_chunks()
    if dictionary:
        values = values.dictionary_encode()
    elif pa.types.is_string(values.type):
        values = values.cast(pa.large_string())
    elif pa.types.is_list(values.type):
        values = values.cast(pa.large_list(values.type.value_type))
    return table.set_column(table.column_names.index(column), column, values)


@pytest.mark.parametrize("column", ["rid", "user", "item", "h_item"])
def test_a_column_may_be_stored_one_way_in_one_file_and_another_way_in_another(tmp_path: Path, column: str) -> None:
    """As a dictionary, or with large offsets."""
    rows = [impressions([3, 2, 4], first) for first in (0, 3, 6)]
    (tmp_path / "log").mkdir()
    for name, of in zip("abc", rows, strict=True):
        table = stored_as(of, column, name == "b" and column != "h_item") if name != "a" else table_of(of)
        pq.write_table(table, tmp_path / f"log/{name}.parquet")
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA, unit_requests=2)
    got, expected = (
        rows_of(tmp_path / "index", manifest),
        by_build(tmp_path / "built", [row for of in rows for row in of]),
    )
    assert len(got) == len(expected) == 9
    assert all(same(row, expected[row["request_key"]]) for row in got)


def test_a_request_of_two_files_is_found_however_they_store_its_key(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for name, dictionary in (("a", False), ("b", True)):
        pq.write_table(stored_as(impressions([3, 2]), "rid", dictionary), tmp_path / f"log/{name}.parquet")
    with pytest.raises(DataError, match="2 of 2 requests"):
        index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA)


SEQUENCE = ["h_item", "h_dwell", "h_time"]


@pytest.mark.parametrize(
    "columns", [SEQUENCE, ["h_dwell"], ["tags"], ["words"], ["age"], ["price"], ["click"], ["position"]], ids=str
)
def test_a_column_without_a_value_has_no_type_in_a_file(tmp_path: Path, columns: list[str]) -> None:
    """As some writers have it; alone in a window, first or last in it, and first or last of the files."""
    without: dict[str, Any] = dict.fromkeys(columns)
    if columns == ["h_dwell"]:  # unknown of all events is not a history without events
        without = dict.fromkeys(SEQUENCE)
    bare = [row | without for row in impressions([3, 2], 3)]
    rows = {"a": impressions([2, 4, 1]), "b": bare, "c": impressions([3, 1], 5)}
    (tmp_path / "log").mkdir()
    for name, of in rows.items():
        table = table_of(of)
        if name == "b":
            for column in columns:
                table = table.set_column(table.column_names.index(column), column, pa.nulls(len(of)))
        pq.write_table(table, tmp_path / f"log/{name}.parquet")
    for paths in (["log"], ["log/b.parquet"], ["log/b.parquet", "log/a.parquet"], ["log/c.parquet", "log/b.parquet"]):
        index = str(tmp_path / f"index {paths}")
        names = "abc" if paths == ["log"] else [path[4] for path in paths]
        expected = by_build(tmp_path / "built", [row for name in names for row in rows[name]])
        manifest = index_impressions(index, [str(tmp_path / path) for path in paths], SCHEMA, unit_requests=2)
        units = range(len(units_of(manifest.files)))
        for order in (list(units), [*reversed(units)], *([unit] for unit in units)):
            got = rows_of(Path(index), manifest, order=order)
            assert len(order) == 1 or len(got) == len(expected)
            assert all(same(row, expected[row["request_key"]]) for row in got)
