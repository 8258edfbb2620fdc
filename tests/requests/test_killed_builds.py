"""Builds whose process is killed at some point: no reader accepts what is left, and the next build cleans up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from mlflow.tracking import MlflowClient

from roo_ray.errors import EXIT_STOPPED, DataError
from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.join import build_requests
from roo_ray.requests.manifest import load_manifest, manifest_versions
from tests.requests.data_sets import files_below, publish, read_all
from tests.requests.killed_driver import WAITING, config_of
from tests.requests.tables import Row, canonical, impression_row, request_row, small_schema, table_of

ROOT = Path(__file__).parents[2]
SCHEMA = small_schema()
OLD = [impression_row(request_row(n), item) for n in range(6) for item in range(2)]
# where the driver stops, or None: it is killed when the first shard file is there, or after a random time
POINTS = {
    "after the scatter": "grouping, checking and writing",
    "before the publication": "all accounted for",
    "while shards are written": None,
    "at some time": None,
}


def log() -> list[Row]:
    return [impression_row(request_row(n), item) for n in range(120) for item in range(1 + n % 5)]


def start(folder: Path, point: str | None) -> subprocess.Popen[str]:
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.requests.killed_driver", str(folder), point or ""],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def kill_at(driver: subprocess.Popen[str], name: str, folder: Path) -> None:
    """Ends the driver's whole process group once it is at the point."""
    assert driver.stdout is not None
    if name == "while shards are written":
        deadline = time.monotonic() + 120
        while not list(folder.glob("requests/data/v*/*/*.parquet")) and driver.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    else:
        wanted = "connected" if name == "at some time" else WAITING
        assert any(wanted in line for line in driver.stdout), "the driver ended before it came to the point"
        if name == "at some time":
            time.sleep(random.Random().uniform(0, 2.5))
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(timeout=30)
    driver.stdout.close()


def test_a_killed_driver_leaves_nothing_that_a_reader_accepts(tmp_path: Path, local_ray: None) -> None:
    table = table_of(log())
    drivers = {}
    for number, (name, point) in enumerate(POINTS.items()):
        folder = tmp_path / str(number)
        (folder / "log").mkdir(parents=True)
        pq.write_table(table, folder / "log" / "part.parquet", row_group_size=50)
        if number % 2:  # every other one has a version before
            publish(folder / "requests", table_of(OLD), SCHEMA)
        drivers[name] = start(folder, point)
    for number, (name, driver) in enumerate(drivers.items()):
        folder = tmp_path / str(number)
        kill_at(driver, name, folder)
        requests = str(folder / "requests")
        before = manifest_versions(requests)
        may_be_done = name in ("while shards are written", "at some time") and len(before) == 1 + number % 2
        if may_be_done:  # it was faster than the kill: then it is whole
            stored = read_all(requests, load_manifest(requests))
            assert canonical(explode_requests(stored, SCHEMA)) == canonical(table.select(SCHEMA.columns))
        elif number % 2:
            assert before == [1]
            stored = read_all(requests, load_manifest(requests))
            assert canonical(explode_requests(stored, SCHEMA)) == canonical(table_of(OLD).select(SCHEMA.columns))
        else:
            with pytest.raises(DataError, match="is not a request data set"):
                load_manifest(requests)
        if name in ("after the scatter", "before the publication"):
            assert list((folder / "requests" / "_staging").iterdir())  # it had come that far

    time.sleep(1)  # for the workers of the killed drivers to end
    for number in range(len(POINTS)):
        requests = str(tmp_path / str(number) / "requests")
        kept = [load_manifest(requests, version) for version in manifest_versions(requests)]
        manifest = build_requests(config_of(str(tmp_path / str(number))), lambda line: None)
        assert manifest.version == len(kept) + 1
        stored = read_all(requests, manifest)
        assert canonical(explode_requests(stored, SCHEMA)) == canonical(table.select(SCHEMA.columns))
        named = {file.path for item in [*kept, manifest] for file in item.files}
        manifests = [f"_manifests/v{version:06d}.json" for version in range(1, manifest.version + 1)]
        assert files_below(Path(requests)) == sorted([*manifests, *named])


def test_a_build_that_is_told_to_end_leaves_nothing(tmp_path: Path, local_ray: None) -> None:
    """The job itself, as `ray job stop` or a shell ends it."""
    (tmp_path / "log").mkdir()
    many = [impression_row(request_row(n), item) for n in range(4000) for item in range(2)]
    pq.write_table(table_of(many), tmp_path / "log" / "part.parquet", row_group_size=500)
    publish(tmp_path / "requests", table_of(OLD), SCHEMA)
    before = files_below(tmp_path / "requests")
    (tmp_path / "schema.yaml").write_text(SCHEMA.to_yaml())
    config = {
        "name": "told-to-end",
        "schema": "schema.yaml",
        "source": {"kind": "impressions", "path": [str(tmp_path / "log")]},
        "requests": str(tmp_path / "requests"),
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    job = subprocess.Popen(
        [sys.executable, "jobs/build_requests.py", "--config", str(tmp_path / "config.yaml")],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert job.stdout is not None
    lines = []
    for line in job.stdout:
        lines.append(line)
        if "dealing" in line:
            assert list((tmp_path / "requests" / "_staging").iterdir())
            job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == EXIT_STOPPED, "".join(lines)
    assert "what was underway is not published" in "".join(lines)
    assert "Traceback" not in "".join(lines)
    assert files_below(tmp_path / "requests") == before  # no staging, no shards, no claim, no version
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("roo_ray").experiment_id])
    assert run.info.status == "KILLED"
