"""Runs that nobody watches: the MLflow server goes and comes back, the best checkpoint stays, a diverging run ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.errors import TrainingDiverged
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare
from roo_ray.training.saver import step_of
from tests.jobs.small import small_config
from tests.jobs.test_main_path import quiet
from tests.mlflow_server import Server

SETTINGS = ("training.workers=1", "ingest.reader=thread", "training.log_every=4")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_that_stops_and_the_best_checkpoint(local_ray: None, server: Server, tmp_path: Path) -> None:
    keep = ("training.keep_by=best", "training.keep_checkpoints=1", "training.checkpoint_every_minutes=0.0005")
    learns = ("training.epochs=4", "training.embedding_lr=1.0")  # too fast: it is at its best before the end
    tracking = (f"tracking.uri={server.uri}", "tracking.end_wait_seconds=120")
    config = small_config(tmp_path, *SETTINGS, *keep, *learns, *tracking)
    prepare(config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})}), "b", quiet)
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        if server.process is not None and re.search(r"epoch 1/4  step \d+ ", line):
            server.stop()
        elif server.process is None and "held out:" in line:
            server.start()  # no line comes meanwhile; training goes on

    result = train(config, "watched by nobody", listen)
    client = MlflowClient(server.uri)
    run = client.get_run(result.run.run_id)
    assert run.info.status == "FINISHED"
    losses = sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
    last = step_of(Path(result.checkpoint).name)
    assert last is not None
    assert losses == list(range(1, last + 1))  # nothing is lost, and nothing there twice

    found = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "eval/click/ne")}
    assert len(found) == 4
    best = min(found, key=lambda step: found[step])
    kept = {step_of(folder.name) for folder in Path(config.storage, "watched by nobody").glob("epoch-*")}
    assert kept == {best, last}
    written = {point.step for point in client.get_metric_history(run.info.run_id, "checkpoint/write_ms")}
    assert len(written) > 4  # some were due by the minutes, within an epoch
    assert {"checkpoint/copy_ms", "checkpoint/report_ms"} <= run.data.metrics.keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_loss_that_is_not_finite_ends_the_run_and_names_requests(local_ray: None, tmp_path: Path) -> None:
    config = small_config(tmp_path, *SETTINGS, "training.dense_lr=1e30", "training.max_failures=3")
    prepare(config, "build", quiet)
    lines: list[str] = []
    with pytest.raises(TrainingDiverged, match=r"requests of the batch, by rank: rank 0: .*request_id"):
        train(config, "diverges", lines.append)
    assert sum("workers ready" in line for line in lines) == 1  # it would end the same way again
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    [run] = client.search_runs([experiment], "tags.`roo_ray.job` = 'train'")
    assert run.info.status == "FAILED"
