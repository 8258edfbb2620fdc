"""Impression tables as they are: the same requests as a build forms, whatever the files' row groups are; refused
where a request does not lie in one piece."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import DataError
from roo_ray.ingest.clustered import index_impressions
from roo_ray.ingest.holdout import select_files
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import UnitRef, Window, units_of
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.ingest.tensors import PackedBatches
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


def pack_settings(folder: Path) -> PackSettings:
    return PackSettings(str(folder), SCHEMA, Holdout(by="request", fraction=1e-12), "train", 20)


def rows_of(folder: Path, manifest: Manifest, schema: Schema = SCHEMA) -> list[dict[str, Any]]:
    """What the batches of an indexed table hold, request by request, in stored order."""
    units = units_of(manifest.files)
    window = Window(0, 0, 0, tuple(units.ref(unit) for unit in range(len(units))), None)
    packed = PackedBatches(pack_window(pack_settings(folder), window), schema)
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
)
def test_requests_are_those_of_a_build(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], row_group: int, unit_requests: int
) -> None:
    folder = tmp_path_factory.mktemp("clustered")
    rows = impressions(sizes)
    write(folder / "log/a.parquet", rows, row_group)
    manifest = index_impressions(str(folder / "index"), [str(folder / "log")], SCHEMA, unit_requests=unit_requests)
    assert (manifest.requests, manifest.impressions) == (len(sizes), sum(sizes))
    starts = [unit.first_row for unit in manifest.files[0].units]
    assert starts == sorted(set(starts))
    assert all(unit.requests <= unit_requests for unit in manifest.files[0].units)
    got, expected = rows_of(folder / "index", manifest), by_build(folder / "built", rows)
    assert len(got) == len(expected) == len(sizes)
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
    with pytest.raises(DataError, match="column 'age' varies within request rid=r1"):
        rows_of(tmp_path / "index", manifest)


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


def test_files_of_mixed_days_cannot_be_held_out_by_day(tmp_path: Path) -> None:
    write(tmp_path / "log/a.parquet", impressions([2] * 20))
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], SCHEMA)
    with pytest.raises(DataError, match=r"a\.parquet holds requests of several days.*holdout\.by=request"):
        select_files(manifest, Holdout(), "train")
