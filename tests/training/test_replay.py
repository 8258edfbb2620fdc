"""A large file of what a job could not send is stored piece by piece: all of it, once, in order, in little memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.training import replay as module
from roo_ray.training.replay import Replayed, replay
from roo_ray.training.spool import Entry, Sender, lines_of
from roo_ray.training.tracking import RunHandle, open_run
from tests.training.test_spool import point, points

STEPS, TEXTS = 1200, 120
NAMES = [f"{name}/{'x' * 200}" for name in ("a", "b", "c")]
GONE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunHandle:
    return open_run(Tracking(uri=f"sqlite:///{tmp_path_factory.mktemp('store')}/m.db", experiment="t"), "train", "a", 1)


def many(names: list[str]) -> Iterator[Entry]:
    """A run's points, some of them a second time and late, with texts in between, and its end not at the end."""
    chosen = random.Random(0)
    for step in range(STEPS):
        for name in names:
            yield point(name, step)
        if step % (STEPS // TEXTS) == 0:
            yield {"kind": "text", "text": f"{step} " * 40_000, "path": f"{step}.txt"}
        if step == STEPS // 2:
            yield {"kind": "status", "status": "FINISHED"}
        if chosen.random() < 0.01:
            yield point(names[0], chosen.randrange(step + 1), -1.0)


def write(path: Path, run: RunHandle, entries: Iterator[Entry], uri: str | None = None) -> Path:
    with path.open("w") as file:
        file.write(lines_of([{"uri": uri or run.uri, "run_id": run.run_id}]))
        for entry in entries:
            file.write(lines_of([entry]))
    return path


def test_a_large_file_is_stored_in_little_memory(
    run: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, each step once with the value that came first, and the status last."""
    monkeypatch.setattr(module, "PIECE_BYTES", 50_000)
    small = write(tmp_path / "small", run, iter([point("warm", 0)]))
    replay(small)  # what the client itself takes
    path = write(tmp_path / "file", run, many(NAMES))
    size = path.stat().st_size
    tracemalloc.start()
    done = replay(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{size:,} bytes, {peak:,} at most in memory")
    assert peak < size / 4
    assert done.refused == 0
    assert done.stored > len(NAMES) * STEPS + TEXTS
    for name in NAMES:
        assert points(run, name) == [(step, step / 2) for step in range(STEPS)]
    client = MlflowClient(run.uri)
    assert len(client.list_artifacts(run.run_id)) == TEXTS
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert list(tmp_path.iterdir()) == []


def test_many_points_are_put_in_order_in_little_memory(
    run: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of steps, those of a step in that of the file."""
    monkeypatch.setattr(module, "PIECE_BYTES", 200_000)
    chosen = random.Random(2)
    path = write(tmp_path / "file", run, (point(NAMES[0], chosen.randrange(5000), n) for n in range(20_000)))
    tracemalloc.start()
    before, count = (-1, -1.0), 0
    for entry in module._by_step(path):
        assert before < (entry["step"], entry["value"])
        before, count = (entry["step"], entry["value"]), count + 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < path.stat().st_size / 8


def test_what_a_server_did_not_take_stays_in_order_with_what_it_refuses(
    run: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that goes away within a file of many pieces."""
    monkeypatch.setattr(module, "PIECE_BYTES", 2000)
    entries = [point("late", step) for step in range(1200)]
    random.Random(1).shuffle(entries)
    bad = point("bad\nname", 0)
    path = write(tmp_path / "file", run, iter([*entries, {"kind": "text", "text": "x", "path": "x.txt"}, bad]))
    send = Sender.send

    def goes_away(self: Sender, batch: list[Entry]) -> None:
        if batch[0].get("step", 0) >= 500:
            self.__dict__["client"] = MlflowClient(GONE)
        send(self, batch)

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Sender, "send", goes_away)
    with pytest.raises(MlflowException):
        replay(path)
    monkeypatch.setattr(Sender, "send", send)
    stored = len(points(run, "late"))
    assert 0 < stored < 1200
    left = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [entry["step"] for entry in left[:-2]] == list(range(stored, 1200))
    assert (left[-2]["kind"], left[-1]) == ("text", bad)
    assert replay(path) == Replayed(1200 - stored + 1, 1)
    assert points(run, "late") == [(step, step / 2) for step in range(1200)]
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("line", ['{"kind": "metr', "[1", ""])
def test_a_file_that_is_cut_short_is_refused_before_anything_is_stored(
    run: RunHandle, tmp_path: Path, line: str
) -> None:
    path = write(tmp_path / "file", run, iter([point("cut", 0), point("cut", 1)]))
    content = path.read_text() + line if line else ""
    path.write_text(content)
    with pytest.raises(ValueError, match="line 4" if line else "first line"):
        replay(path)
    assert path.read_text() == content
    assert points(run, "cut") == []


def test_a_last_line_without_its_end_counts_where_it_is_whole(run: RunHandle, tmp_path: Path) -> None:
    path = write(tmp_path / "file", run, iter([point("end", 1), point("end", 0)]))
    path.write_text(path.read_text().rstrip("\n"))
    assert replay(path) == Replayed(2, 0)
    assert points(run, "end") == [(0, 0.0), (1, 0.5)]
