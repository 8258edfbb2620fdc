"""SIGTERM to the driver, with workers that answer, that do not, and that are not there; and the end of a job of which
no worker runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import ray
from ray.util import placement_group_table

from roo_ray.config import RaySettings, Training
from roo_ray.errors import NoWorkers, Stopped
from roo_ray.grace import GRACE_VARIABLE, stop_limit_s
from roo_ray.training.progress import progress_board
from roo_ray.training.signals import StopWatch, forward_terminate, watch_workers
from roo_ray.training.waiting import Waiting


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


class Asked(Exception):
    """What ``another_handler`` raises."""


@contextmanager
def another_handler() -> Iterator[None]:
    """A program's own handler of SIGTERM, which must be there again at the end."""

    def handle(number: int, frame: Any) -> None:
        raise Asked

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)


def workers(board: Any) -> StopWatch:
    """Rank 0's ear."""
    return StopWatch(board, every_seconds=0.1)


def test_workers_that_run_are_waited_for(board: Any) -> None:
    """As long as they ask, and the time until SIGKILL allows it."""
    before = signal.getsignal(signal.SIGTERM)
    with workers(board) as stop, forward_terminate(board, silence_s=1.0):
        assert not stop.wait(0.5)
        terminate()
        assert stop.wait(20)
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
    with another_handler(), pytest.raises(Asked), forward_terminate(board, silence_s=60.0):
        terminate(2)


# ---- no SIGTERM ------------------------------------------------------------------------------------------

LIMIT_S = 2.0


def waiting(say: Any = print, limit_s: float = LIMIT_S, **settings: Any) -> Waiting:
    """With a limit that a config would not be allowed."""
    ray_settings = RaySettings(**settings).model_copy(update={"wait_for_workers_s": limit_s})
    return Waiting(ray_settings, Training(workers=2), say, "Submit it again")


@pytest.mark.parametrize("watched", [forward_terminate, watch_workers])
def test_a_job_of_which_no_worker_runs_ends(board: Any, watched: Any) -> None:
    """The error says what it has waited for, and what is there."""
    before = signal.getsignal(signal.SIGTERM)
    board.expect_workers.remote()
    begin = time.monotonic()
    with (
        a_run_without_end() as run,
        pytest.raises(NoWorkers) as error,
        watched(board, waiting(worker_labels={"role": "nobody"}, worker_resources={"fast": 1})),
    ):
        ray.get(run)
    assert LIMIT_S < time.monotonic() - begin < LIMIT_S + 10
    wanted = "waits for 2 workers of 1 CPU, 1 fast on nodes with ray.worker_labels {'role': 'nobody'}, and the cluster "
    there = "has 0 such nodes with room for 0, with 4 CPU, 0 fast free on all nodes together. See ray status"
    assert wanted + there in str(error.value)
    assert str(error.value).endswith("Submit it again")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("watched", [forward_terminate, watch_workers])
def test_workers_that_run_may_take_their_time(board: Any, watched: Any) -> None:
    """However long their model takes to build, or a step; and Ray Train for the end, when they have come to theirs."""
    with watched(board, waiting()):
        with workers(board):
            time.sleep(2 * LIMIT_S)
        assert ray.get(board.silent_seconds.remote()) < 0
        time.sleep(2 * LIMIT_S)
        board.expect_workers.remote()  # evicted, they are started again
        assert ray.get(board.silent_seconds.remote()) >= 0


def test_workers_that_were_lost_are_waited_for_until_the_limit(board: Any) -> None:
    with suppress(ConnectionError), workers(board):
        raise ConnectionError("a node is gone")
    assert 0 < ray.get(board.silent_seconds.remote()) < LIMIT_S
    with a_run_without_end() as run, pytest.raises(NoWorkers), forward_terminate(board, waiting()):
        ray.get(run)


def test_an_evaluation_is_ended_by_sigterm_as_it_was(board: Any) -> None:
    with another_handler(), pytest.raises(Asked), watch_workers(board, waiting()):
        terminate()


def test_nodes_with_the_fall_back_labels_are_asked_for(local_ray: None) -> None:
    """For the workers that no node is there for, as long as none runs. That an autoscaler brings them, and the run goes
    on there, is in test_lost_node."""
    said: list[str] = []
    settings: dict[str, Any] = {"fall_back_labels": {"market": "on_demand"}, "fall_back_after_s": 5}
    waits = waiting(said.append, 60.0, worker_labels={"role": "nobody"}, wait_for_nodes_s=60, **settings)
    known = set(placement_group_table())

    def requests() -> list[dict[int, dict[str, float]]]:
        found = placement_group_table()
        new = [one for name, one in found.items() if name not in known]
        return [one["bundles"] for one in new if one["state"] != "REMOVED"]

    assert waits.look(4.0) is None
    assert requests() == []
    for seconds in (6.0, 7.0):
        assert waits.look(seconds) is None
        assert requests() == [{0: {"CPU": 1.0}, 1: {"CPU": 1.0}}]
    assert said == [
        "no worker has run for 5 s: asking for nodes with {'market': 'on_demand'} for 2 of 2 workers",
    ]
    assert waits.look(0.0) is None  # workers run
    assert requests() == []

    there = waiting(said.append, 60.0, wait_for_nodes_s=60, **settings)  # room for both: they are slow to start
    no_autoscaler = waiting(said.append, 60.0, worker_labels={"role": "nobody"}, **settings)
    for one in (there, no_autoscaler):
        assert one.look(6.0) is None
        assert requests() == []
    assert len(said) == 1
