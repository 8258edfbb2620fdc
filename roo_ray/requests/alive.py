"""Which writers are at work on a data set on an object store, where no lock says so.

A writer keeps an object ``_writers/TOKEN``, put again every few minutes by a thread, and withdraws it at its end.
Files in folders whose names end with the token of such a writer are its own and are not cleaned up, whatever their age.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyarrow.fs as pafs

from roo_ray.storage import open_filesystem

WRITERS = "_writers"
RENEW_SECONDS = 300.0
DEAD_SECONDS = 3600.0  # without a sign; far more than clocks differ and a store may be out of reach


@contextmanager
def at_work(data_set: str, token: str) -> Iterator[None]:
    """A block in which ``token`` counts as a writer at work."""
    filesystem, base = open_filesystem(data_set)
    path = f"{base}/{WRITERS}/{token}"
    ended = threading.Event()

    def put() -> None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(token.encode())

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # the next time, perhaps; a build does not fail for it
                put()

    filesystem.create_dir(f"{base}/{WRITERS}", recursive=True)
    put()
    thread = threading.Thread(target=renew, name="roo_ray-at-work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            filesystem.delete_file(path)


def writers_at_work(data_set: str) -> set[str]:
    """The tokens of the writers that gave a sign within ``DEAD_SECONDS``; the signs of others are removed."""
    filesystem, base = open_filesystem(data_set)
    found = filesystem.get_file_info(pafs.FileSelector(f"{base}/{WRITERS}", allow_not_found=True))
    alive = set()
    for item in found:
        if item.type != pafs.FileType.File:
            continue
        if item.mtime_ns is None or time.time() - item.mtime_ns / 1e9 < DEAD_SECONDS:
            alive.add(os.path.basename(item.path))
            continue
        with suppress(OSError):
            filesystem.delete_file(item.path)
    return alive


def belongs_to(path: str, tokens: set[str]) -> bool:
    """Whether a file, relative to its data set, lies in the folder of one of some writers."""
    parts = path.split("/")
    return len(parts) > 1 and any(parts[1].endswith(token) for token in tokens)
