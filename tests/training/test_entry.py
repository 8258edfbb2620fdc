"""How a rank's life ends: an error in its input is held for the driver, and no later start tries it again."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from roo_ray.errors import ConfigError, DataError, RooError, StorageError
from roo_ray.training import entry
from roo_ray.training.causes import cause_of
from roo_ray.training.progress import ProgressBoard


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A real board, called in this process."""
    held = ProgressBoard.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    monkeypatch.setattr(entry.ray, "get", lambda value: value)
    names = ("is_final", "end_with", "outcome")
    return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(held, name)) for name in names})


def _starts(monkeypatch: pytest.MonkeyPatch, board: Any, error: Exception) -> int:
    """How many of four starts, as Ray Train makes them after failures, begin to work."""
    begun = 0

    def fail(job: Any) -> None:
        nonlocal begun
        begun += 1
        raise error

    monkeypatch.setattr(entry, "run_worker", fail)
    for _ in range(4):
        with suppress(type(error)):
            entry.train_worker({"job": SimpleNamespace(board=board)})
    return begun


@pytest.mark.parametrize("kind", [DataError, ConfigError])
def test_an_error_in_the_input_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, board: Any, kind: Any) -> None:
    assert _starts(monkeypatch, board, kind("shard 7 has no column 'item_id'")) == 1
    outcome = board.outcome.remote()
    assert type(outcome) is kind
    assert "shard 7" in str(outcome)


def test_what_a_task_met_is_an_error_in_the_input_too(monkeypatch: pytest.MonkeyPatch, board: Any) -> None:
    """Ray wraps it."""
    task = ray.exceptions.RayTaskError("read", "a long trace", DataError("shard 7")).as_instanceof_cause()
    assert type(cause_of([task])) is DataError
    assert _starts(monkeypatch, board, task) == 1
    assert str(board.outcome.remote()) == "shard 7"


def test_another_failure_is_tried_again(monkeypatch: pytest.MonkeyPatch, board: Any) -> None:
    assert _starts(monkeypatch, board, RuntimeError("a connection was closed")) == 4
    assert _starts(monkeypatch, board, RooError("the storage is full")) == 4
    assert _starts(monkeypatch, board, StorageError("shard 7 cannot be read (connection reset)")) == 4
    assert board.outcome.remote() is None
