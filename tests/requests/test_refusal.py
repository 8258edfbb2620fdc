"""Builds that a check refuses, and builds that mend: what is published, and what the report says."""

from pathlib import Path

import pytest

from roo_ray.errors import ConfigError
from roo_ray.requests.manifest import load_manifest, manifest_versions
from roo_ray.requests.report import CheckFailed
from tests.jobs.small import small_config
from tests.requests.test_join import build, config, log_rows, read_all, write_log

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_refused_build_reports_on_all_data(tmp_path: Path) -> None:
    """Broken rows in several buckets are all in the report; nothing of the build stays."""
    rows = log_rows()
    for number, row in enumerate(rows):
        row["click"] = 2 if number % 3 == 0 else row["click"]
        row["price"] = float("inf") if number % 50 == 0 else row["price"]
    write_log(tmp_path / "log", rows)
    settings = config(tmp_path, buckets=4)
    messages = set()
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"also failed: infinite value \(price\)|also failed: label") as caught:
            build(settings)
        messages.add(str(caught.value))
    assert len(messages) == 1
    wrong = {finding.check: finding for finding in caught.value.findings if finding.status == "failed"}
    assert wrong["label not 0 or 1"].found == len(rows[::3])
    assert wrong["label not 0 or 1"].looked_at == len(rows)
    assert wrong["infinite value"].found == len(rows[::50])
    assert manifest_versions(settings.requests) == []
    assert list((tmp_path / "requests").iterdir()) == []


def test_histories_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    rows = [row | {"h_item": [], "h_dwell": None, "h_time": []} for row in log_rows()]
    write_log(tmp_path / "log", rows)
    with pytest.raises(CheckFailed, match="60 of 60 histories are empty"):
        build(config(tmp_path, buckets=3))
    assert build(config(tmp_path, buckets=3, max_empty_history_share=1.0)).counts["empty_histories"] == 60


def test_dropped_duplicates_are_accounted_for(tmp_path: Path) -> None:
    rows = log_rows()
    doubled = [*rows, *[dict(row) for row in rows[:7]]]
    write_log(tmp_path / "log", doubled)
    manifest = build(config(tmp_path, buckets=3, on_duplicate_impression="drop", ledger="full"))
    assert manifest.counts["dropped_impressions"] == 7
    assert manifest.counts["impressions_read"] == len(doubled)
    stored = read_all(str(tmp_path / "requests"), manifest)
    assert manifest.impressions == len(rows) == sum(stored.column("num_impressions").to_pylist())
    assert load_manifest(str(tmp_path / "requests")).report == manifest.report
    checks = {check["check"]: check for check in manifest.report["checks"]}
    assert checks["duplicate impression"]["status"] == "repaired"
    assert checks["rows lost or doubled"]["looked_at"] == len(doubled)
    assert checks["varies within requests"]["looked_at"] == 60
    disk = manifest.ledger["totals"]["disk_bytes"]
    assert min(disk.values()) > 0
    assert manifest.ledger["files"]["files"] == len(manifest.files)


def test_max_time_needs_its_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_time needs the column.*keys.impression_time"):
        small_config(tmp_path, "build.on_request_conflict=max_time")
