"""A build in MLflow: its validation report is an artifact of the run, also where a check refuses the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.requests.manifest import manifest_versions
from roo_ray.requests.report import CheckFailed
from roo_ray.training.prepare import prepare
from tests.requests.killed_driver import config_of
from tests.requests.tables import Row, impression_row, request_row, table_of


def tracked(folder: Path, rows: list[Row]) -> tuple[Any, MlflowClient]:
    (folder / "log").mkdir(parents=True)
    pq.write_table(table_of(rows), folder / "log" / "part.parquet")
    uri = f"sqlite:///{folder}/mlflow.db"
    config = config_of(str(folder)).model_copy(update={"tracking": Tracking(uri=uri, experiment="builds")})
    return config, MlflowClient(uri)


def report_of(client: MlflowClient, folder: Path) -> tuple[str, dict[str, Any]]:
    """(how the only run ended, its validation report)."""
    experiment = client.get_experiment_by_name("builds")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    path = client.download_artifacts(run.info.run_id, "validation_report.json", str(folder))
    return run.info.status, json.loads(Path(path).read_text())


def test_the_report_of_a_build_is_in_mlflow_also_where_it_is_refused(tmp_path: Path, local_ray: None) -> None:
    rows = [impression_row(request_row(n), item) for n in range(20) for item in range(3)]
    config, client = tracked(tmp_path / "good", rows)
    manifest, _ = prepare(config, "good", lambda line: None)
    status, report = report_of(client, tmp_path)
    assert (status, report) == ("FINISHED", manifest.report)

    config, client = tracked(tmp_path / "bad", [*rows, rows[4]])
    with pytest.raises(CheckFailed, match="repeat the key of another one of their request"):
        prepare(config, "bad", lambda line: None)
    status, report = report_of(client, tmp_path)
    assert status == "FAILED"
    (failed,) = [check for check in report["checks"] if check["found"] and check["rule"] == "fail"]
    assert (failed["check"], failed["found"]) == ("duplicate impression", 1)
    assert not manifest_versions(config.requests)
