"""Stores in MLflow what a job has left in a file, which a server that was away for days makes large: a part of it at a
time is in memory.

The points of metrics go first, by step, for which they are sorted in pieces on disk; then texts and folders; then the
run's status.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import SpooledTemporaryFile, TemporaryFile
from typing import NamedTuple

from roo_ray.training.spool import BATCH_METRICS, Entry, Sender, lines_of, send_all, write_whole

PIECE_BYTES = 4 << 20  # of lines that are sorted in memory at once
MOST_PIECES = 200  # open files


class Replayed(NamedTuple):
    """Entries of a file that are stored now, and those that the server refuses, which stay in it."""

    stored: int
    refused: int


def replay(path: Path) -> Replayed:
    """Stores what a file holds; what the server refuses stays in it, and without such entries it is removed. A step
    that the run has is not stored again. Raises ValueError naming the line where one is damaged or cut short, before
    anything is stored, and what the client does; what is not stored yet then stays in the file."""
    head = next(_lines(path), (b"", {}))[1]
    if not {"uri", "run_id"} <= head.keys():
        raise ValueError("its first line names no server and run")
    sender = Sender(head["uri"], head["run_id"])
    count = refusals = 0
    # beside the file: a system's folder for temporary files may lie in memory
    with SpooledTemporaryFile(PIECE_BYTES, dir=str(path.parent)) as refused:
        batches = _batches(path, _by_step(path))
        for batch in batches:
            try:
                refusing = [entry for entry, _ in send_all(sender, batch)]
            except Exception:
                refused.seek(0)
                rest = (lines_of(some).encode() for some in batches)
                write_whole(path, lines_of([head, *batch]), rest, refused)
                raise
            count, refusals = count + len(batch), refusals + len(refusing)
            refused.write(lines_of(refusing).encode())
        refused.seek(0)
        if refusals:
            write_whole(path, lines_of([head]), refused)
        else:
            path.unlink()
    return Replayed(count - refusals, refusals)


def _lines(path: Path) -> Iterator[tuple[bytes, Entry]]:
    """The lines of a file, the head first, and what they say."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _batches(path: Path, metrics: Iterable[Entry]) -> Iterator[list[Entry]]:
    """What is sent in one call each."""
    metrics = iter(metrics)
    while some := list(islice(metrics, BATCH_METRICS)):
        yield some
    for last in (False, True):
        for _, entry in _lines(path):
            kind = entry.get("kind", "metric")  # the head has none
            if kind != "metric" and last == (kind == "status"):
                yield [entry]


def _by_step(path: Path) -> Iterator[Entry]:
    """The metrics of a file in the order of their steps, those of one step in the file's order. Reads the whole file
    before the first."""
    most = max(PIECE_BYTES, path.stat().st_size // MOST_PIECES)
    with ExitStack() as files:
        pieces: list[Iterable[bytes]] = []
        piece: list[tuple[int, bytes]] = []
        size = 0
        for line, entry in _lines(path):
            if entry.get("kind") != "metric":
                continue
            if size + len(line) > most and piece:
                file = files.enter_context(TemporaryFile(dir=path.parent))
                file.writelines(_sorted(piece))
                file.seek(0)
                pieces.append(file)
                piece, size = [], 0
            piece.append((int(entry["step"]), line.rstrip(b"\n") + b"\n"))
            size += len(line)
        pieces.append(_sorted(piece))
        del piece
        entries = (map(json.loads, lines) for lines in pieces)
        yield from heapq.merge(*entries, key=lambda entry: int(entry["step"]))


def _sorted(piece: list[tuple[int, bytes]]) -> list[bytes]:
    piece.sort(key=lambda line: line[0])
    return [line for _, line in piece]
