"""Forgetting users: they are gone from every version that can be read, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from roo_ray.config import Build, Config, Holdout, Ingest
from roo_ray.errors import EXIT_BAD_INPUT, EXIT_OK, DataError
from roo_ray.ingest.stream import StreamSettings
from roo_ray.requests import forget as forget_module
from roo_ray.requests.forget import ForgetReport, carried_report, forget_users, resume_purge
from roo_ray.requests.grouping import explode_requests, group_impressions
from roo_ray.requests.manifest import (
    AsideRows,
    Manifest,
    ShardFile,
    Tombstone,
    load_manifest,
    manifest_versions,
    read_version,
)
from roo_ray.requests.report import Finding, report_json, report_table
from roo_ray.requests.scan import find_users
from roo_ray.requests.users import read_users
from roo_ray.requests.versions import named_files, only_writer
from roo_ray.training.checkpoint import STATE_FILE, RunState
from roo_ray.training.folder import PLAN_FILE, refuse_another_run, save_json
from roo_ray.training.launch import order_of_data
from tests.requests.data_sets import files_below, publish, read_all
from tests.requests.tables import Row, canonical, impression_row, request_row, small_schema, table_of

ROOT = Path(__file__).parents[2]
SCHEMA = small_schema()
BUILD = Build(row_group_requests=2)


def log(requests: int = 24, **changes: Any) -> list[Row]:
    """Users 0 .. 4 over five days; user 9 only on the first."""
    rows = [impression_row(request_row(n), item) for n in range(requests) for item in range(1 + n % 3)]
    return [*rows, impression_row(request_row(100, user=9, time=rows[0]["time"], **changes), 3)]


def forget(data_set: Path, users: str) -> ForgetReport:
    return forget_users(str(data_set), users, BUILD, lambda line: None)


def test_users_are_gone_and_all_others_stay(tmp_path: Path, local_ray: None) -> None:
    rows = log()
    first = publish(tmp_path, table_of(rows), SCHEMA, shards=3)
    before = {path: (tmp_path / path).read_bytes() for path in named_files(first)}
    report = forget(tmp_path, "9, 77,2")
    left = [row for row in rows if row["user"] not in (9, 2)]
    gone = group_impressions(table_of([row for row in rows if row["user"] in (9, 2)]), SCHEMA)
    second = load_manifest(str(tmp_path))

    assert canonical(explode_requests(read_all(tmp_path, second), SCHEMA)) == canonical(
        table_of(left).select(SCHEMA.columns)
    )
    assert (report.version, report.users_given, report.users_found, report.not_found) == (2, 3, 2, ["77"])
    assert (report.requests_removed, report.impressions_removed) == (gone.num_rows, len(rows) - len(left))
    assert report.bytes_before == sum(map(len, before.values()))
    assert report.bytes_after == sum((tmp_path / file.path).stat().st_size for file in second.files)
    carried = {file.path for file in second.files} & set(before)
    assert len(carried) == report.files_kept > 0
    assert report.files_rewritten == len(before) - len(carried) > 0
    for path in carried:
        assert (tmp_path / path).read_bytes() == before[path]
    assert report.purged == [1]
    assert report.deleted == report.files_rewritten
    assert files_below(tmp_path) == sorted(
        ["_manifests/v000001.json", "_manifests/v000002.json", *(file.path for file in second.files)]
    )
    assert (second.origin.kind, second.origin.parent, second.origin.purges) == ("forget", 1, [1])

    # counts and ledger are those of the same requests built anew
    anew = publish(tmp_path / "anew", table_of(left), SCHEMA, shards=3)
    assert second.counts == anew.counts
    for name, entry in second.ledger["columns"].items():
        assert entry["elements"] == anew.ledger["columns"][name]["elements"]
        assert entry.get("kept") == anew.ledger["columns"][name].get("kept")
        for level, size in entry["memory_bytes"].items():  # bits are rounded up to bytes, file by file
            assert abs(size - anew.ledger["columns"][name]["memory_bytes"][level]) <= len(first.files)
    columns = dict.fromkeys(second.ledger["columns"], 0)
    for file in second.files:
        footer = pq.read_metadata(tmp_path / file.path)
        for group in range(footer.num_row_groups):
            for leaf in range(footer.num_columns):
                chunk = footer.row_group(group).column(leaf)
                columns[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
    assert {name: entry["disk_bytes"]["request"] for name, entry in second.ledger["columns"].items()} == columns

    with pytest.raises(DataError, match=r"version 1 of .* was purged on 20.* because users were forgotten; .* use ver"):
        load_manifest(str(tmp_path), 1)
    settings = StreamSettings(
        data_set=str(tmp_path), version=1, schema=SCHEMA, ingest=Ingest(), holdout=Holdout(), side="train", seed=0,
        epochs=(0,), mode="shuffled",
    )  # fmt: skip
    with pytest.raises(DataError, match="was purged"):  # what a run pinned to it meets
        settings.open()
    again = forget(tmp_path, "9")
    assert (again.version, again.users_found, again.requests_removed) == (None, 0, 0)
    assert manifest_versions(str(tmp_path)) == [1, 2]


def test_only_versions_that_hold_them_are_purged(tmp_path: Path, local_ray: None) -> None:
    without = [row for row in log() if row["user"] != 9]
    publish(tmp_path, table_of(without), SCHEMA, version=1)
    second = publish(tmp_path, table_of(log()), SCHEMA, version=2)
    third = publish(tmp_path, table_of(without), SCHEMA, version=3)
    report = forget(tmp_path, "9")
    assert (report.version, report.purged, report.requests_removed, report.files_rewritten) == (4, [2], 0, 0)
    assert report.deleted == len(second.files)
    assert load_manifest(str(tmp_path)).files == third.files
    for version in (1, 3, 4):
        manifest = load_manifest(str(tmp_path), version)
        assert len(explode_requests(read_all(tmp_path, manifest), SCHEMA)) == len(without)


def test_everybody_can_be_forgotten_also_from_what_is_kept_aside(tmp_path: Path, local_ray: None) -> None:
    folder = tmp_path / "aside" / "v000001"
    for reason, table in {
        "late": pa.table({"user": pa.array([1, 9, None], pa.int64()), "x": [1, 2, 3]}),
        "lost": pa.table({"user": pa.array([9, 9], pa.int64())}),
        "anonymous": pa.table({"event": [5]}),
    }.items():
        (folder / reason).mkdir(parents=True)
        pq.write_table(table, folder / reason / "part-00000.parquet")
    aside = {
        reason: AsideRows(rows=rows, files=[f"aside/v000001/{reason}/part-00000.parquet"])
        for reason, rows in {"late": 3, "lost": 2, "anonymous": 1}.items()
    }
    publish(tmp_path, table_of(log()), SCHEMA, aside=aside)
    report = forget(tmp_path, "9")
    assert report.aside_rows_removed == 3
    assert report.aside_unchecked == ["aside/v000001/anonymous/part-00000.parquet"]
    second = load_manifest(str(tmp_path))
    assert {reason: rows.rows for reason, rows in second.aside.items()} == {"late": 2, "anonymous": 1}
    (late,) = second.aside["late"].files
    assert pq.read_table(tmp_path / late).to_pylist() == [{"user": 1, "x": 1}, {"user": None, "x": 3}]
    assert not (folder / "lost").exists()
    assert not (folder / "late").exists()
    assert (second.counts["aside.late"], second.counts["aside.anonymous"]) == (2, 1)

    forget(tmp_path, "0,1,2,3,4")
    third = load_manifest(str(tmp_path))
    assert (third.files, third.requests, third.counts["requests"]) == ([], 0, 0)


def test_a_run_pinned_to_a_purged_version_fails_clearly(tmp_path: Path, local_ray: None) -> None:
    data_set, storage = tmp_path / "requests", tmp_path / "runs"
    config = Config(name="x", schema=SCHEMA, requests=str(data_set), storage=str(storage))
    first = publish(data_set, table_of(log()), SCHEMA)
    save_json(config, "pinned", PLAN_FILE, order_of_data(config, first))
    state = RunState(epoch=1, step=1, schema_yaml="", model=config.model, data_version=1, data_digest="", plan={})
    (storage / "pinned" / "checkpoint_1").mkdir()
    (storage / "pinned" / "checkpoint_1" / STATE_FILE).write_text(state.model_dump_json())
    refuse_another_run(config, "pinned", order_of_data(config, load_manifest(str(data_set))))
    forget(data_set, "9")
    with pytest.raises(DataError, match=r"version 1 of .* was purged on .* use version 2, under another run_name"):
        refuse_another_run(config, "pinned", order_of_data(config, load_manifest(str(data_set))))


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)


def test_the_jobs(tmp_path: Path, local_ray: None) -> None:
    """Forget a user, then explode what is left, on the command line."""
    rows = log()
    publish(tmp_path / "requests", table_of(rows), SCHEMA)
    (tmp_path / "schema.yaml").write_text(SCHEMA.to_yaml())
    (tmp_path / "x.yaml").write_text(f"{{name: x, schema: schema.yaml, requests: {tmp_path}/requests}}")
    (tmp_path / "users").write_text("9\n77\n")
    forget_command = ["jobs/forget_users.py", "--config", f"{tmp_path}/x.yaml", "--users", f"{tmp_path}/users"]
    done = run_job(*forget_command, "--report", f"file://{tmp_path}/reports/1.json")
    assert done.returncode == EXIT_OK, done.stderr
    assert "remove them there too" in done.stdout
    report = json.loads((tmp_path / "reports/1.json").read_text())
    assert (report["users_found"], report["not_found"], report["purged"], report["version"]) == (1, ["77"], [1], 2)

    explode_command = ["jobs/explode_requests.py", "--requests", f"{tmp_path}/requests", "--out", f"{tmp_path}/table"]
    refused = run_job(*explode_command, "--version", "1")
    assert refused.returncode == EXIT_BAD_INPUT
    assert "was purged on" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = run_job(*explode_command)
    assert done.returncode == EXIT_OK, done.stderr
    left = table_of([row for row in rows if row["user"] != 9]).select(SCHEMA.columns)
    assert canonical(pq.read_table(tmp_path / "table")) == canonical(left)


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.mark.parametrize("point", ["before the purge", "after a tombstone", "after a file"])
def test_a_purge_that_was_interrupted_is_finished(
    point: str, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(tmp_path, table_of(log()), SCHEMA, shards=2)
    publish(tmp_path, table_of(log()), SCHEMA, shards=2, version=2)
    with monkeypatch.context() as patch:
        if point == "before the purge":
            patch.setattr(forget_module, "finish_purge", lambda data_set: (_ for _ in ()).throw(Killed))
        elif point == "after a tombstone":
            patch.setattr("roo_ray.requests.versions.live_versions", lambda data_set: (_ for _ in ()).throw(Killed))
        else:
            real = (tmp_path / first.files[0].path).unlink

            def one_file_then_end(data_set: str, tombstone: Tombstone) -> None:
                from roo_ray.requests.manifest import bury_manifest

                bury_manifest(data_set, tombstone)
                if tombstone.version == 2:
                    real()
                    raise Killed

            patch.setattr("roo_ray.requests.versions.bury_manifest", one_file_then_end)
        with pytest.raises(Killed):
            forget(tmp_path, "9")
    newest = load_manifest(str(tmp_path))  # a reader of the newest version notices nothing
    assert newest.version == 3
    assert 9 not in read_all(tmp_path, newest)["user"].to_pylist()
    if point == "before the purge":
        with only_writer(str(tmp_path)) as version:  # the next build, of whatever kind
            assert version.number == 4
    else:
        assert resume_purge(str(tmp_path))
    assert all(isinstance(read_version(str(tmp_path), number), Tombstone) for number in (1, 2))
    expected = ["_manifests/v000001.json", "_manifests/v000002.json", "_manifests/v000003.json"]
    assert files_below(tmp_path) == sorted([*expected, *(file.path for file in newest.files)])
    assert resume_purge(str(tmp_path)) == []


def test_nothing_has_changed_where_forgetting_fails(tmp_path: Path, local_ray: None) -> None:
    manifest = publish(tmp_path, table_of(log()), SCHEMA)
    (tmp_path / manifest.files[0].path).write_bytes(b"PAR1 damaged")
    before = files_below(tmp_path)
    with pytest.raises(DataError, match=r"part|shard"):
        forget(tmp_path, "9")
    assert files_below(tmp_path) == before
    assert load_manifest(str(tmp_path)) == manifest
    with only_writer(str(tmp_path)), pytest.raises(DataError, match="another build is writing"):
        forget(tmp_path, "9")


def test_statistics_rule_row_groups_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest: Manifest = publish(tmp_path, table_of(log(60)), SCHEMA)
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counting(self: Any, group: int, **options: Any) -> pa.Table:
        assert options["columns"] == ["user"]
        read.append(group)
        return real(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    users = pa.array([9], pa.int32())
    rows = sum(find_users(str(tmp_path), file.path, "user", users).rows for file in manifest.files)
    assert (rows, len(read)) == (1, 1)


def test_how_users_are_named(tmp_path: Path) -> None:
    text, parquet = tmp_path / "users.txt", tmp_path / "users"
    text.write_text("12\n\n 7 \n12\n")
    assert read_users(str(text), "user", pa.int32()).to_pylist() == [7, 12]
    pq.write_table(pa.table({"user": pa.array([3, None, 1], pa.int64())}), parquet)
    assert read_users(str(parquet), "user", pa.int32()).to_pylist() == [1, 3]
    assert read_users("b,a, é", "user", pa.string()).to_pylist() == ["a", "b", "é"]
    with pytest.raises(DataError, match=r"'x7' is no user id of this data set, whose user column has type int32"):
        read_users("1,x7", "user", pa.int32())
    with pytest.raises(DataError, match="names no user"):
        read_users(" , ", "user", pa.int32())
    with pytest.raises(DataError, match="file of users not found"):
        read_users("some/users.txt", "user", pa.int32())
    with pytest.raises(DataError, match="no column 'uid'"):
        read_users(str(parquet), "uid", pa.int32())


def test_the_report_of_the_version_before_shows_no_row() -> None:
    finding = Finding(
        "empty history", "history", 9, "requests", 2, "count", "user=7, time=2023-02-27", "user=7 has none"
    )
    report = report_json([finding])
    assert "user=7" in str(report)
    some = Manifest(
        version=3, schema_yaml="", schema_digest="", files=[shard_of(9, 30), shard_of(5, 10)], report=report
    )
    left = some.model_copy(update={"version": 4, "files": some.files[:1]})
    left = left.model_copy(update={"report": carried_report(some, left, 2)})
    assert "user=7" not in str(left.report)
    assert [(check["found"], check["looked_at"]) for check in left.report["checks"]] == [(2, 9)]
    assert all(check["carried_over"] for check in left.report["checks"])
    numbers = {"version": 4, "requests": 9, "impressions": 30, "users_removed": 2, "requests_removed": 5}
    assert left.report | numbers == left.report
    _, rows, note = report_table(left.report)
    assert [row[:6] for row in rows] == [
        ["forgotten users (all)", "requests", "14", "5", "forget", "removed"],
        ["forgotten users (all)", "impressions", "40", "10", "forget", "removed"],
        ["empty history (history)", "requests", "9", "2", "count", "counted before"],
    ]
    assert note == "1 checks of version 3, before users were forgotten: passed with remarks"
    again = carried_report(left, left.model_copy(update={"version": 5, "files": []}), 1)
    assert (again["of_version"], again["version"]) == (3, 5)  # forgotten again: still of the version that was checked
    assert (again["requests"], again["requests_removed"], again["users_removed"]) == (0, 9, 1)
    assert carried_report(some.model_copy(update={"report": {}}), left, 2) == {}


def shard_of(requests: int, impressions: int) -> ShardFile:
    """A file of a manifest that nobody opens."""
    return ShardFile(
        path=f"{requests}", day="2023-02-27", requests=requests, impressions=impressions, tokens=0, bytes=0,
        time_min=0, time_max=0, units=[],
    )  # fmt: skip
