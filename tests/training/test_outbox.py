"""Nothing that is logged is lost, and nothing waits, while a real MLflow server is stopped and started again."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.errors import ConfigError
from roo_ray.training import outbox
from roo_ray.training.outbox import Outbox
from roo_ray.training.replay import Replayed, replay
from roo_ray.training.spool import Entry, Sender, spool_folder
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
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match="no MLflow server answers"):
        open_run(Tracking(uri=server.uri, experiment="t"), "train", "never", nodes=1, patience=0.1)
    assert time.perf_counter() - begin < 20
    with ThreadPoolExecutor(1) as later:  # the next run of a series
        next_one = later.submit(open_run, Tracking(uri=server.uri, experiment="t"), "train", "b", 1, patience=120.0)
        time.sleep(0.5)
        assert not next_one.done()
        server.start()
    assert next_one.result().run_id != run.run_id
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


def test_a_store_in_this_process_gets_fewer_and_larger_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as there is no full call."""
    monkeypatch.setattr(outbox, "GATHER_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "OWN_GATHER_SECONDS", 3600.0)
    calls: dict[str, list[int]] = {}

    def send(sender: Sender, batch: list[Entry]) -> list[tuple[Entry, Exception]]:
        calls.setdefault(sender.uri, []).append(len(batch))
        return []

    monkeypatch.setattr(outbox, "send_all", send)
    entries: list[Entry] = [{"kind": "metric", "name": "a", "value": 0.0, "time": 1, "step": s} for s in range(1000)]
    server, file = "http://127.0.0.1:9", "sqlite:///none.db"
    boxes = {uri: Outbox(uri, "run", lambda line: None) for uri in (server, file)}
    for box in boxes.values():
        box.put(entries[:400])
    _wait_for(lambda: server in calls)
    assert calls == {server: [400]}
    boxes[file].put(entries[400:])
    _wait_for(lambda: file in calls)
    assert calls == {server: [400], file: [1000]}
    for box in boxes.values():
        assert box.close(5) is None


def _wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
