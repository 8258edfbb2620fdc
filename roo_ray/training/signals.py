"""SIGTERM: to a worker, a spot instance's notice; to the driver, the wish that the job ends.

Neither ends a process at once: both set a flag, which the ranks agree on in their next step, of training or of an
evaluation. Where no worker is there to take a step, the driver ends by itself.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from roo_ray.errors import Stopped
from roo_ray.grace import stop_limit_s

SILENCE_S = 20.0  # a worker asks twice a second; a busy machine may let it wait
ABORT_S = 5.0

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
    """Asks the job's board in a thread, twice a second, whether the job is to end; until it is closed, so that the
    board knows that workers run."""

    def __init__(self, board: Any, every_seconds: float = 0.5) -> None:
        self.stop = threading.Event()
        self._done = threading.Event()

        def watch() -> None:
            while not self._done.wait(every_seconds):
                try:
                    if ray.get(board.stopping.remote(), timeout=10):
                        self.stop.set()
                except ray.exceptions.RayError:
                    pass  # the board's node is gone, the job goes on

        threading.Thread(target=watch, name="roo-ray-stop", daemon=True).start()

    def close(self) -> None:
        """Asks no more."""
        self._done.set()


class _Forward:
    """The driver's answer to SIGTERM while workers run, or should."""

    def __init__(self, board: Any, silence_s: float) -> None:
        self.board, self.silence_s, self.limit_s = board, silence_s, stop_limit_s()
        self.before = signal.getsignal(signal.SIGTERM)
        self.over = threading.Event()
        self.gave_up: str | None = None
        self._began = False
        self._lock = threading.Lock()

    def handle(self, number: int, frame: Any) -> None:
        """The first SIGTERM is handed on to the workers; the next one does what it did before."""
        if self.gave_up is not None:
            raise KeyboardInterrupt  # any other exception ray.get would print and go on waiting
        if not self._began:
            self._began = True
            threading.Thread(target=self._hand_on, name="roo-ray-stop", daemon=True).start()
            return
        signal.signal(signal.SIGTERM, self.before)
        signal.raise_signal(signal.SIGTERM)

    def _hand_on(self) -> None:
        begin, why = time.monotonic(), None
        self.board.stop.remote()
        while why is None and not self.over.wait(0.5):
            try:
                silent = ray.get(self.board.silent_seconds.remote(), timeout=self.silence_s)
            except ray.exceptions.RayError:
                silent = math.inf
            if silent > self.silence_s:
                why = "no worker runs that could write a checkpoint (they wait for nodes, or are gone)"
            elif time.monotonic() - begin > self.limit_s:
                why = f"the workers took no step for {self.limit_s:.0f} s, and SIGKILL is near"
        if why is not None:
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        """Ends Ray Train's run as Ctrl-C does, and interrupts the main thread, which waits for it."""
        self.gave_up = f"{why}; the same run_name goes on from the last checkpoint"
        abort = signal.getsignal(signal.SIGINT)
        if callable(abort) and abort is not signal.default_int_handler:
            aborting = threading.Thread(target=abort, args=(signal.SIGINT, None), daemon=True)
            aborting.start()
            aborting.join(ABORT_S)
        with self._lock:
            if not self.over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def end(self) -> None:
        """Puts back what was there before."""
        with self._lock:
            self.over.set()
        signal.signal(signal.SIGTERM, self.before)


@contextmanager
def forward_terminate(board: Any, silence_s: float = SILENCE_S) -> Iterator[None]:
    """Hands the first SIGTERM to this process, while the block runs Ray Train, on to the workers by the job's
    ``board``; the next one does what it did before. Does nothing outside the main thread.

    Raises Stopped where no worker asks the board for ``silence_s`` (there may be none, and Ray Train wait for nodes
    for ever), and shortly before the head's grace period ends: what is open can still be closed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    forward = _Forward(board, silence_s)
    signal.signal(signal.SIGTERM, forward.handle)
    try:
        yield
    except BaseException:
        if forward.gave_up is not None:
            raise Stopped(forward.gave_up) from None  # whatever the end of Ray Train's run has raised
        raise
    finally:
        forward.end()
