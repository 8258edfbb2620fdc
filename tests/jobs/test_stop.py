"""A job that is told to end where no training step hears it: while no worker runs, and within an evaluation."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Config
from roo_ray.errors import Stopped
from roo_ray.training import launch
from roo_ray.training.checkpoint import read_state
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare
from roo_ray.training.signals import forward_terminate
from tests.jobs.small import small_config
from tests.jobs.test_main_path import quiet

ONE = ("training.workers=1", "ingest.reader=thread", "training.epochs=1", "training.log_every=1")


def statuses(config: Config, run_name: str) -> list[str]:
    """Of the MLflow runs of this training."""
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    found = client.search_runs([experiment], f"tags.`roo_ray.run` = 'train/{run_name}'")
    return [run.info.status for run in found]


def test_without_a_node_for_the_workers(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train would wait for one for ever, and the MLflow run stay RUNNING after SIGKILL."""
    monkeypatch.setattr(launch, "forward_terminate", partial(forward_terminate, silence_s=3.0))
    config = small_config(tmp_path, *ONE, "source.requests=60", "ray.worker_labels={role: nobody}")
    prepare(config, "build", quiet)

    def listen(line: str) -> None:
        if "starting the workers" in line:
            threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with pytest.raises(Stopped, match="no worker runs"):
        train(config, "waits", listen)
    assert statuses(config, "waits") == ["KILLED"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_within_an_evaluation(local_ray: None, tmp_path: Path) -> None:
    """Nothing that was trained on is lost, nor trained on again."""
    held_out = ("holdout.days=2", "source.requests=6000", "source.history_length=200", "ingest.batch_impressions=32")
    config = small_config(tmp_path, *ONE, *held_out)
    prepare(config, "build", quiet)
    steps: list[str] = []
    told = threading.Event()

    def listen(line: str) -> None:
        if "  step " in line:
            steps.append(line)
        if "evaluating: rank 0 has scored" in line and not told.is_set():
            told.set()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="the checkpoint is written"):
        train(config, "stopped", listen)
    assert told.is_set()
    assert statuses(config, "stopped") == ["KILLED"]
    (folder,) = Path(config.storage, "stopped").glob("epoch-*")  # there was none before the evaluation
    state = read_state(str(folder))
    assert (state.epoch, state.step) == (0, len(steps))
    assert state.position is not None

    lines: list[str] = []
    result = train(config, "stopped", lines.append)
    assert any(f"resumed after epoch 0, step {len(steps)} (within an epoch)" in line for line in lines)
    assert not any("  step " in line for line in lines)
    assert read_state(result.checkpoint).step == len(steps)
    assert result.metrics["epoch/requests"] + result.metrics["eval/requests"] == 6000
    assert statuses(config, "stopped") == ["FINISHED"]
