"""One job at a time works on a run (or a series of days): a second one would remove the first one's checkpoints.

A job keeps a file ``_job/TOKEN`` in the run's folder, which it writes again every few seconds with a count, and
removes at its end. Whoever finds the file of another one watches whether the count goes on: a file that stays as it is
for ``DEAD_SECONDS`` is that of a job that was killed. No clocks are compared, and it works on any storage; of a process
of this machine it is known at once. Of two jobs that begin in the same moment, it may be that none goes on.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pyarrow.fs as pafs

from roo_ray.errors import ConfigError
from roo_ray.storage import open_filesystem

FOLDER = "_job"
RENEW_SECONDS = 5.0
DEAD_SECONDS = 45.0  # without a sign; a store may be out of reach for some of it
LOOK_SECONDS = 1.0


@contextmanager
def at_work(folder: str, what: str, say: Callable[[str], None]) -> Iterator[str]:
    """A block in which no other job works on ``what``, whose files lie in ``folder``; it gets the path of this
    job's sign. Waits where a job that was killed has left its own. Raises ConfigError where another job is at work on
    it."""
    filesystem, base = open_filesystem(folder)
    signs = f"{base}/{FOLDER}"
    mine = f"{signs}/{uuid.uuid4().hex}"
    ended = threading.Event()
    me = {**_machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}

    def put(count: int) -> None:
        with filesystem.open_output_stream(mine) as stream:
            stream.write(json.dumps(me | {"count": count}).encode())

    def renew() -> None:
        count = 0
        while not ended.wait(RENEW_SECONDS):
            count += 1
            with suppress(OSError):  # the next time, perhaps; training does not fail for it
                put(count)

    filesystem.create_dir(signs, recursive=True)
    put(0)
    thread = threading.Thread(target=renew, name="roo-ray-at-work", daemon=True)
    thread.start()
    try:
        _require_alone(filesystem, signs, mine, what, say)
        yield mine
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            filesystem.delete_file(mine)
        if isinstance(filesystem, pafs.LocalFileSystem):
            with suppress(OSError):
                os.rmdir(signs)


def _require_alone(filesystem: pafs.FileSystem, signs: str, mine: str, what: str, say: Callable[[str], None]) -> None:
    first = _others(filesystem, signs, mine)
    give_up = time.monotonic() + DEAD_SECONDS
    if first:
        say(f"waiting up to {DEAD_SECONDS:.0f} s: another job has worked on {what}; is it still at it?")
    while left := {path: sign for path, sign in _others(filesystem, signs, mine).items() if path in first}:
        for path, sign in left.items():
            if sign != first[path] or _is_here(sign):
                raise ConfigError(
                    f"another job is at work on {what}: process {sign.get('pid')} on {sign.get('host')}; wait for it, "
                    "stop it, or choose another run_name"
                )
        if time.monotonic() > give_up:
            for path in left:
                with suppress(OSError):
                    filesystem.delete_file(path)
            return
        time.sleep(LOOK_SECONDS)


def _others(filesystem: pafs.FileSystem, signs: str, mine: str) -> dict[str, dict[str, Any]]:
    """The signs of other jobs, by path; those of processes of this machine that are gone are removed."""
    found = {}
    for item in filesystem.get_file_info(pafs.FileSelector(signs, allow_not_found=True)):
        if item.type != pafs.FileType.File or os.path.basename(item.path) == os.path.basename(mine):
            continue
        try:
            with filesystem.open_input_stream(item.path) as stream:
                sign = json.loads(bytes(stream.read()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            sign = {}  # being written, or out of reach
        if _is_gone(sign):
            with suppress(OSError):
                filesystem.delete_file(item.path)
            continue
        found[item.path] = sign
    return found


def _machine() -> dict[str, Any]:
    """Where process ids mean the same: containers have their own, whatever they call themselves."""
    with suppress(OSError):
        return {"host": socket.gethostname(), "processes": os.stat("/proc/self/ns/pid").st_ino}
    return {"host": socket.gethostname(), "processes": 0}


def _is_gone(sign: dict[str, Any]) -> bool:
    return bool(sign) and _machine().items() <= sign.items() and not _is_here(sign)


def _is_here(sign: dict[str, Any]) -> bool:
    if not sign or not _machine().items() <= sign.items():
        return False
    try:
        started: float = psutil.Process(sign["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    return abs(started - float(sign["started"])) < 1
