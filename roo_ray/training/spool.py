"""Files under roo_ray's home in which what is to be stored in MLflow waits, and how entries are stored from them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from roo_ray.source_config import home

if TYPE_CHECKING:  # importing MLflow takes seconds: ranks that log nothing do without, and rank 0 does it in a thread
    from mlflow.tracking import MlflowClient

Entry = dict[str, Any]
"""JSON: ``kind`` metric (name, value, time, step, and ``again`` where it replaces a point of that step), tags (tags),
text (text, path), folder (local, path, and ``own`` where it is a copy of ours, to be removed once stored), status."""

BATCH_METRICS = 500  # MLflow takes 1000 in a call
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
FOLDER_SUFFIX = ".folder"


class FolderGone(Exception):
    """A folder whose files were to be stored is not there any more."""


class Replayed(NamedTuple):
    """Entries of a file that are stored now, and those that the server refuses, which stay in it."""

    stored: int
    refused: int


def spool_folder() -> Path:
    """Where what could not be sent waits."""
    return home() / "tracking-spool"


def lines_of(entries: list[Entry]) -> str:
    """Entries as lines of a file."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one piece. Raises OSError; what was there stays then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def kept_folder(local: Path, run_id: str) -> Path:
    """A copy of a folder in the spool, of links where both are on one disk. Raises OSError; nothing is left then."""
    copy = spool_folder() / f"{run_id}-{uuid.uuid4().hex}{FOLDER_SUFFIX}"

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
    """Entries in a file, first in, first out; ``len`` is how many it holds. Methods raise OSError and then have
    changed nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0
        self._read_to = 0

    def __len__(self) -> int:
        return self._count

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
        entries, read_to = self._read(min(count, self._count))
        self._count, self._read_to = self._count - len(entries), read_to
        if not self._count:
            self.remove()
        return entries

    def rest(self) -> list[Entry]:
        """All entries, which stay."""
        return self._read(self._count)[0]

    def _read(self, count: int) -> tuple[list[Entry], int]:
        if not count:
            return [], self._read_to
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._read_to)
            entries = [json.loads(file.readline()) for _ in range(count)]
            return entries, file.tell()

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


def replay(path: Path) -> Replayed:
    """Stores what a file holds; what the server refuses stays in it, and without such entries it is removed. A step
    that the run has is not stored again. Raises what the client does; what is not stored yet then stays in the file."""
    head, *entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sender = Sender(head["uri"], head["run_id"])
    metrics = sorted((e for e in entries if e["kind"] == "metric"), key=lambda e: int(e["step"]))
    batches = [metrics[start : start + BATCH_METRICS] for start in range(0, len(metrics), BATCH_METRICS)]
    batches += [[e] for e in entries if e["kind"] not in ("metric", "status")]
    batches += [[e] for e in entries if e["kind"] == "status"]
    refused: list[Entry] = []
    for number, batch in enumerate(batches):
        try:
            refused += [entry for entry, _ in send_all(sender, batch)]
        except Exception:
            left = [entry for some in batches[number:] for entry in some]
            write_whole(path, lines_of([head, *left, *refused]))
            raise
    if refused:
        write_whole(path, lines_of([head, *refused]))
    else:
        path.unlink()
    return Replayed(len(entries) - len(refused), len(refused))
