"""SIGTERM to the driver, with workers that answer, that do not, and that are not there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from roo_ray.errors import Stopped
from roo_ray.grace import GRACE_VARIABLE, stop_limit_s
from roo_ray.training.progress import progress_board
from roo_ray.training.signals import StopWatch, forward_terminate


@pytest.fixture(scope="module")
def board(local_ray: None) -> Iterator[Any]:
    with progress_board(lambda line: None) as board:
        assert not ray.get(board.stopping.remote())
        yield board


@contextmanager
def a_run_without_end() -> Iterator[Any]:
    """What the driver waits for: a task for which there is no node."""
    task = ray.remote(num_cpus=0, resources={"nobody": 1}, max_retries=0)(lambda: None)
    run = task.remote()
    try:
        yield run
    finally:
        ray.cancel(run)


def terminate(times: int = 1, run: Any = None) -> None:
    """Sends this process SIGTERM; then waits for the run, if any."""
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)
    if run is not None:
        ray.get(run)


@contextmanager
def workers(board: Any) -> Iterator[StopWatch]:
    """Rank 0's ear."""
    watch = StopWatch(board, every_seconds=0.1)
    try:
        yield watch
    finally:
        watch.close()


def test_workers_that_run_are_waited_for(board: Any) -> None:
    """As long as they ask, and the time until SIGKILL allows it."""
    before = signal.getsignal(signal.SIGTERM)
    with workers(board) as watch, forward_terminate(board, silence_s=1.0):
        assert not watch.stop.wait(0.5)
        terminate()
        assert watch.stop.wait(20)
        time.sleep(2)  # a checkpoint that takes longer than the silence
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_workers_the_driver_ends_by_itself(board: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        a_run_without_end() as run,
        pytest.raises(Stopped, match="no worker runs"),
        forward_terminate(board, silence_s=1.0),
    ):
        terminate(run=run)
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_that_take_no_step_are_not_waited_for_until_sigkill(
    board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GRACE_VARIABLE, "2")
    assert stop_limit_s() == 1.5
    with (
        workers(board),
        a_run_without_end() as run,
        pytest.raises(Stopped, match="took no step for 2 s"),
        forward_terminate(board, silence_s=30.0),
    ):
        terminate(run=run)


def test_a_second_signal_does_what_it_did_before(board: Any) -> None:
    class Asked(Exception):
        pass

    def handle(number: int, frame: Any) -> None:
        raise Asked

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(Asked), forward_terminate(board, silence_s=60.0):
            terminate(2)
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)
