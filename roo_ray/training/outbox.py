"""What is to be stored in MLflow, sent by a thread: a server that is down or slow stops nobody and loses nothing.

Entries wait in memory, and from ``MEMORY_ENTRIES`` on in a spool file on disk (``spool``); where the disk takes
nothing, in memory all the same. While the server does not answer, the thread tries again, after one warning. An entry
that the server refuses for good, and what is left when the wait at the end is over, stays in a file, which
``jobs/replay_tracking.py`` sends. What a killed process leaves (``leftovers``), the next one of its run sends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from roo_ray.training.leftovers import Owner, entries_left, remove_left, stems_of_the_dead
from roo_ray.training.spool import (
    BATCH_METRICS,
    Entry,
    Sender,
    Spool,
    kept_folder,
    lines_of,
    send_all,
    spool_folder,
    write_whole,
)

MEMORY_ENTRIES = 20_000
GATHER_SECONDS = 5.0  # a call costs about 10 ms of this process's time, whatever it holds: few calls, large ones
OWN_GATHER_SECONDS = 15.0  # without a server this process does its work, too, a good part of it per call
REFILL_ENTRIES = 2_000  # read from the spool at once, while nothing can be added: some 10 ms
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)


def gather_seconds(uri: str) -> float:
    """For how long entries are gathered, unless there is a full call of them before."""
    return GATHER_SECONDS if uri.startswith(("http:", "https:")) else OWN_GATHER_SECONDS


class Outbox:
    """A queue of entries for one run, and the thread that sends them. ``warn``: gets one line when the server stops
    answering, one when it is back, and one where the disk does not take what waits. No method raises for either."""

    def __init__(self, uri: str, run_id: str, warn: Callable[[str], None], memory: int = MEMORY_ENTRIES) -> None:
        self.uri, self.run_id, self.warn, self.memory = uri, run_id, warn, memory
        self.sender = Sender(uri, run_id)
        self.gather = gather_seconds(uri)
        self._changed = threading.Condition()
        self._queue: deque[Entry] = deque()
        self._owner = Owner(run_id)
        self._spool = Spool(self._owner.next_spool())  # comes after the queue
        self._after: deque[Entry] = deque()  # comes after the spool: what the disk did not take
        self._sending: list[Entry] = []
        self._refused: list[Entry] = []
        self._down = False
        self._disk_said = False
        self._closed = False
        self._hurried = 0  # callers that wait for everything to be stored
        self._thread = threading.Thread(target=self._run, name="roo-ray-tracking", daemon=True)
        self._thread.start()

    @property
    def _waiting(self) -> int:
        return len(self._queue) + len(self._spool) + len(self._after)

    def put(self, entries: list[Entry]) -> None:
        """Adds entries; returns at once."""
        with self._changed:
            if self._after:
                self._after.extend(entries)
            elif self._spool or len(self._queue) >= self.memory:
                try:
                    self._owner.claim()
                    self._spool.append(entries)
                except OSError as error:
                    self._disk(error)
                    (self._after if self._spool else self._queue).extend(entries)
            else:
                self._queue.extend(entries)
            waiting = self._waiting
            if waiting == len(entries) or waiting >= BATCH_METRICS:  # others would wake the thread for nothing
                self._changed.notify_all()

    def put_folder(self, local: Path, path: str) -> bool:
        """Adds a folder's files as artifacts below ``path``. Whether a copy was kept, so that the folder may go at
        once: where the disk has not taken it, the folder must stay until everything is stored."""
        if not local.is_dir():
            raise FileNotFoundError(f"no folder {local}")
        entry: Entry = {"kind": "folder", "local": str(local), "path": path}
        try:
            self._owner.claim()
            entry |= {"local": str(kept_folder(local, self._owner.stem)), "own": True}
        except OSError as error:
            self._disk(error)
        self.put([entry])
        if "own" in entry:
            self.keep()  # a copy that nothing names would be lost
        return "own" in entry

    def _disk(self, error: OSError) -> None:
        if not self._disk_said:
            self._disk_said = True
            self.warn(
                f"warning: what waits for MLflow cannot be kept in {spool_folder()} ({error}): it stays in memory, "
                "and is lost if this process is killed; make room, or set ROO_RAY_HOME to a folder that can be written"
            )

    def keep(self) -> bool:
        """Writes what is not stored yet, and not in the spool already, to a file, from which ``recover`` takes it
        should this process be killed; whether the disk took it."""
        with self._changed:
            before, note, after = [*self._sending, *self._queue], self._spool.note, list(self._after)
        try:
            if before or note or after:
                self._owner.claim()
                write_whole(self._owner.kept, lines_of([*before, *([note] if note else []), *after]))
            else:
                self._owner.kept.unlink(missing_ok=True)
        except OSError as error:
            self._disk(error)
            return False
        return True

    def recover(self) -> int:
        """Takes over what killed processes on this machine have left of this run; how many entries. A step that the
        run has is not stored again."""
        taken = 0
        for stem in stems_of_the_dead(self.run_id, self._owner.stem):
            entries, folders = entries_left(stem), set[str]()
            try:
                while some := list(islice(entries, REFILL_ENTRIES)):
                    self.put(some)
                    taken += len(some)
                    folders |= {Path(entry["local"]).name for entry in some if entry["kind"] == "folder"}
                if self.keep():
                    remove_left(stem, folders)
            except (OSError, ValueError) as error:
                self._disk(OSError(f"what {stem} has left cannot be taken over: {error}"))
        return taken

    def flush(self, seconds: float) -> bool:
        """Waits until everything is stored, at most so long; whether it is."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not (self._waiting or self._sending), seconds)
            finally:
                self._hurried -= 1

    def close(self, seconds: float) -> Path | None:
        """Waits at most so long, then ends the sending. Returns the file with what could not be stored, if any."""
        self.flush(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            before, after = [*self._sending, *self._queue], [*self._after, *self._refused]
            left = len(before) + len(self._spool) + len(after)
            self._queue.clear()
            self._after.clear()
        path = spool_folder() / f"{self.run_id}-{time.time_ns() // 1000}.jsonl"
        head: Entry = {"uri": self.uri, "run_id": self.run_id}
        try:
            if left:
                write_whole(path, lines_of([head, *before]), self._spool.rest(), lines_of(after))
        except OSError as error:
            self.warn(
                f"warning: {left:,} entries of MLflow run {self.run_id} are lost: the server did not take them, "
                f"and they cannot be kept in {path} ({error})"
            )
            return None
        with suppress(OSError):
            self._spool.remove()
            self._owner.kept.unlink(missing_ok=True)
            self._owner.release()
        return path if left else None

    def _next(self) -> list[Entry]:
        """The entries to send next, of one kind; waits for some. Empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._changed.wait_for(lambda: self._closed or self._hurried or self._waiting >= BATCH_METRICS, self.gather)
            if self._closed:
                return []
            if not self._queue:
                self._refill()
            if not self._queue:
                return self._next()
            batch = [self._queue.popleft()]
            while batch[0]["kind"] == "metric" and len(batch) < BATCH_METRICS and self._queue:
                if self._queue[0]["kind"] != "metric":
                    break
                batch.append(self._queue.popleft())
            self._sending = batch
            return batch

    def _refill(self) -> None:
        if self._spool:
            try:
                self._queue.extend(self._spool.take(min(self.memory, REFILL_ENTRIES)))
                return
            except (OSError, ValueError) as error:  # the disk has failed
                self.warn(f"warning: {len(self._spool):,} entries in {self._spool.path} cannot be read: {error}")
                self._spool = Spool(self._owner.next_spool())
        self._queue, self._after = self._after, self._queue

    def _drop_spool(self) -> None:
        # all that it held is stored
        with suppress(OSError):
            self._spool.remove()
        self._spool = Spool(self._owner.next_spool())

    def _run(self) -> None:
        while batch := self._next():
            tries = 0
            while not self._closed:
                try:
                    refused = send_all(self.sender, batch)
                    if refused:
                        self._refuse(refused)
                    if self._down:
                        self._down = False
                        self.warn(f"MLflow answers again at {self.uri}: what waited is being stored")
                    break
                except Exception as error:
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
                if self._spool.note and not (self._spool or self._queue):
                    self._drop_spool()
                self._changed.notify_all()

    def _refuse(self, refused: list[tuple[Entry, Exception]]) -> None:
        if not self._refused:
            reason = _short(refused[0][1])
            self.warn(f"MLflow refuses an entry of run {self.run_id} ({reason}); it will stay in a file")
        with self._changed:
            self._refused += [entry for entry, _ in refused]


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
