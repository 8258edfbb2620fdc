"""What a process that was killed has left of its run is stored once by the one that goes on, and removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.training.leftovers import Owner, entries_left, stems_of_the_dead
from roo_ray.training.outbox import Outbox
from roo_ray.training.spool import spool_folder
from roo_ray.training.tracking import RunLogger, open_run
from tests.training.test_spool import point

DEAD = "http://127.0.0.1:9"
KILLED = """
import os, signal, sys
from pathlib import Path
from roo_ray.training.outbox import Outbox
from roo_ray.training.spool import kept_folder
from tests.training.test_leftovers import DEAD, point
run_id, made = sys.argv[1:]
box = Outbox(DEAD, run_id, lambda line: None, memory=50)
for step in range(600):
    box.put([point("loss", step)])
box.put_folder(Path(made), "made")
box.keep()
for step in range(600, 1000):
    box.put([point("loss", step)])
kept_folder(Path(made), box._owner.stem)  # killed before it could note this one
with box._spool.path.open("a") as file:
    file.write('{"kind": "metr')  # and within a line
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_all_that_a_killed_process_has_left_is_stored_once_and_removed(tmp_path: Path) -> None:
    store = Tracking(uri=f"sqlite:///{tmp_path}/m.db", experiment="t")
    run = open_run(store, "train", "a", nodes=1)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.txt").write_text("a")
    killed = subprocess.run([sys.executable, "-c", KILLED, run.run_id, str(tmp_path / "made")], check=False)
    assert killed.returncode == -signal.SIGKILL
    alive = Outbox(DEAD, run.run_id, lambda line: None, memory=2)  # of a process that lives: not touched
    alive.put([point("other", step) for step in range(9)])
    alive.put([point("other", 9)])
    assert alive.keep()

    lines: list[str] = []
    logger = RunLogger(run, lines.append)
    assert logger.recover() == 1001
    assert logger.recover() == 0
    logger.metrics({"loss": -1.0}, 999)  # replayed
    logger.metrics({"loss": -1.0}, 1000)
    logger.end(True)
    assert lines == []
    client = MlflowClient(store.uri)
    history = [(p.step, p.value) for p in client.get_metric_history(run.run_id, "loss")]
    assert sorted(history) == [*((step, step / 2) for step in range(1000)), (1000, -1.0)]
    assert [item.path for item in client.list_artifacts(run.run_id, "made")] == ["made/a.txt"]
    stem = alive._owner.stem
    left = {path.name for path in spool_folder().glob(f"{run.run_id}-*")}
    assert left == {f"{stem}.lock", f"{stem}.kept", f"{stem}.1.spool"}
    waiting = alive.close(0)
    assert waiting is not None
    assert [json.loads(line).get("step") for line in waiting.read_text().splitlines()] == [None, *range(10)]
    assert {path.name for path in spool_folder().glob(f"{run.run_id}-*")} == {waiting.name}
    waiting.unlink()


def test_what_is_kept_is_what_the_spool_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spool's entries are neither read nor written for it; taken out of the spool, they stay on disk until they are
    stored."""
    monkeypatch.setenv("ROO_RAY_HOME", str(tmp_path))
    box = Outbox(DEAD, "run", lambda line: None, memory=10)
    box.put([point("a", step) for step in range(10)])
    for step in range(10, 3000):
        box.put([point("a", step)])
    assert box.keep()
    kept = box._owner.kept.read_text().splitlines()
    assert len(kept) == 11
    assert json.loads(kept[-1])["kind"] == "spool"
    with box._changed:  # the first ten are stored; then it is killed, with the next ten in memory
        box._queue.clear()
        box._sending = []
        box._refill()
        assert len(box._queue) == 10
    stem = box._owner.stem
    assert [entry["step"] for entry in entries_left(stem)] == list(range(3000))
    assert box.keep()
    assert [entry["step"] for entry in entries_left(stem)] == list(range(10, 3000))
    path = box.close(0)
    assert path is not None
    steps = [json.loads(line).get("step") for line in path.read_text().splitlines()]
    assert steps[0] is None
    assert steps[1:] == list(range(10, 3000))
    assert list(spool_folder().iterdir()) == [path]


def test_an_owner_lives_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROO_RAY_HOME", str(tmp_path))
    owner = Owner("run")
    owner.claim()
    owner.kept.write_text("")
    assert stems_of_the_dead("run", "run-other") == []
    owner.release()
    assert stems_of_the_dead("run", "run-other") == [owner.stem]
    assert stems_of_the_dead("run", owner.stem) == []
    for age, name in ((50, "b"), (100, "a")):
        older = owner.kept.with_name(f"run-{name}.kept")
        older.write_text("")
        os.utime(older, (time.time() - age,) * 2)
    assert stems_of_the_dead("run", "run-other") == ["run-a", "run-b", owner.stem]
