"""What is to be stored in MLflow, sent by a thread: a server that is down or slow stops nobody and loses nothing.

Entries wait in memory, and from ``MEMORY_ENTRIES`` on in a spool file on disk. While the server does not answer, the
thread tries again, after one warning. An entry that the server refuses for good, and what is left when the wait at
the end is over, stays in a file, which ``jobs/replay_tracking.py`` sends.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roo_ray.source_config import home

if TYPE_CHECKING:  # importing MLflow takes seconds: ranks that log nothing do without, and rank 0 does it in the thread
    from mlflow.tracking import MlflowClient

MEMORY_ENTRIES = 20_000
BATCH_METRICS = 500  # MLflow takes 1000 in a call
GATHER_SECONDS = 5.0  # a call costs about 10 ms of this process's time, whatever it holds: few calls, large ones
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}

Entry = dict[str, Any]
"""JSON: ``kind`` metric (name, value, time, step), tags (tags), text (text, path), folder (local, path), status."""


class Sender:
    """Stores entries in a run. A metric's step that the run had before this sender began, or one that is not above
    those it has stored, is not stored again: steps come in order."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._stored: dict[str, set[int]] = {}
        self._highest: dict[str, int] = {}

    @cached_property
    def client(self) -> MlflowClient:
        """The client of the store; the first use imports MLflow."""
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri)

    def _is_stored(self, name: str, step: int) -> bool:
        if name not in self._stored:
            history = self.client.get_metric_history(self.run_id, name)
            self._stored[name] = {point.step for point in history}
        return step in self._stored[name]

    def send(self, entries: list[Entry]) -> None:
        """Stores entries of one kind; sent again, they are stored once. Raises what the client does."""
        from mlflow.entities import Metric, RunTag

        kind = entries[0]["kind"]
        if kind == "metric":
            highest, new = dict(self._highest), []
            for e in entries:
                name, step = e["name"], e["step"]
                if step > highest.get(name, -1) and not self._is_stored(name, step):
                    new.append(Metric(name, e["value"], e["time"], step))
                    highest[name] = step
            if new:
                self.client.log_batch(self.run_id, metrics=new)
            self._highest = highest
        for entry in entries:
            if kind == "tags":
                self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in entry["tags"].items()])
            elif kind == "text":
                self.client.log_text(self.run_id, entry["text"], entry["path"])
            elif kind == "folder":
                self.client.log_artifacts(self.run_id, entry["local"], entry["path"])
            elif kind == "status":
                self.client.set_terminated(self.run_id, entry["status"])


class Outbox:
    """A queue of entries for one run, and the thread that sends them. ``warn``: gets one line when the server stops
    answering, and one when it is back."""

    def __init__(self, uri: str, run_id: str, warn: Callable[[str], None], memory: int = MEMORY_ENTRIES) -> None:
        self.uri, self.run_id, self.warn, self.memory = uri, run_id, warn, memory
        self.sender = Sender(uri, run_id)
        self._changed = threading.Condition()
        self._queue: deque[Entry] = deque()
        self._spooled = 0  # entries in the spool file, which come after those in memory
        self._spool = spool_folder() / f"{run_id}-{os.getpid()}-{id(self):x}.spool"
        self._read_to = 0
        self._sending: list[Entry] = []
        self._refused: list[Entry] = []
        self._down = False
        self._closed = False
        self._hurried = 0  # callers that wait for everything to be stored
        self._thread = threading.Thread(target=self._run, name="roo-ray-tracking", daemon=True)
        self._thread.start()

    def put(self, entries: list[Entry]) -> None:
        """Adds entries; returns at once."""
        with self._changed:
            if self._spooled or len(self._queue) >= self.memory:
                self._spool.parent.mkdir(parents=True, exist_ok=True)
                with self._spool.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(entry) + "\n" for entry in entries)
                self._spooled += len(entries)
            else:
                self._queue.extend(entries)
            waiting = len(self._queue) + self._spooled
            if waiting == len(entries) or waiting >= BATCH_METRICS:  # others would wake the thread for nothing
                self._changed.notify_all()

    def keep(self) -> None:
        """Writes what is not stored yet to a file, from which ``recover`` takes it should this process be killed."""
        path = spool_folder() / f"{self.run_id}-{os.getpid()}.kept"
        with self._changed:
            left = [*self._sending, *self._queue]
            if self._spooled:
                with self._spool.open(encoding="utf-8") as file:
                    file.seek(self._read_to)
                    left += [json.loads(line) for line in file]
        if not left:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in left), encoding="utf-8")
        part.replace(path)

    def recover(self) -> int:
        """Takes over what killed processes on this machine have kept of this run; how many entries. A step that the
        run has is not stored again."""
        taken = 0
        for path in sorted(spool_folder().glob(f"{self.run_id}-*.kept")):
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.put(entries)
            self.keep()
            if path.name != f"{self.run_id}-{os.getpid()}.kept":
                path.unlink()
            taken += len(entries)
        return taken

    def flush(self, seconds: float) -> bool:
        """Waits until everything is stored, at most so long; whether it is."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not (self._queue or self._spooled or self._sending), seconds)
            finally:
                self._hurried -= 1

    def close(self, seconds: float) -> Path | None:
        """Waits at most so long, then ends the sending. Returns the file with what could not be stored, if any."""
        self.flush(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = [*self._refused, *self._sending, *self._queue, *self._from_spool(self._spooled)]
            self._queue.clear()
            self._spool.unlink(missing_ok=True)
            (spool_folder() / f"{self.run_id}-{os.getpid()}.kept").unlink(missing_ok=True)
        if not left:
            return None
        path = spool_folder() / f"{self.run_id}-{int(time.time() * 1000)}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"uri": self.uri, "run_id": self.run_id}
        path.write_text("".join(json.dumps(line) + "\n" for line in [head, *left]), encoding="utf-8")
        return path

    def _from_spool(self, count: int) -> list[Entry]:
        if not count:
            return []
        with self._spool.open(encoding="utf-8") as file:
            file.seek(self._read_to)
            entries = [json.loads(file.readline()) for _ in range(count)]
            self._read_to = file.tell()
        self._spooled -= count
        if not self._spooled:
            self._spool.unlink()
            self._read_to = 0
        return entries

    def _next(self) -> list[Entry]:
        """The entries to send next, of one kind; waits for some. Empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._spooled or self._closed)
            self._changed.wait_for(
                lambda: self._closed or self._hurried or len(self._queue) + self._spooled >= BATCH_METRICS,
                GATHER_SECONDS,
            )
            if self._closed:
                return []
            if not self._queue:
                self._queue.extend(self._from_spool(min(self._spooled, self.memory)))
            batch = [self._queue.popleft()]
            while batch[0]["kind"] == "metric" and len(batch) < BATCH_METRICS and self._queue:
                if self._queue[0]["kind"] != "metric":
                    break
                batch.append(self._queue.popleft())
            self._sending = batch
            return batch

    def _run(self) -> None:
        while batch := self._next():
            tries = 0
            while not self._closed:
                try:
                    self.sender.send(batch)
                    if self._down:
                        self._down = False
                        self.warn(f"MLflow answers again at {self.uri}: what waited is being stored")
                    break
                except Exception as error:
                    if getattr(error, "error_code", None) in REFUSED:
                        self._refuse(batch, error)
                        break
                    if not self._down:
                        self._down = True
                        self.warn(
                            f"MLflow does not answer at {self.uri} ({_short(error)}): training goes on, and what is "
                            "logged is kept until it does"
                        )
                    with self._changed:
                        wait = RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)]
                        self._changed.wait_for(lambda: self._closed, wait)
                    tries += 1
            with self._changed:
                if self._closed:
                    return
                self._sending = []
                self._changed.notify_all()

    def _refuse(self, batch: list[Entry], error: Exception) -> None:
        if not self._refused:
            self.warn(f"MLflow refuses an entry of run {self.run_id} ({_short(error)}); it will stay in a file")
        self._refused += batch


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def spool_folder() -> Path:
    """Where what could not be sent waits."""
    return home() / "tracking-spool"


def replay(path: Path) -> int:
    """Stores what a file holds, and removes the file; returns how many entries it held. A step that the run has is
    not stored again. Raises what the client does; the file then stays."""
    head, *entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sender = Sender(head["uri"], head["run_id"])
    metrics = [entry for entry in entries if entry["kind"] == "metric"]
    for start in range(0, len(metrics), BATCH_METRICS):
        sender.send(metrics[start : start + BATCH_METRICS])
    for entry in entries:
        if entry["kind"] != "metric":
            sender.send([entry])
    path.unlink()
    return len(entries)
