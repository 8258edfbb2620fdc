"""SIGTERM: to a worker, a spot instance's notice; to the driver, the wish that the job ends.

Neither ends a process at once: both set a flag, which the ranks agree on in their next step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

_notice = threading.Event()


def _install() -> None:
    """In a process's main thread: the first SIGTERM sets the flag, the next one does what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    _notice.clear()

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        _notice.set()

    signal.signal(signal.SIGTERM, handle)


def watch_worker() -> threading.Event:
    """The flag of this worker process. Training runs in a thread, and Python sets handlers in the main thread alone:
    there Ray runs an actor's methods, and ``execute`` is one of Ray Train's worker."""
    ray.get(ray.get_runtime_context().current_actor.execute.remote(_install))
    return _notice


class StopWatch:
    """Asks the job's board in a thread, twice a second, whether the job is to end."""

    def __init__(self, board: Any, every_seconds: float = 0.5) -> None:
        self.stop = threading.Event()
        self._done = threading.Event()

        def watch() -> None:
            while not self._done.wait(every_seconds) and not self.stop.is_set():
                try:
                    if ray.get(board.stopping.remote(), timeout=10):
                        self.stop.set()
                except ray.exceptions.RayError:
                    pass  # the board's node is gone, the job goes on

        threading.Thread(target=watch, name="roo-ray-stop", daemon=True).start()

    def close(self) -> None:
        """Asks no more."""
        self._done.set()


@contextmanager
def on_terminate(action: Callable[[], None]) -> Iterator[None]:
    """Calls ``action`` on the first SIGTERM to this process while the block runs; the next one does what it did
    before. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        threading.Thread(target=action, daemon=True).start()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
