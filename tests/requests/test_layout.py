"""What a build makes of skew, of several logs, of a killed worker, and on an object store."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from roo_ray.config import Build, Config
from roo_ray.errors import DataError
from roo_ray.ingest.read import UnitReader
from roo_ray.ingest.units import units_of
from roo_ray.requests import join
from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.join import build_requests
from roo_ray.requests.manifest import Manifest, load_manifest, publish_manifest
from roo_ray.requests.shards import read_row_group
from roo_ray.source_config import ImpressionSource
from roo_ray.sources.impressions import open_impressions
from tests.requests.sources import KillsWorker, TwoLogs
from tests.requests.tables import TYPES, Row, canonical, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()
pytestmark = pytest.mark.usefixtures("local_ray")


def config(folder: Path, requests: str | None = None, **build: Any) -> Config:
    source = ImpressionSource(kind="impressions", path=[str(folder / "log")])
    data_set = requests or str(folder / "requests")
    return Config(name="t", schema=SCHEMA, source=source, requests=data_set, build=Build(**build))


def build(settings: Config) -> Manifest:
    return build_requests(settings, lambda line: None)


def write_log(folder: Path, table: pa.Table, files: int = 3) -> None:
    (folder / "log").mkdir(exist_ok=True)
    for number in range(files):
        part = table.take(pa.array(np.arange(number, table.num_rows, files)))
        pq.write_table(part, folder / "log" / f"part-{number}.parquet", row_group_size=max(part.num_rows // 2, 1))


def read_all(data_set: str, manifest: Manifest) -> pa.Table:
    units = [(file.path, unit) for file in manifest.files for unit in range(len(file.units))]
    return pa.concat_tables(read_row_group(data_set, *unit) for unit in units)


def log_rows(requests: int) -> list[Row]:
    rows = [impression_row(request_row(n), item) for n in range(requests) for item in range(1 + n % 5)]
    random.Random(1).shuffle(rows)
    return rows


def skewed_log() -> pa.Table:
    """One request with 20,000 impressions and a history, and a user with 30 % of 3,000 other requests."""
    rng = np.random.default_rng(0)
    requests = 3000
    sizes = np.append(rng.integers(1, 4, requests), 20_000)
    row = np.repeat(np.arange(requests + 1), sizes)
    item = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    base = table_of([impression_row(request_row(3), 0)]).to_pylist()[0]
    user = np.where(rng.random(requests + 1) < 0.3, 0, rng.integers(1, 500, requests + 1))
    columns: dict[str, Any] = {name: pa.array([value], TYPES.field(name).type).take(pa.array(np.zeros(len(row), int)))
                               for name, value in base.items()}  # fmt: skip
    columns["shard"] = row.astype(np.int64)
    columns["user"] = user[row].astype(np.int32)
    columns["time"] = pa.array((1_677_499_200 + (row % 3) * 40_000) * 10**6, pa.timestamp("us"))
    columns["item"] = (item % 50).astype(np.int32)
    columns["position"] = (item % 30_000).astype(np.int16)
    schema_table = pa.table(columns).cast(TYPES)
    return schema_table.take(pa.array(rng.permutation(len(row))))


def test_skew_is_cut_and_bytes_are_the_same_twice(tmp_path: Path) -> None:
    schema = small_schema(lambda text: text.replace("impression: item, ", ""))
    table = skewed_log()
    write_log(tmp_path, table)
    options = {"bucket_bytes": 200_000, "file_bytes": 20_000, "row_group_requests": 100, "row_group_impressions": 500}
    settings = config(tmp_path, **options).model_copy(update={"request_schema": schema})
    first, second = build(settings), build(settings)
    assert (first.requests, first.impressions) == (3001, table.num_rows)
    assert len(first.days) == 2
    assert len({(file.day, file.shard) for file in first.files}) > 6
    assert all(file.bytes < 3 * 20_000 or len(file.units) == 1 for file in first.files)
    units = [unit for file in first.files for unit in file.units]
    assert max(unit.impressions for unit in units) == 20_000
    assert all(unit.impressions <= 500 or unit.requests == 1 for unit in units)
    stored = read_all(settings.requests, first)
    exploded = explode_requests(stored, schema).select(schema.columns)
    assert exploded.sort_by([("shard", "ascending"), ("position", "ascending")]).equals(
        table.select(schema.columns).sort_by([("shard", "ascending"), ("position", "ascending")]).combine_chunks()
    )
    heavy = [
        f
        for f in first.files
        if 0 in pq.read_table(Path(settings.requests) / f.path, columns=["user"])["user"].to_pylist()
    ]
    assert len({(file.day, file.shard) for file in heavy}) > 3
    for one, other in zip(first.files, second.files, strict=True):
        assert one.model_copy(update={"path": other.path}) == other  # digests of the bytes among them
        assert one.digest


def test_order_by_time(tmp_path: Path) -> None:
    write_log(tmp_path, table_of(log_rows(50)))
    manifest = build(config(tmp_path, order="time", row_group_requests=3))
    for file in manifest.files:
        rows = pq.read_table(tmp_path / "requests" / file.path).to_pylist()
        assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_a_key_with_two_users_or_days_is_found_over_all_buckets(tmp_path: Path) -> None:
    rows = log_rows(40)
    twice = request_row(7, user=4, time=request_row(7)["time"].replace(year=2024))
    write_log(tmp_path, table_of([*rows, impression_row(twice, 30)]))
    message = (
        r"^the request key names several requests: 1 keys have different users or times \(first: rid=r7, shard=1: "
    )
    with pytest.raises(DataError, match=message):
        build(config(tmp_path, buckets=4))
    assert list((tmp_path / "requests").iterdir()) == []


def two_logs(rows: list[Row]) -> TwoLogs:
    table = table_of(rows).select(SCHEMA.columns)
    requests = pa.Table.from_pylist(list({r["rid"]: r for r in rows}.values()), TYPES).select(SCHEMA.request_columns)
    stray = table_of([impression_row(request_row(n), 1, rid=f"lost{n}") for n in range(3)])
    own = ["rid", "shard", *SCHEMA.impression_columns]
    impressions = pa.concat_tables([table.select(own), stray.select(own)])
    return TwoLogs(table.schema, {"requests": requests, "impressions": impressions}, ("rid", "shard"))


def test_logs_that_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = log_rows(60)
    source = two_logs(rows)
    monkeypatch.setattr(join, "open_source", lambda *rest: source)
    settings = config(tmp_path, bucket_bytes=4000)
    first = build(settings)
    assert canonical(explode_requests(read_all(settings.requests, first), SCHEMA)) == canonical(
        table_of(rows).select(SCHEMA.columns)
    )
    kept = first.aside["impressions_without_request"]
    assert (kept.rows, first.counts["impressions_without_request"]) == (3, 3)
    aside = pa.concat_tables(pq.read_table(tmp_path / "requests" / path) for path in kept.files)
    assert sorted(aside["rid"].to_pylist()) == ["lost0", "lost1", "lost2"]
    assert all(path.startswith("aside/v000001/impressions_without_request/part-") for path in kept.files)
    listed = first.counts["rows_read.requests"] + first.counts["rows_read.impressions"]
    assert listed == first.counts["rows_read"] == 60 + len(rows) + 3
    second = build(settings.model_copy(update={"build": Build(bucket_bytes=4000, keep_aside=False)}))
    assert second.aside["impressions_without_request"].files == []
    assert [file.digest for file in second.files] == [file.digest for file in first.files]
    assert not (tmp_path / "requests" / "aside" / "v000002").exists()


def test_a_killed_worker_does_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, table_of(log_rows(60)))
    settings = config(tmp_path, buckets=3)
    whole = build(settings)
    log = open_impressions([str(tmp_path / "log")], SCHEMA)
    source = KillsWorker.of(log, tmp_path / "killed")
    monkeypatch.setattr(join, "open_source", lambda *rest: source)
    again = build(settings)
    assert (tmp_path / "killed").exists()
    assert [file.digest for file in again.files] == [file.digest for file in whole.files]
    assert again.counts == whole.counts


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A URI of a bucket on an S3 server on loopback, as pyarrow takes it."""
    server_module = pytest.importorskip("moto.server", reason="moto's server is not installed")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        client = boto3.client(
            "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
            aws_access_key_id="test", aws_secret_access_key="test",
        )  # fmt: skip
        client.create_bucket(Bucket="shards")
        yield f"s3://test:test@shards/sets/one?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    finally:
        server.stop()


def objects(uri: str) -> list[str]:
    filesystem, base = pafs.FileSystem.from_uri(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    return sorted(info.path[len(base) + 1 :] for info in infos if info.type == pafs.FileType.File)


def test_an_object_store(bucket: str, tmp_path: Path) -> None:
    rows = log_rows(40)
    write_log(tmp_path, table_of(rows))
    settings = config(tmp_path, requests=bucket, buckets=2, row_group_requests=4)
    first = build(settings)
    assert load_manifest(bucket) == first
    assert objects(bucket) == sorted(["_manifests/v000001.json", *(file.path for file in first.files)])
    assert canonical(explode_requests(read_all(bucket, first), SCHEMA)) == canonical(
        table_of(rows).select(SCHEMA.columns)
    )
    local = build(config(tmp_path, buckets=2, row_group_requests=4))
    assert [file.digest for file in local.files] == [file.digest for file in first.files]
    with pytest.raises(DataError, match="version 1 was published by another writer"):
        publish_manifest(bucket, first)

    rows[3]["click"] = 5
    write_log(tmp_path, table_of(rows))
    before = objects(bucket)
    with pytest.raises(DataError, match="are neither 0 nor 1"):
        build(settings)
    assert objects(bucket) == before
    assert load_manifest(bucket) == first
    reader = UnitReader(bucket, [*SCHEMA.columns, "num_impressions"])
    units = units_of(first.files)
    read = pa.concat_tables(reader.read(units.ref(number)) for number in range(len(units.file)))
    assert canonical(read) == canonical(read_all(bucket, first))
