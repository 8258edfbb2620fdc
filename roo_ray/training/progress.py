"""Progress lines from workers to the terminal of the job, whatever node the workers run on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roo_ray.errors import BadInput, TrainingDiverged
from roo_ray.redact import redact_text

Say = Callable[[str], None]

CLOSING_S = 3600.0  # what Ray Train may take for its end of a run once the workers have ended theirs


def make_say(stream: Any = None) -> Say:
    """A printer of progress lines, each with the seconds since the job began, without credentials of URIs."""
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f}s] {redact_text(line)}", file=stream or sys.stdout, flush=True)

    return say


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds lines until the driver fetches them."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._kept: dict[str, float] = {}
        self._stopping = False
        self._asked = time.monotonic()
        self._outcome: Exception | None = None

    def stop(self) -> None:
        """The job is to end after a last checkpoint."""
        self._stopping, self._asked = True, time.monotonic()

    def stopping(self) -> bool:
        """Whether the job is to end: the workers ask it all the time."""
        self._asked = time.monotonic()
        return self._stopping

    def expect_workers(self) -> None:
        """Ray Train is to start workers: from here on they are waited for."""
        self._asked = time.monotonic()

    def ended(self) -> None:
        """The workers have come to their end, and ask no more; none is waited for while Ray Train closes the run."""
        self._asked = time.monotonic() + CLOSING_S

    def silent_seconds(self) -> float:
        """How long no worker has asked that should have; negative after the workers' end."""
        return time.monotonic() - self._asked

    def end_with(self, error: Exception) -> None:
        """Holds the error that the workers, all together, ended for, or that one met in its input."""
        self._outcome = error

    def is_final(self) -> bool:
        """Whether that error would come again, so that workers which are started anew need not begin."""
        self._asked = time.monotonic()
        return isinstance(self._outcome, (BadInput, TrainingDiverged))

    def outcome(self) -> Exception | None:
        """That error, if any, once."""
        outcome, self._outcome = self._outcome, None
        return outcome

    def keep(self, result: dict[str, float]) -> None:
        """Holds a result for the driver (Ray Train hands metrics on with checkpoints alone)."""
        self._kept = result

    def kept(self) -> dict[str, float]:
        """The last result held."""
        return self._kept

    def post(self, line: str) -> None:
        """Adds a line."""
        self._lines.append(line)

    def drain(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


@contextmanager
def progress_board(say: Say, every_seconds: float = 0.5) -> Iterator[Any]:
    """A board whose lines are printed by ``say`` while the block runs; yields the actor handle for workers.

    It lives on the driver's node: a run must outlive every other one, and asks it at its end how it ended.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ProgressBoard.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    done = threading.Event()

    def print_new_lines() -> None:
        try:
            for line in ray.get(board.drain.remote(), timeout=10):
                say(line)
        except ray.exceptions.RayError:
            pass  # the lines are lost with the actor's node; the job itself goes on

    def watch() -> None:
        while not done.wait(every_seconds):
            print_new_lines()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        done.set()
        thread.join()
        print_new_lines()
        ray.kill(board)
