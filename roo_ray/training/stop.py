"""Stopping a run from outside: SIGTERM at the driver (``ray job stop``, an eviction) reaches the trainers, who take
one last checkpoint, all at the same step, and end. Submitting again with the same run name goes on there.

    driver: ``with stop_bell(say) as bell:``     SIGTERM rings the bell
    rank 0: ``StopWatch(bell).asked()``          before each step; travels in the step's own all-reduce

How long the driver has between SIGTERM and SIGKILL is set where the head starts: ``RAY_JOB_STOP_WAIT_TIME_S``
(3 s by default, which no checkpoint fits in; the files in cluster/ set it, jobs/preflight.py checks it).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray

GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
RAY_DEFAULT_GRACE_S = 3
SECONDS_BETWEEN_LOOKS = 0.2


@ray.remote(num_cpus=0)
class _Bell:
    def __init__(self) -> None:
        self.is_rung = False

    def ring(self) -> None:
        self.is_rung = True

    def rung(self) -> bool:
        return self.is_rung


class StopBell:
    """The driver's side. ``handle``: an actor, for ``StopWatch``. ``rung``: a stop was asked for."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.handle: Any = _Bell.remote()  # type: ignore[attr-defined]
        self.rung = False
        self._say = say
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="stop-bell", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """Asks the trainers to stop; returns at once, safe in a signal handler."""
        self.rung = True
        self._asked.set()

    def close(self) -> None:
        """Ends the thread and the actor."""
        self._asked.set()
        self._thread.join(timeout=10)
        with suppress(ray.exceptions.RayError):
            ray.kill(self.handle)

    def _forward(self) -> None:
        self._asked.wait()
        if self.rung:
            self._say("stopping: the trainers take a last checkpoint")
            with suppress(ray.exceptions.RayError):
                ray.get(self.handle.ring.remote(), timeout=60)


@contextmanager
def stop_bell(say: Callable[[str], None]) -> Iterator[StopBell]:
    """A bell that SIGTERM rings while the block runs (only in the main thread can a handler be set). A second
    SIGTERM ends the process as before."""
    bell = StopBell(say)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        bell.ring()
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)

    if in_main_thread:
        signal.signal(signal.SIGTERM, on_signal)
    try:
        yield bell
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        bell.close()


class StopWatch:
    """A rank's side: whether a stop was asked for, without ever waiting: the answer to the last question is taken
    when it is there, and the next is put at most every ``every_seconds``. ``bell`` None: never."""

    def __init__(self, bell: Any, every_seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        self._bell = bell
        self._every = every_seconds
        self._next = 0.0
        self._question: Any = None
        self._rung = False

    def asked(self) -> bool:
        """True from the first answer that says so."""
        if self._bell is None or self._rung:
            return self._rung
        now = time.monotonic()
        if self._question is None and now >= self._next:
            self._question, self._next = self._bell.rung.remote(), now + self._every
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):  # a bell lost with the driver's node: the run goes on
                self._rung = bool(ray.get(self._question))
            self._question = None
        return self._rung


def grace_seconds() -> float:
    """Seconds that a job which is stopped has on this node, if it is the head."""
    try:
        return float(os.environ.get(GRACE_VARIABLE, RAY_DEFAULT_GRACE_S))
    except ValueError:
        return RAY_DEFAULT_GRACE_S
