"""Who may commit to a data set on an object store, which has no lock, no rename, and here no conditional put.

A writer puts a claim, an object of its own, and then lists all claims. Stores that list what was put (S3 since
2020, GCS, Azure) let at most one of several writers see its claim alone: each lists after its put, so of two
the one that lists last sees both. Who sees others gives way or waits; who is alone commits and withdraws its
claim. A claim that is ``STALE_SECONDS`` older (by the store's clock) than one's own belongs to a dead writer and
is ignored; a writer that has not begun its commit within half of that does not begin it.

What remains: a writer whose put itself hangs for longer than that may overwrite what another one published
meanwhile. Where that matters, let a scheduler run one writer per data set.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pyarrow.fs as pafs

from roo_ray.errors import DataError
from roo_ray.storage import open_filesystem

CLAIMS = "_claims"
STALE_SECONDS = 120.0
POLL_SECONDS = 0.3


@contextmanager
def claimed(data_set: str, token: str = "") -> Iterator[Callable[[], None]]:
    """A block in which no other writer commits to the data set. Yields a function to call right before a commit: it
    raises DataError where the claim has become too old. ``token``: unique to the writer.

    Raises DataError where others hold claims for longer than a dead one would count.
    """
    filesystem, base = open_filesystem(data_set)
    token = token or uuid.uuid4().hex
    folder = f"{base}/{CLAIMS}"
    mine = f"{folder}/{token}"
    give_up = time.monotonic() + 2 * STALE_SECONDS
    filesystem.create_dir(folder, recursive=True)
    try:
        while True:
            put_at = time.monotonic()
            with filesystem.open_output_stream(mine) as stream:
                stream.write(token.encode())
            others = _other_claims(filesystem, folder, token)
            if others is not None and not others:
                break
            if others is None or min(others) < token:  # of those who wait, one keeps its claim
                _withdraw(filesystem, mine)
            if put_at > give_up:
                raise DataError(f"other writers keep {data_set} from being published; wait for them or stop them")
            time.sleep(POLL_SECONDS * (1 + random.random()))

        def require_in_time() -> None:
            if time.monotonic() - put_at > STALE_SECONDS / 2:
                raise DataError(f"{data_set}: the store answers too slowly to publish safely; run it again")

        yield require_in_time
    finally:
        _withdraw(filesystem, mine)


def _other_claims(filesystem: pafs.FileSystem, folder: str, token: str) -> list[str] | None:
    """The claims of other writers who may be alive; None where one's own is gone."""
    listing = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    claims = {os.path.basename(item.path): item for item in listing if item.type == pafs.FileType.File}
    own = claims.pop(token, None)
    if own is None:
        return None
    dead = [item for item in claims.values() if own.mtime_ns - item.mtime_ns > STALE_SECONDS * 1e9]
    for item in dead:
        _withdraw(filesystem, item.path)
    return sorted(set(claims) - {os.path.basename(item.path) for item in dead})


def _withdraw(filesystem: pafs.FileSystem, path: str) -> None:
    with suppress(OSError):
        filesystem.delete_file(path)
