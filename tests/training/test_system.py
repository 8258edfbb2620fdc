"""System metrics of a run, while training and after a restart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.training import system
from roo_ray.training.tracking import RunHandle, RunLogger, open_run


def test_samples_go_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SECONDS_BETWEEN_SAMPLES", 0.1)
    run = open_run(Tracking(uri=f"sqlite:///{tmp_path}/m.db"), "train", "a", nodes=1)
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db")

    def cpu() -> list[Metric]:
        return list(client.get_metric_history(run.run_id, "system/cpu_utilization_percentage"))

    def steps() -> list[int]:
        return [point.step for point in cpu()]

    for _ in range(2):
        before = len(steps())
        logger = RunLogger(run)
        with system.system_metrics(logger):
            deadline = time.monotonic() + 60
            while len(steps()) < before + 2 and time.monotonic() < deadline:
                until = time.monotonic() + 0.2
                while time.monotonic() < until:  # a core is busy
                    pass
                logger.flush()
        assert len(steps()) >= before + 2
    assert steps() == sorted(set(steps()))
    assert all(point.value > 0 for point in cpu())  # the first of each thread, too
    named = client.get_run(run.run_id).data.metrics
    assert {"system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= named.keys()
    with system.system_metrics(RunLogger(RunHandle(None))):  # tracking is off
        pass
