"""Versions: one writer commits, readers see one version or another, on local disks and on an object store."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from roo_ray.config import Build
from roo_ray.errors import DataError
from roo_ray.requests import alive, claims
from roo_ray.requests.alive import at_work, belongs_to, writers_at_work
from roo_ray.requests.forget import forget_users
from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.manifest import (
    Manifest,
    Origin,
    Tombstone,
    load_manifest,
    manifest_versions,
    publish_manifest,
    read_version,
)
from roo_ray.requests.shards import version_folder
from roo_ray.requests.versions import only_writer, remove_orphans, staging_folder
from roo_ray.storage import open_filesystem
from tests.requests.data_sets import files_below, publish, read_all
from tests.requests.tables import canonical, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()
ROWS = [impression_row(request_row(n), item) for n in range(12) for item in range(1 + n % 3)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """``s3://key:secret@bucket{path}?...`` of an S3 server on loopback; ``{path}`` is to be filled in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id="key", aws_secret_access_key="secret",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=false"
    yield "s3://key:secret@bucket{path}?" + options
    server.stop()


def manifest(version: int, mark: str) -> Manifest:
    return Manifest(version=version, schema_yaml=mark, schema_digest=mark * 1000, files=[])


def race(data_set: str, version: int, writers: int) -> tuple[list[str], list[str]]:
    """(marks of the writers that published, errors of the others), all at once."""
    published: list[str] = []
    refused: list[str] = []
    ready = threading.Barrier(writers)

    def write(mark: str) -> None:
        ready.wait()
        try:
            publish_manifest(data_set, manifest(version, mark))
            published.append(mark)
        except DataError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return published, refused


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_two_writers_the_second_is_refused(
    where: str, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    data_set = str(tmp_path) if where == "local" else bucket.format(path="/race")
    for version in range(1, 6):
        published, refused = race(data_set, version, 3)
        assert len(published) == 1, (published, refused)
        assert all(f"version {version} was published by another writer" in text for text in refused)
        assert len(refused) == 2
        assert load_manifest(data_set).schema_yaml == published[0]
    assert manifest_versions(data_set) == [1, 2, 3, 4, 5]
    filesystem, base = open_filesystem(data_set)
    listing = filesystem.get_file_info(pafs.FileSelector(f"{base}/_claims", allow_not_found=True))
    assert [item.path for item in listing if item.type == pafs.FileType.File] == []


def test_claims_of_living_writers_count_and_those_of_dead_ones_do_not(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = bucket.format(path="/claims")
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.05)
    inside = []
    with claims.claimed(data_set, "living"):
        waiting = threading.Thread(target=lambda: publish_manifest(data_set, manifest(1, "x")))
        waiting.start()
        time.sleep(0.5)
        inside = manifest_versions(data_set)
    waiting.join()
    assert inside == []
    assert manifest_versions(data_set) == [1]

    filesystem, base = open_filesystem(data_set)
    with filesystem.open_output_stream(f"{base}/_claims/dead") as stream:
        stream.write(b"dead")
    monkeypatch.setattr(claims, "STALE_SECONDS", 1.0)
    begin = time.monotonic()
    publish_manifest(data_set, manifest(2, "x"))
    assert 0.5 < time.monotonic() - begin < 10
    with claims.claimed(data_set) as require_in_time:
        require_in_time()
        time.sleep(0.6)
        with pytest.raises(DataError, match="answers too slowly to publish safely"):
            require_in_time()


def test_forgetting_on_an_object_store(bucket: str, local_ray: None) -> None:
    data_set = bucket.format(path="/forget")
    publish(data_set, table_of(ROWS), SCHEMA)

    def another_is_faster(line: str) -> None:
        if line.startswith("rewriting") and manifest_versions(data_set) == [1]:
            publish(data_set, table_of(ROWS), SCHEMA, version=2)

    with pytest.raises(DataError, match="version 2 was published by another writer; run it again"):
        forget_users(data_set, "1", Build(), another_is_faster)
    filesystem, base = open_filesystem(data_set)
    folders = filesystem.get_file_info(pafs.FileSelector(f"{base}/data"))
    assert sorted(item.base_name for item in folders) == ["v000001", "v000002"]

    report = forget_users(data_set, "1", Build(), another_is_faster)
    assert (report.version, report.users_found, report.purged) == (3, 1, [1, 2])
    left = table_of([row for row in ROWS if row["user"] != 1]).select(SCHEMA.columns)
    newest = load_manifest(data_set)
    assert canonical(explode_requests(read_all(data_set, newest), SCHEMA)) == canonical(left)
    with pytest.raises(DataError, match=r"version 2 of .* was purged"):
        load_manifest(data_set, 2)
    stored = filesystem.get_file_info(pafs.FileSelector(f"{base}/data", recursive=True))
    names = {item.path for item in stored if item.type == pafs.FileType.File}
    assert names == {f"{base}/{file.path}" for file in newest.files}


def test_readers_see_the_old_or_the_new_version(tmp_path: Path) -> None:
    """A reader that loads all the time while versions are published, each with other rows."""
    logs = [table_of([row | {"slot": bool(turn % 2)} for row in ROWS[turn:]]) for turn in range(8)]
    publish(tmp_path, logs[0], SCHEMA)
    expected = [canonical(log.select(SCHEMA.columns)) for log in logs]
    seen: list[int] = []
    wrong: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                newest = load_manifest(str(tmp_path))
                rows = canonical(explode_requests(read_all(tmp_path, newest), SCHEMA))
            except Exception as error:
                wrong.append(repr(error))
                return
            seen.append(newest.version)
            if rows != expected[newest.version - 1]:
                wrong.append(f"version {newest.version} is mixed")

    reader = threading.Thread(target=read)
    reader.start()
    for turn, log in enumerate(logs[1:], 2):
        publish(tmp_path, log, SCHEMA, version=turn)
    done.set()
    reader.join()
    assert wrong == []
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    first = publish(tmp_path, table_of(ROWS), SCHEMA)
    kept = files_below(tmp_path)
    left = [
        "_staging/dead/unit.arrow",
        "_manifests/v000002.json.77.tmp",
        "data/v000002/day=2023-02-27/shard-00000-000.parquet",
        "data/v000003-0badcafe/day=2023-02-27/shard-00000-000.parquet",
        "aside/v000002/late/part-00000.parquet",
        "data/v000001-0badcafe/day=2023-02-27/shard-00000-000.parquet",  # a task that outlived its killed build
    ]
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    with only_writer(str(tmp_path)) as version:
        assert version.number == 2
        assert version.token  # so that what is still being written cannot come in between
    assert files_below(tmp_path) == kept
    assert load_manifest(str(tmp_path)) == first
    with only_writer(str(tmp_path)) as version:
        assert version.token == ""

    # a purged version's folder holds files that later versions name
    carried = first.model_copy(update={"version": 2, "origin": Origin(purges=[1])})
    publish_manifest(str(tmp_path), carried)
    (tmp_path / left[-1]).parent.mkdir(parents=True)
    (tmp_path / left[-1]).write_bytes(b"half")
    for _ in range(2):
        with only_writer(str(tmp_path)):
            assert isinstance(read_version(str(tmp_path), 1), Tombstone)
        assert files_below(tmp_path) == sorted([*kept, "_manifests/v000002.json"])


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    publish(tmp_path, table_of(ROWS), SCHEMA)
    path = tmp_path / "_manifests" / "v000001.json"
    for text in ("[]", path.read_text()[:-40], '{"purged_at": 3}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"v000001\.json is not a valid manifest"):
            load_manifest(str(tmp_path))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_what_killed_builds_left_goes_after_a_while(
    where: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = str(tmp_path / "set") if where == "local" else bucket.format(path="/orphans")
    filesystem, base = open_filesystem(data_set)

    def there() -> list[str]:
        found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
        return sorted(item.path for item in found if item.type == pafs.FileType.File)

    manifests = [publish(data_set, table_of(ROWS), SCHEMA, version=version) for version in (1, 2)]
    before = there()
    left = ["data/v000003-dead/day=2023-02-27/part-0.parquet", "aside/v000003-dead/late/part-0.parquet",
            "_staging/0123dead/copies-000000.arrow", "data/v000001/day=2023-02-27/unnamed.parquet"]  # fmt: skip
    for path in left:
        filesystem.create_dir(f"{base}/{path.rpartition('/')[0]}", recursive=True)
        with filesystem.open_output_stream(f"{base}/{path}") as stream:
            stream.write(b"half")
    assert remove_orphans(data_set, 3600) == 0  # too young
    with at_work(data_set, "dead"):  # whose files they are
        assert remove_orphans(data_set, -5) == 1
        filesystem.open_output_stream(f"{base}/{left[-1]}").close()
        monkeypatch.setattr(alive, "DEAD_SECONDS", 0.0)
        assert writers_at_work(data_set) == set()  # no sign of it for long
    assert len(there()) == len(before) + len(left)
    assert remove_orphans(data_set, -5) == len(left)
    assert there() == before
    assert all(read_all(data_set, manifest).num_rows == 12 for manifest in manifests)
    assert remove_orphans(str(tmp_path / "not there"), 0) == 0


def test_a_writer_gives_signs_of_life(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is at work, and not longer; its folders bear its token."""
    monkeypatch.setattr(alive, "RENEW_SECONDS", 0.05)
    data_set = bucket.format(path="/alive")
    filesystem, base = open_filesystem(data_set)
    with only_writer(data_set) as version:
        assert writers_at_work(data_set) == {version.token}
        filesystem.delete_file(f"{base}/_writers/{version.token}")
        until = time.monotonic() + 20
        while writers_at_work(data_set) != {version.token} and time.monotonic() < until:
            time.sleep(0.05)
        assert writers_at_work(data_set) == {version.token}
        for folder in (
            open_filesystem(staging_folder(data_set, version))[1],
            version_folder(version.number, version.token),
        ):
            name = folder.rpartition("/")[2]
            assert belongs_to(f"any/{name}/file", {version.token})
            assert not belongs_to(f"any/{name}/file", {"other"})
    assert writers_at_work(data_set) == set()
