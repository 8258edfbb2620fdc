"""Tracking writes one MLflow run per job and name, logs no step twice, and refuses SQLite on several nodes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.errors import ClusterError, ConfigError
from roo_ray.training import tracking
from roo_ray.training.tracking import (
    COMMIT_VARIABLE,
    TRAINED_TAG,
    RunHandle,
    RunLogger,
    find_run,
    open_run,
    tracking_uri,
    where_to_look,
)
from tests.cluster.heads import ROOT


@pytest.fixture
def store(tmp_path: Path) -> Tracking:
    return Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="tests")


def test_run_is_written_and_reopened_by_name(store: Tracking, tmp_path: Path) -> None:
    first = open_run(store, "train", "a", nodes=1)
    logger = RunLogger(first)
    logger.params({"model": {"dim": 32}, "name": "x"})
    logger.metrics({"train/loss": 0.5, "train/nan": math.nan, "train/none": None}, step=1)
    logger.metrics({"train/loss": 0.4}, step=2)
    logger.end(False)

    again = open_run(store, "train", "a", nodes=1, reopen=True)
    assert again == first
    assert open_run(store, "evaluate", "a", nodes=1, reopen=True).run_id != first.run_id
    assert open_run(store, "train", "a", nodes=1).run_id != first.run_id
    resumed = RunLogger(again)
    assert resumed.params({"name": "y", "model": {"dim": 32}}) == {"name": ("x", "y")}
    for step in (1, 2, 3):  # 1 and 2 are replayed after a restart
        resumed.metrics({"train/loss": 0.1 * step}, step=step)
    resumed.end(True)

    client = MlflowClient(store.uri)
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model.dim": "32", "name": "x"}
    assert set(run.data.metrics) == {"train/loss"}
    points = {p.step: p.value for p in client.get_metric_history(first.run_id, "train/loss")}
    assert points == pytest.approx({1: 0.5, 2: 0.4, 3: 0.3})
    assert len(client.get_metric_history(first.run_id, "train/loss")) == 3
    assert first.run_id in where_to_look(first)


def test_a_run_whose_storage_was_removed_gets_a_new_run(store: Tracking) -> None:
    """What is trained anew is not hidden behind the old figures; a run that only built its data goes on."""
    built = open_run(store, "train", "c", nodes=1, reopen=True, begun=False)
    assert open_run(store, "train", "c", nodes=1, reopen=True, begun=False) == built
    logger = RunLogger(built)
    logger.tags({TRAINED_TAG: "d"})
    logger.metrics({"train/loss": 0.9}, 1)
    logger.end(True)
    assert open_run(store, "train", "c", nodes=1, reopen=True) == built
    anew = open_run(store, "train", "c", nodes=1, reopen=True, begun=False)
    assert anew.run_id != built.run_id
    assert open_run(store, "train", "c", nodes=1, reopen=True) == anew
    logger = RunLogger(anew)
    logger.metrics({"train/loss": 0.5}, 1)
    logger.end(True)
    client = MlflowClient(store.uri)
    assert [client.get_run(of.run_id).data.metrics["train/loss"] for of in (built, anew)] == [0.9, 0.5]
    assert find_run(store, anew.run_id) == anew


def test_a_job_is_tracked_where_there_is_no_git(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the images, which say the commit of their code by themselves; a working directory's is not theirs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(COMMIT_VARIABLE, "0123abcd\n")
    unknown = open_run(store, "build", "a", nodes=1)
    monkeypatch.setattr(tracking, "__file__", "/usr/lib/python3.11/site-packages/roo_ray/training/tracking.py")
    known = open_run(store, "build", "b", nodes=1)
    client = MlflowClient(store.uri)
    assert "mlflow.source.git.commit" not in client.get_run(unknown.run_id).data.tags
    assert client.get_run(known.run_id).data.tags["mlflow.source.git.commit"] == "0123abcd"


@pytest.mark.parametrize(("place", "commit"), [("site-packages", "0123abcd"), ("working_dir", "")])
def test_the_image_says_the_commit_of_its_own_code_alone(place: str, commit: str, tmp_path: Path) -> None:
    """A submitted working directory comes before it, and Ray leaves its ``.git`` behind."""
    (tmp_path / place).mkdir()
    (tmp_path / place / "roo_ray").symlink_to(ROOT / "roo_ray")
    code = "from roo_ray.training import tracking; print(tracking.__file__, tracking.source_commit(), sep='\\n')"
    env = os.environ | {"PYTHONPATH": str(tmp_path / place), COMMIT_VARIABLE: "0123abcd"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    file, said = done.stdout.removesuffix("\n").split("\n")
    assert Path(file).is_relative_to(tmp_path / place)
    assert said == commit


def test_artifacts(store: Tracking) -> None:
    handle = open_run(store, "train", "b", nodes=1)
    logger = RunLogger(handle)
    logger.text("name: x\n", "schema.yaml")
    logger.json({"a": 1}, "ledger.json")
    assert logger.flush()
    names = {item.path for item in MlflowClient(store.uri).list_artifacts(handle.run_id)}
    assert names == {"schema.yaml", "ledger.json"}


def test_tracking_off_does_nothing() -> None:
    handle = open_run(Tracking(enabled=False), "train", "x", nodes=5)
    assert handle == RunHandle(None)
    logger = RunLogger(handle)
    logger.params({"a": 1})
    logger.metrics({"b": 1.0})
    logger.end(True)


def test_a_server_that_is_down_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no MLflow server answers at http://127.0.0.1:9 .*tracking.enabled=false"):
        open_run(Tracking(uri="http://127.0.0.1:9"), "train", "a", nodes=1)


def test_sqlite_on_several_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"3 nodes and the MLflow store is an SQLite file.*start a server"):
        tracking_uri(Tracking(), nodes=3)
    assert tracking_uri(Tracking(), nodes=1).startswith("sqlite:////")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(Tracking(), nodes=3) == "http://127.0.0.1:5000"


def test_unreachable_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        open_run(Tracking(uri="nowhere://x"), "train", "a", nodes=1)


def test_a_store_that_comes_back_is_waited_for_and_a_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.01)
    lines: list[str] = []
    answers: list[Exception] = [ConfigError("no MLflow server answers"), MlflowException("connection refused")]

    def ask() -> str:
        if answers:
            raise answers.pop(0)
        return "stored"

    assert tracking.patiently(ask, 60, lines.append) == "stored"
    assert len(lines) == 1
    assert "no MLflow server answers" in lines[0]
    answers = [MlflowException("too long", INVALID_PARAMETER_VALUE)]
    with pytest.raises(MlflowException, match="too long"):
        tracking.patiently(ask, 60, lines.append)
    answers = [ConfigError("no MLflow server answers")] * 99_999
    with pytest.raises(ConfigError):
        tracking.patiently(ask, 0.05, lines.append)
    assert len(lines) == 2
