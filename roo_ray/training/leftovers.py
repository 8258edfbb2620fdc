"""What a process keeps on disk of a run's entries, under names of its own, and what of it another one takes over.

``<stem>.lock`` is held while the process lives, and let go by the kernel when it is killed; ``<stem>.kept`` is what
was in memory at the last checkpoint, in order, with a line for the spool that came in between; ``<stem>.N.spool`` and
``<stem>.ID.folder`` are what waits on disk anyway.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from roo_ray.training.spool import FOLDER_SUFFIX, Entry, spool_folder

LOCK, KEPT, SPOOL = ".lock", ".kept", ".spool"


class Owner:
    """The files of one outbox. ``claim`` before the first is written; raises OSError."""

    def __init__(self, run_id: str) -> None:
        self.folder = spool_folder()
        self.stem = f"{run_id}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.kept = self.folder / f"{self.stem}{KEPT}"
        self._lock: int | None = None
        self._spools = 0

    def next_spool(self) -> Path:
        """Where the next spool goes: no two have one name, so that a note of one is never taken for another."""
        self._spools += 1
        return self.folder / f"{self.stem}.{self._spools}{SPOOL}"

    def claim(self) -> None:
        """Says that these files have a living owner."""
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / f"{self.stem}{LOCK}", os.O_CREAT | os.O_RDWR, 0o600)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = lock

    def release(self) -> None:
        """The owner ends well; what it leaves is nobody's to take over."""
        if self._lock is not None:
            (self.folder / f"{self.stem}{LOCK}").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def stems_of_the_dead(run_id: str, mine: str) -> list[str]:
    """Of the processes that were killed and have left files of this run, the one that wrote last at the end: steps are
    stored in order."""
    written: dict[str, float] = {}
    for path in spool_folder().glob(f"{run_id}-*"):
        stem = path.name.partition(".")[0]
        if path.suffix in (LOCK, KEPT, SPOOL) and stem != mine:
            with suppress(OSError):  # gone meanwhile
                written[stem] = max(path.stat().st_mtime, written.get(stem, 0.0))
    return [stem for stem in sorted(written, key=lambda stem: (written[stem], stem)) if not _lives(stem)]


def _lives(stem: str) -> bool:
    try:
        lock = os.open(spool_folder() / f"{stem}{LOCK}", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def entries_left(stem: str) -> Iterator[Entry]:
    """What a killed process has left, in order, a line at a time. Raises OSError, and ValueError naming the file where
    a line is damaged; a last line that was cut short was never taken note of."""
    folder, noted = spool_folder(), set[Path]()
    kept = folder / f"{stem}{KEPT}"
    if kept.is_file():
        for entry in _lines(kept, 0):
            if entry["kind"] != "spool":
                yield entry
                continue
            path = folder / entry["file"]
            noted.add(path)
            if path.is_file():  # otherwise all of it is stored
                yield from _lines(path, entry["from"])
    for path in sorted(folder.glob(f"{stem}.*{SPOOL.removeprefix('.')}"), key=lambda path: (len(path.name), path.name)):
        if path not in noted:  # begun since
            yield from _lines(path, 0)


def _lines(path: Path, begin: int) -> Iterator[Entry]:
    with path.open("rb") as file:
        file.seek(begin)
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None


def remove_left(stem: str, needed: set[str]) -> None:
    """Removes what a killed process has left, but the folders of these names, which are still to be sent."""
    for path in spool_folder().glob(f"{stem}.*"):
        if path.suffix == FOLDER_SUFFIX and path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix in (LOCK, KEPT, SPOOL, ".part"):
            path.unlink(missing_ok=True)
