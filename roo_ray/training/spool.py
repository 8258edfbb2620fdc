"""Files under roo_ray's home in which what is to be stored in MLflow waits, and how entries are stored from them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roo_ray.source_config import home

if TYPE_CHECKING:  # importing MLflow takes seconds: ranks that log nothing do without, and rank 0 does it in a thread
    from mlflow.tracking import MlflowClient

Entry = dict[str, Any]
"""JSON: ``kind`` metric (name, value, time, step, and ``again`` where it replaces a point of that step), tags (tags),
text (text, path), folder (local, path, and ``own`` where it is a copy of ours, to be removed once stored), status."""

BATCH_METRICS = 1000  # as many as MLflow takes in a call
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
FOLDER_SUFFIX = ".folder"
BLOCK = 1 << 20  # bytes


class FolderGone(Exception):
    """A folder whose files were to be stored is not there any more."""


def spool_folder() -> Path:
    """Where what could not be sent waits."""
    return home() / "tracking-spool"


def lines_of(entries: list[Entry]) -> str:
    """Entries as lines of a file."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def write_whole(path: Path, *parts: str | Iterable[bytes]) -> None:
    """Writes a file in one piece, of texts and of what comes in blocks. Raises OSError; what was there stays then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            for some in parts:
                file.writelines([some.encode()] if isinstance(some, str) else some)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def kept_folder(local: Path, stem: str) -> Path:
    """A copy of a folder in the spool, of links where both are on one disk. Raises OSError; nothing is left then."""
    copy = spool_folder() / f"{stem}.{uuid.uuid4().hex}{FOLDER_SUFFIX}"

    def link_or_copy(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        return target

    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(local, copy, copy_function=link_or_copy)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


class Spool:
    """Entries in a file, first in, first out; ``len`` is how many it holds. What was taken stays in the file until it
    is ``remove``d. Methods raise OSError and then have changed nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0
        self._read_to = 0

    def __len__(self) -> int:
        return self._count

    @property
    def note(self) -> Entry | None:
        """For another process: which file, and from where on it holds these entries; None without a file."""
        used = self._count or self._read_to
        return {"kind": "spool", "file": self.path.name, "from": self._read_to} if used else None

    def append(self, entries: list[Entry]) -> None:
        """Adds entries at the end."""
        content = memoryview(lines_of(entries).encode())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while content:
                    content = content[file.write(content) or 0 :]
            except OSError:
                os.ftruncate(file.fileno(), size)  # no half line, which would spoil the next one
                raise
        self._count += len(entries)

    def take(self, count: int) -> list[Entry]:
        """The first ``count`` entries, or as many as there are."""
        count = min(count, self._count)
        if not count:
            return []
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            entries = [json.loads(file.readline()) for _ in range(count)]
            self._count, self._read_to = self._count - count, file.tell()
        return entries

    def rest(self) -> Iterator[bytes]:
        """All entries, which stay, as blocks of their lines."""
        if self._count:
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                while block := file.read(BLOCK):
                    yield block

    def remove(self) -> None:
        """Removes the file."""
        self._count = self._read_to = 0
        self.path.unlink(missing_ok=True)


class Sender:
    """Stores entries in a run. A metric's step that the run had before this sender began, or one that is not above
    those it has stored, is not stored again: steps come in order. One that says ``again`` is, where its value is
    another one: MLflow then shows the later one."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._stored: dict[str, dict[int, float]] = {}
        self._highest: dict[str, int] = {}

    @cached_property
    def client(self) -> MlflowClient:
        """The client of the store; the first use imports MLflow."""
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri)

    def _known(self, name: str) -> dict[int, float]:
        if name not in self._stored:
            history = sorted(self.client.get_metric_history(self.run_id, name), key=lambda point: point.timestamp)
            self._stored[name] = {point.step: point.value for point in history}
        return self._stored[name]

    def send(self, entries: list[Entry]) -> None:
        """Stores entries of one kind; sent again, they are stored once. Raises what the client does, and FolderGone."""
        if entries[0]["kind"] == "metric":
            self._send_metrics(entries)
            return
        from mlflow.entities import RunTag

        for entry in entries:
            if entry["kind"] == "tags":
                self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in entry["tags"].items()])
            elif entry["kind"] == "text":
                self.client.log_text(self.run_id, entry["text"], entry["path"])
            elif entry["kind"] == "folder":
                self._send_folder(entry)
            elif entry["kind"] == "status":
                self.client.set_terminated(self.run_id, entry["status"])

    def _send_metrics(self, entries: list[Entry]) -> None:
        from mlflow.entities import Metric

        highest, new, again = dict(self._highest), [], []
        for e in entries:
            name, step, known = e["name"], e["step"], self._known(e["name"])
            if e.get("again") and step in known:
                if known[step] == e["value"]:
                    continue
                again.append(e)
            elif step in known or step <= highest.get(name, -1):
                continue
            new.append(Metric(name, e["value"], e["time"], step))
            highest[name] = max(step, highest.get(name, -1))
        if new:
            self.client.log_batch(self.run_id, metrics=new)
        self._highest = highest
        for e in again:
            self._stored[e["name"]][e["step"]] = e["value"]

    def _send_folder(self, entry: Entry) -> None:
        folder, own = Path(entry["local"]), entry.get("own", False)
        if not folder.is_dir():
            if own and self.client.list_artifacts(self.run_id, entry["path"]):
                return  # removed when it was stored, by a process that was killed before it could take note
            raise FolderGone(f"{folder}, whose files were to be stored as '{entry['path']}', is not there any more")
        self.client.log_artifacts(self.run_id, str(folder), entry["path"])
        if own:
            shutil.rmtree(folder, ignore_errors=True)


def is_refusal(error: Exception) -> bool:
    """Whether trying again would end the same way."""
    return isinstance(error, FolderGone) or getattr(error, "error_code", None) in REFUSED


def send_all(sender: Sender, batch: list[Entry]) -> list[tuple[Entry, Exception]]:
    """Stores entries of one kind but those that the server refuses; these, with its reasons. Raises what the client
    does where the server does not answer; sent again, what was stored already is stored once."""
    try:
        sender.send(batch)
    except Exception as error:
        if not is_refusal(error):
            raise
        run_is_gone = getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
        if len(batch) == 1 or run_is_gone:
            return [(entry, error) for entry in batch]
        half = len(batch) // 2
        return send_all(sender, batch[:half]) + send_all(sender, batch[half:])
    return []
