"""A job that is told to end where no training step hears it: while no worker runs, and within an evaluation."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Config
from roo_ray.errors import NoWorkers, Stopped
from roo_ray.training import launch
from roo_ray.training.checkpoint import read_state
from roo_ray.training.launch import evaluate, train
from roo_ray.training.prepare import prepare
from roo_ray.training.signals import forward_terminate
from tests.jobs.small import small_config
from tests.jobs.test_main_path import quiet
from tests.models.own_towers import SlowTowers

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

    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        while signal.getsignal(signal.SIGTERM) is before:  # a signal from before the run is another matter
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(Stopped, match="no worker runs"):
        train(config, "waits", quiet)
    assert statuses(config, "waits") == ["KILLED"]


def test_without_a_node_for_long(local_ray: None, tmp_path: Path) -> None:
    """Nobody tells the job to end."""
    config = small_config(tmp_path, *ONE, "source.requests=60", "ray.worker_labels={role: nobody}")
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"wait_for_workers_s": 4.0})})
    prepare(config, "build", quiet)
    with pytest.raises(NoWorkers, match=r"waits for 1 worker of 1 CPU on .* 'nobody'.* Submit the same run_name again"):
        train(config, "waits", quiet)
    assert statuses(config, "waits") == ["FAILED"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_workers_that_are_slow_to_begin(local_ray: None, tmp_path: Path) -> None:
    """Nor is a job ended, in training or in evaluation, whose workers take longer for their model than they may be
    away."""
    config = small_config(tmp_path, *ONE, "source.requests=60", "model.towers=tests.models.own_towers:SlowTowers")
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"wait_for_workers_s": 45.0})})
    prepare(config, "build", quiet)
    began = time.monotonic()
    result = train(config, "slow", quiet)
    assert time.monotonic() - began > SlowTowers.seconds > config.ray.wait_for_workers_s
    assert evaluate(config, result.checkpoint, "slow-evaluated", quiet).metrics["eval/requests"] > 0
    nobody = config.ray.model_copy(update={"worker_labels": {"role": "nobody"}, "wait_for_workers_s": 4.0})
    with pytest.raises(NoWorkers, match="Run the evaluation again"):
        evaluate(config.model_copy(update={"ray": nobody}), result.checkpoint, "waits", quiet)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_within_an_evaluation(local_ray: None, tmp_path: Path) -> None:
    """Nothing that was trained on is lost, nor trained on again."""
    # an evaluation of far more than the 5 s after which it says how far it is, on a quick machine too
    held_out = ("source.days=8", "holdout.days=7", "source.requests=24000", "source.history_length=200")
    held_out += ("ingest.batch_impressions=32",)
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
    assert result.metrics["epoch/requests"] + result.metrics["eval/requests"] == 24000
    assert statuses(config, "stopped") == ["FINISHED"]
