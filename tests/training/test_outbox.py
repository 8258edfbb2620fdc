"""Nothing that is logged is lost, and nothing waits, while a real MLflow server is stopped and started again."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.training.outbox import Outbox
from roo_ray.training.spool import Replayed, replay, spool_folder
from roo_ray.training.tracking import RunHandle, RunLogger, open_run
from tests.mlflow_server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


def test_a_server_that_stops_and_comes_back_costs_a_warning_and_no_point(server: Server) -> None:
    lines: list[str] = []
    run = open_run(Tracking(uri=server.uri, experiment="t"), "train", "a", nodes=1)
    logger = RunLogger(run, lines.append, end_wait=60)
    for step in range(20):
        logger.metrics({"train/loss": float(step)}, step)
    assert logger.flush()
    server.stop()
    slowest = 0.0
    for step in range(20, 300):
        begin = time.perf_counter()
        logger.metrics({"train/loss": float(step), "b": 1.0}, step)
        slowest = max(slowest, time.perf_counter() - begin)
    logger.text("x", "x.txt")
    assert slowest < 1  # a call into the dead server takes longer
    assert not logger.flush(2)
    assert len(lines) == 1
    assert "does not answer" in lines[0]
    server.start()
    logger.end(True)
    assert len(lines) == 2
    assert "answers again" in lines[1]
    client = MlflowClient(server.uri)
    history = client.get_metric_history(run.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(step, float(step)) for step in range(300)]
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["x.txt"]
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_what_is_left_at_the_end_or_after_a_kill_stays_in_a_file(tmp_path: Path) -> None:
    """The run's store cannot be opened at first; more points than the memory takes; the file is sent later."""
    store = Tracking(uri=f"sqlite:///{tmp_path}/m.db", experiment="t")
    run = open_run(store, "train", "a", nodes=1)
    dead = f"http://127.0.0.1:{_closed_port()}"
    box = Outbox(dead, run.run_id, lambda line: None, memory=10)
    for step in range(100):
        box.put([{"kind": "metric", "name": "loss", "value": step / 2, "time": 1, "step": step}])
    box.put([{"kind": "status", "status": "FINISHED"}])
    box.keep()  # what a killed process would have left
    begin = time.perf_counter()
    path = box.close(0.3)
    assert time.perf_counter() - begin < 5
    assert path is not None
    path.write_text(path.read_text().replace(dead, str(store.uri)))
    assert replay(path) == Replayed(101, 0)
    assert not path.exists()
    client = MlflowClient(store.uri)
    steps = [point.step for point in client.get_metric_history(run.run_id, "loss")]
    assert sorted(steps) == list(range(100))
    assert client.get_run(run.run_id).info.status == "FINISHED"

    other = Outbox(dead, run.run_id, lambda line: None)
    other.put([{"kind": "metric", "name": "loss", "value": 1.0, "time": 1, "step": step} for step in (99, 100)])
    other.keep()
    kept = next(spool_folder().glob(f"{run.run_id}-*.kept"))
    kept = kept.rename(kept.with_name(f"{run.run_id}-1.kept"))  # of another process, killed since
    logger = RunLogger(RunHandle(store.uri, run.run_id), lambda line: None)
    assert logger.recover() == 2
    assert not kept.exists()
    logger.end(True)
    other.close(0)
    points = {point.step: point.value for point in client.get_metric_history(run.run_id, "loss")}
    assert (points[99], points[100]) == (49.5, 1.0)
    assert len(client.get_metric_history(run.run_id, "loss")) == 101


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
