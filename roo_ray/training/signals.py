"""SIGTERM: to a worker, a spot instance's notice; to the driver, the wish that the job ends.

Neither ends a process at once: both set a flag, which the ranks agree on in their next step, of training or of an
evaluation. Where no worker is there to take a step, the driver ends by itself; without a SIGTERM, too, where none has
been there for long (``waiting``).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

from roo_ray.errors import RooError, Stopped
from roo_ray.grace import stop_limit_s
from roo_ray.training.waiting import Waiting

SILENCE_S = 20.0  # a worker asks twice a second; a busy machine may let it wait
ASK_S = 10.0  # for an answer
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
    """While the block runs, asks the job's board in a thread, twice a second, whether the job is to end: so the board
    knows that workers run. ``__enter__`` gives the flag."""

    def __init__(self, board: Any, every_seconds: float = 0.5) -> None:
        self._stop = threading.Event()
        self._done = threading.Event()
        self._well = False

        def watch() -> None:
            while not self._done.wait(every_seconds):
                with suppress(ray.exceptions.RayError):  # the board's node is gone, the job goes on
                    if ray.get(board.stopping.remote(), timeout=ASK_S):
                        self._stop.set()
            if self._well:
                with suppress(ray.exceptions.RayError):
                    ray.get(board.ended.remote(), timeout=ASK_S)

        self._thread = threading.Thread(target=watch, name="roo-ray-stop", daemon=True)

    def __enter__(self) -> threading.Event:
        self._thread.start()
        return self._stop

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._well = kind is None
        self._done.set()
        self._thread.join(2 * ASK_S)


class _Watch:
    """What the driver does while Ray Train runs, or waits for nodes: it looks whether workers run, and answers SIGTERM
    where it ``hands_on`` that signal."""

    def __init__(self, board: Any, waiting: Waiting | None, hands_on: bool, silence_s: float) -> None:
        self.board, self.waiting, self.hands_on, self.silence_s = board, waiting, hands_on, silence_s
        self.limit_s = stop_limit_s()
        self.before = signal.getsignal(signal.SIGTERM)
        self.gave_up: RooError | None = None
        self._told = threading.Event()
        self._told_at: float | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="roo-ray-watch", daemon=True)
        signal.signal(signal.SIGTERM, self._handle)
        self._thread.start()

    def _handle(self, number: int, frame: Any) -> None:
        """The first SIGTERM is handed on to the workers; the next one does what it did before."""
        if self.gave_up is not None:
            raise KeyboardInterrupt  # any other exception ray.get would print and go on waiting
        if self.hands_on and not self._told.is_set():
            self._told.set()
            return
        signal.signal(signal.SIGTERM, self.before)
        signal.raise_signal(signal.SIGTERM)

    def _watch(self) -> None:
        error = None
        while error is None and not self._over.wait(0.5):
            if self._told.is_set() and self._told_at is None:
                self._told_at = time.monotonic()
                self.board.stop.remote()
            try:
                error = self._look()
            except Exception:  # Ray is busy, or its head away: it is asked again, and a SIGTERM still handed on
                continue
        if self.waiting is not None:
            with suppress(Exception):
                self.waiting.close()
        if error is not None:
            self._give_up(error)

    def _look(self) -> RooError | None:
        """The error to end with, if it is time."""
        if self._told_at is None:
            silent = ray.get(self.board.silent_seconds.remote(), timeout=self.silence_s)
            return self.waiting.look(silent) if self.waiting is not None else None
        try:
            silent = ray.get(self.board.silent_seconds.remote(), timeout=self.silence_s)
        except ray.exceptions.RayError:
            silent = math.inf
        if silent > self.silence_s:
            why = "no worker runs that could write a checkpoint (they wait for nodes, or are gone)"
        elif time.monotonic() - self._told_at > self.limit_s:
            why = f"the workers took no step for {self.limit_s:.0f} s, and SIGKILL is near"
        else:
            return None
        return Stopped(f"{why}; the same run_name goes on from the last checkpoint")

    def _give_up(self, error: RooError) -> None:
        """Ends Ray Train's run as Ctrl-C does, and interrupts the main thread, which waits for it."""
        self.gave_up = error
        abort = signal.getsignal(signal.SIGINT)
        if callable(abort) and abort is not signal.default_int_handler:
            aborting = threading.Thread(target=abort, args=(signal.SIGINT, None), daemon=True)
            aborting.start()
            aborting.join(ABORT_S)
            if not aborting.is_alive():
                self._over.wait(ABORT_S)  # the main thread learns of it by itself
        with self._lock:
            if not self._over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def end(self) -> None:
        """Looks no more, and puts back what was there before."""
        with self._lock:
            self._over.set()
        signal.signal(signal.SIGTERM, self.before)
        self._thread.join(ABORT_S)


@contextmanager
def _watching(board: Any, waiting: Waiting | None, hands_on: bool, silence_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(board, waiting, hands_on, silence_s)
    try:
        yield
    except BaseException:
        if watch.gave_up is not None:
            raise watch.gave_up from None  # whatever the end of Ray Train's run has raised
        raise
    finally:
        watch.end()


@contextmanager
def watch_workers(board: Any, waiting: Waiting) -> Iterator[None]:
    """While the block runs Ray Train: does what is to be done where no worker asks the job's ``board``, and raises
    NoWorkers when ``waiting`` says so. Does nothing outside the main thread."""
    with _watching(board, waiting, hands_on=False, silence_s=SILENCE_S):
        yield


@contextmanager
def forward_terminate(board: Any, waiting: Waiting | None = None, silence_s: float = SILENCE_S) -> Iterator[None]:
    """As ``watch_workers``, and hands the first SIGTERM to this process on to the workers by the job's ``board``; the
    next one does what it did before. Does nothing outside the main thread.

    Raises Stopped where, after a SIGTERM, no worker asks the board for ``silence_s`` (there may be none, and Ray Train
    wait for nodes), and shortly before the head's grace period ends: what is open can still be closed.
    """
    with _watching(board, waiting, hands_on=True, silence_s=silence_s):
        yield
