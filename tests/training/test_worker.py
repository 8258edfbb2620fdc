"""What a worker does about a checkpoint that cannot be written, and about batches that are left out."""

from __future__ import annotations

import resource
import signal
from typing import Any

import pyarrow.fs as pafs
import pytest

from roo_ray.config import Training
from roo_ray.errors import RooError, TrainingDiverged
from roo_ray.training.saver import Saver, name_of
from roo_ray.training.summary import not_finite_rows
from roo_ray.training.worker import Worker
from tests.training.ranks import run_ranks, sharded_model
from tests.training.test_saver import _state


class Lines:
    """A worker's log."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))


def bare_worker(**parts: Any) -> tuple[Worker, list[str]]:
    """A worker of one rank that has nothing but these parts, and what it says."""
    worker, said = Worker.__new__(Worker), list[str]()
    worker.logger = Lines()  # type: ignore[assignment]
    worker.say = said.append  # type: ignore[method-assign]
    worker.tasks, worker.failed_saves, worker.steps_done, worker.skipped = ["click"], 0, 7, 0
    for name, value in parts.items():
        setattr(worker, name, value)
    return worker, said


def _save_to_a_full_disk(rank: int, world: int, folder: str) -> dict[str, Any]:
    model = sharded_model()
    saver = Saver(pafs.LocalFileSystem(), folder, rank, world)
    worker, said = bare_worker(saver=saver, folder=folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    for step in (1, 2):
        saver.begin(name_of(0, step), model, _state(step), {})
        worker.collect()  # training goes on
    saver.begin(name_of(0, 3), model, _state(3), {})
    try:
        worker.collect(required=True)
        error = ""
    except RooError as problem:
        error = str(problem)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"said": said, "logged": worker.logger.logged, "error": error, "busy": saver.busy}  # type: ignore[attr-defined]


def test_a_checkpoint_that_cannot_be_written_is_counted_and_only_a_required_one_is_an_error(tmp_path: Any) -> None:
    [result] = run_ranks(1, _save_to_a_full_disk, str(tmp_path))
    assert [values["checkpoint/failed"] for values, _ in result["logged"]] == [1, 2, 3]
    assert len(result["said"]) == 1  # further ones are counted
    assert "epoch-0000-step-00000001 could not be written" in result["said"][0]
    assert "Training goes on" in result["said"][0]
    assert "epoch-0000-step-00000003 could not be written" in result["error"]
    assert "run again with the same run_name" in result["error"]
    assert not result["busy"]
    assert list(tmp_path.glob("epoch-*")) == []


def test_batches_that_are_left_out_are_counted_up_to_a_limit() -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(training=Training(on_nan="skip", max_nan_batches=2))
    worker, said = bare_worker(config=config)
    worker.count_skipped()
    worker.count_skipped()
    assert [values for values, _ in worker.logger.logged] == [  # type: ignore[attr-defined]
        {"train/not_finite_batches": 1.0},
        {"train/not_finite_batches": 2.0},
    ]
    assert "(2 of 2)" in said[1]
    with pytest.raises(TrainingDiverged, match=r"more than training.max_nan_batches=2 batches .* at step 7"):
        worker.count_skipped()
    assert worker.skipped == 3


def test_what_was_left_out_is_in_the_closing_table() -> None:
    assert not_finite_rows({"epoch/requests": 5.0}) == []
    rows = not_finite_rows({"epoch/not_finite_batches": 2.0, "epoch/not_finite_requests": 1234.0})
    assert rows == [["left out, loss not finite", "2 batches, 1,234 requests"]]
