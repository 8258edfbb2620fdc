"""Real kills: a run that loses its workers again and again ends with the undisturbed model, bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from roo_ray.training.checkpoint import read_state
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare
from tests.jobs.small import small_config
from tests.jobs.test_main_path import one_of_the_trainers, quiet

SETTINGS = (
    "training.deterministic=true",
    "training.epochs=1",
    "training.checkpoint_every_steps=5",
    "training.log_every=1",
    "training.max_failures=1",  # a notice is no failure, and a run after it may fail again
    "ingest.batch_impressions=16",
    "source.requests=1200",
    "source.requests_per_task=400",
)


def tensors(checkpoint: str, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    dcp_to_torch_save(checkpoint, folder / "whole.pt")
    flat: dict[str, torch.Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}/{key}", item)
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    walk("", torch.load(folder / "whole.pt", weights_only=False))
    return flat


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_killed_at_random_steps_change_nothing(local_ray: None, tmp_path: Path) -> None:
    config = small_config(tmp_path, *SETTINGS)
    prepare(config, "build", quiet)
    reference = train(config, "undisturbed", quiet)
    steps = read_state(reference.checkpoint).step
    seed = random.randrange(10**6)
    chosen = random.Random(seed)
    # lines come half a second late: the last third is for what comes after the last kill
    chosen_steps = [chosen.randrange(12 + part * steps // 5, (part + 1) * steps // 5) for part in range(3)]
    # (step, what): two workers are killed, one between them gets a spot instance's notice
    plan = list(zip(chosen_steps, ("kill", "notice", "kill"), strict=True))
    print(f"seed {seed}: {plan} of {steps} steps")
    done: list[str] = []
    lines: list[str] = []
    ready = False

    def disturb(line: str) -> None:
        nonlocal ready
        lines.append(line)
        ready = ready or "workers ready" in line
        found = re.search(r"epoch 1/1  step (\d+) ", line)
        if found and ready and plan and int(found[1]) >= plan[0][0]:
            what = plan.pop(0)[1]
            done.append(what)
            ready = False  # until the next group of workers has begun
            os.kill(one_of_the_trainers(), signal.SIGKILL if what == "kill" else signal.SIGTERM)

    result = train(config, "disturbed", disturb)
    assert done == ["kill", "notice", "kill"]
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray")
    named = "tags.`roo_ray.run` = 'train/disturbed'"
    resumed = [line for line in lines if "resumed after epoch 0, step" in line and "within an epoch" in line]
    assert len(resumed) >= 2

    # one run, every step logged once, every request trained on once, and the same bits in the end
    runs = client.search_runs([experiment.experiment_id], named)
    assert [run.info.status for run in runs] == ["FINISHED"]
    for metric in ("train/loss", "train_lifetime/click/ne"):
        points = [
            {point.step: point.value for point in client.get_metric_history(one.run.run_id, metric)}
            for one in (reference, result)
        ]
        assert points[0] == points[1]
        assert len(points[0]) == len(client.get_metric_history(result.run.run_id, metric)) == steps
    states = [read_state(one.checkpoint) for one in (reference, result)]
    assert states[0].trained == states[1].trained
    assert states[0].trained["requests"] == result.metrics["epoch/requests"]
    expected, actual = (tensors(one.checkpoint, tmp_path) for one in (reference, result))
    assert expected.keys() == actual.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, actual[name])]
    assert different == []

    # kept by count; nothing half-written is left
    folder = Path(config.storage) / "disturbed"
    assert len(list(folder.glob("epoch-*"))) == config.training.keep_checkpoints
    assert all((one / "state.json").is_file() for one in folder.glob("epoch-*"))
    metrics = client.get_run(result.run.run_id).data.metrics
    for part in ("data_wait", "host_to_device", "forward", "backward", "optimizer", "communication"):
        assert f"step/{part}_ms" in metrics
