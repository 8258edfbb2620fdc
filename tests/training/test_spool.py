"""What cannot be stored in MLflow now: disks that take nothing, entries that are refused, folders that are gone,
servers that hang. Nothing is lost where there is a place for it, and nothing raises or waits."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.training import system
from roo_ray.training.outbox import Outbox
from roo_ray.training.replay import Replayed, replay
from roo_ray.training.spool import Entry, Spool, lines_of, spool_folder
from roo_ray.training.tracking import RunHandle, RunLogger, open_run, store_problem


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return Tracking(uri=f"sqlite:///{tmp_path_factory.mktemp('store')}/m.db", experiment="t")


@pytest.fixture
def run(store: Tracking) -> RunHandle:
    return open_run(store, "train", "a", nodes=1)


@pytest.fixture
def hanging() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def point(name: str, step: int, value: float | None = None) -> Entry:
    return {"kind": "metric", "name": name, "value": step / 2 if value is None else value, "time": 1, "step": step}


def points(run: RunHandle, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(run.uri).get_metric_history(run.run_id, name)
    return [(p.step, p.value) for p in sorted(history, key=lambda p: (p.step, p.timestamp))]


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Within the block no file of this process grows beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_line_and_nothing_out_of_order(run: RunHandle) -> None:
    """The spool takes some entries, then none; what comes after waits in memory, and all is sent in the order of steps
    (the sender leaves out a step that is below another one)."""
    lines: list[str] = []
    assert run.uri is not None
    box = Outbox("http://127.0.0.1:9", run.run_id, lines.append, memory=20)
    with file_limit(2000):
        for step in range(100):
            box.put([point("loss", step)])
        box.keep()  # neither does this raise
    box.put([point("loss", 100)])
    assert 0 < len(box._spool) < 80
    assert len([line for line in lines if "stays in memory" in line]) == 1
    box.sender.uri = run.uri
    box.sender.__dict__.pop("client", None)  # from here on the server answers
    assert box.flush(30)
    assert box.close(0) is None
    assert points(run, "loss") == [(step, step / 2) for step in range(101)]


def test_a_home_that_cannot_be_written_stops_nothing(
    run: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.txt").write_text("a")
    monkeypatch.setenv("ROO_RAY_HOME", str(tmp_path / "file"))  # below it nothing can be made, by root neither
    lines: list[str] = []
    logger = RunLogger(run, lines.append, end_wait=30)
    assert logger._outbox is not None
    logger._outbox.memory = 5
    for step in range(50):
        logger.metrics({"loss": 1.0}, step)
    logger.keep()
    assert logger.recover() == 0
    logger.folder(tmp_path / "made", "made")  # no copy can be kept: it waits
    shutil.rmtree(tmp_path / "made")
    logger.end(True)
    assert len(points(run, "loss")) == 50
    assert [item.path for item in MlflowClient(run.uri).list_artifacts(run.run_id, "made")] == ["made/a.txt"]
    assert len(lines) == 1
    assert "set ROO_RAY_HOME" in lines[0]

    dead = Outbox("http://127.0.0.1:9", run.run_id, lines.append)
    dead.put([point("loss", 99)])
    assert dead.close(0.1) is None
    assert "1 entries" in lines[-1]
    assert "are lost" in lines[-1]


def test_a_refused_entry_takes_no_other_with_it(run: RunHandle) -> None:
    """Neither those of its batch, when it is sent, nor those after it, when the file is replayed."""
    lines: list[str] = []
    assert run.uri is not None
    box = Outbox(run.uri, run.run_id, lines.append)
    bad = [point("bad\nname", 3), point("bad\nname", 7)]
    box.put([point("a", step) for step in range(5)] + bad + [point("b", step) for step in range(5)])
    path = box.close(30)
    assert len(points(run, "a")) == len(points(run, "b")) == 5
    assert path is not None
    assert path.read_text().count("\n") == 3  # its head, and the two
    assert "refuses an entry" in lines[0]

    head = path.read_text().splitlines()[0]
    later = [point("a", 9), point("a", 5), {"kind": "text", "text": "x", "path": "x.txt"}]
    gone: list[dict[str, Any]] = [{"kind": "folder", "local": "/nowhere", "path": "p"}]
    path.write_text(f"{head}\n" + lines_of([*bad, *gone, {"kind": "status", "status": "FINISHED"}, *later]))
    assert replay(path) == Replayed(4, 3)
    assert [step for step, _ in points(run, "a")] == [0, 1, 2, 3, 4, 5, 9]
    client = MlflowClient(run.uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["x.txt"]
    assert replay(path) == Replayed(0, 3)
    assert path.read_text().count("\n") == 4

    # a server that goes away in between: what is stored is not in the file any more
    path.write_text(f"{head}\n" + lines_of([point("a", 10), {"kind": "status", "status": "FAILED"}]))
    away = path.read_text().replace(run.uri, "http://127.0.0.1:9")
    path.write_text(away)
    with pytest.raises(MlflowException):
        replay(path)
    assert path.read_text() == away


def test_a_folder_may_go_as_soon_as_it_is_logged(run: RunHandle, store: Tracking, tmp_path: Path) -> None:
    """Sent at once, or from the file of a job whose server was away."""
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "a.txt").write_text("a")
    before = set(spool_folder().glob("*.folder"))
    logger = RunLogger(run, lambda line: None)
    logger.folder(made, "now")
    lines: list[str] = []
    other = open_run(store, "train", "b", nodes=1)
    dead = Outbox("http://127.0.0.1:9", other.run_id, lines.append)
    assert dead.put_folder(made, "later")
    with pytest.raises(FileNotFoundError):
        logger.folder(tmp_path / "never", "never")
    shutil.rmtree(made)
    logger.end(True)
    path = dead.close(0.1)
    assert path is not None, lines
    path.write_text(path.read_text().replace("http://127.0.0.1:9", str(run.uri)))
    assert replay(path) == Replayed(1, 0)
    client = MlflowClient(run.uri)
    for of, name in ((run, "now"), (other, "later")):
        assert [item.path for item in client.list_artifacts(of.run_id, f"{name}/sub")] == [f"{name}/sub/a.txt"]
    assert set(spool_folder().glob("*.folder")) == before


def test_a_point_that_replaces_another_is_the_one_that_counts(run: RunHandle) -> None:
    """A day that is trained anew; sent again with the same value, it is not stored twice."""
    for value in (0.9, 0.5, 0.5):
        logger = RunLogger(run, lambda line: None)
        logger.metrics({"day/ne": value, "other": value}, 3, again=True)
        logger.metrics({"loss": value}, 3)
        logger.close()
        time.sleep(0.01)
    assert [value for _, value in points(run, "day/ne")] == [0.9, 0.5]
    assert [value for _, value in points(run, "loss")] == [0.9]
    assert MlflowClient(run.uri).get_run(run.run_id).data.metrics["day/ne"] == 0.5


def test_a_server_that_hangs_stops_nobody(hanging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(system, "SECONDS_BETWEEN_SAMPLES", 0.1)
    handle = RunHandle(hanging, "0" * 32, "1", time.time())
    lines: list[str] = []
    logger = RunLogger(handle, lines.append, end_wait=0.5)
    begin = time.perf_counter()
    with system.system_metrics(logger):
        logger.metrics({"loss": 1.0}, 1)
        logger.keep()
    logger.end(True)
    assert time.perf_counter() - begin < 4
    assert "replay_tracking.py" in lines[-1]
    assert store_problem(hanging) is not None


def test_what_a_spool_cannot_read_is_said(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.append([point("a", step) for step in range(4)])
    assert [e["step"] for e in spool.take(3)] == [0, 1, 2]
    assert [json.loads(block)["step"] for block in spool.rest()] == [3]
    assert len(spool) == 1
    assert spool.take(5) == [point("a", 3)]
    assert not len(spool)
    spool.remove()  # once they are stored
    assert not (tmp_path / "s").exists()
