"""Real kills: a run that loses its workers again and again ends with the undisturbed model, bit for bit."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from roo_ray.errors import Stopped
from roo_ray.training.checkpoint import read_state
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare
from roo_ray.training.saver import name_of, step_of
from tests.jobs.faults import Faults, What, tensors
from tests.jobs.small import small_config
from tests.jobs.test_main_path import quiet

SETTINGS = (
    "training.deterministic=true",
    "training.epochs=1",
    "training.checkpoint_every_steps=5",
    "training.log_every=1",
    "training.max_failures=1",  # a notice is no failure, and a run after it may fail again
    "ingest.batch_impressions=16",
    "source.requests=4000",
    "source.requests_per_task=1000",
)
FAULTS: tuple[What, ...] = ("kill", "notice", "write", "stop", "kill")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_killed_at_random_steps_and_a_stopped_driver_change_nothing(local_ray: None, tmp_path: Path) -> None:
    config = small_config(tmp_path, *SETTINGS)
    prepare(config, "build", quiet)
    reference = train(config, "undisturbed", quiet)
    steps = read_state(reference.checkpoint).step
    seed = random.randrange(10**6)
    chosen = random.Random(seed)
    part = steps // (len(FAULTS) + 2)  # the last parts are for what comes after the last fault
    plan = [(chosen.randrange(max(part * i, 5), part * (i + 1)), what) for i, what in enumerate(FAULTS)]
    print(f"seed {seed}: {plan} of {steps} steps")
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray")
    named = "tags.`roo_ray.run` = 'train/disturbed'"
    folder = Path(config.storage) / "disturbed"
    faults = Faults(folder, plan, seed)
    with faults.at_work():
        with pytest.raises(Stopped, match="the same run_name goes on there") as stopped:
            train(config, "disturbed", faults.listen)
        assert [run.info.status for run in client.search_runs([experiment.experiment_id], named)] == ["KILLED"]
        # a driver that was killed in the midst of a write has left a half checkpoint, or one that Ray Train does not
        # know: neither is gone on from
        [whole] = [p for p in folder.glob("epoch-*") if str(step_of(p.name)) in str(stopped.value)]
        for step in (steps + 1, steps + 2):
            shutil.copytree(whole, folder / name_of(0, step))
        (folder / name_of(0, steps + 2) / "state.json").unlink()
        result = train(config, "disturbed", faults.listen)
    left = [line for line in faults.lines if "which a run that was killed has left" in line]
    assert all(any(name_of(0, step) in line for line in left) for step in (steps + 1, steps + 2))
    print(f"{faults.done}, resumed at {faults.resumed}")
    assert tuple(fault.what for fault in faults.done) == FAULTS

    # after each fault the run went on within the epoch: after a signal where it stopped, after a kill at the last
    # checkpoint that was known, or one that became known before the group was found dead
    assert len(faults.resumed) == len(FAULTS)
    assert all(within for _, within in faults.resumed)
    evicted = next(line for line in faults.lines if "got SIGTERM" in line)
    at = {"stop": re.findall(r"at step (\d+)", str(stopped.value)), "notice": re.findall(r"at step (\d+)", evicted)}
    for fault, (step, _) in zip(faults.done, faults.resumed, strict=True):
        if fault.what in ("kill", "write"):
            assert step_of(fault.half) != step  # what was half written is no checkpoint
            assert fault.known <= step  # any step: a checkpoint that is due while one is being written waits
        else:
            assert [str(step)] == at[fault.what]
            assert step >= fault.known

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

    assert [bool(fault.half) for fault in faults.done] == [what == "write" for what in FAULTS]

    # kept by count; nothing half-written is left
    assert len(list(folder.glob("epoch-*"))) == config.training.keep_checkpoints
    assert all((one / "state.json").is_file() for one in folder.glob("epoch-*"))
    metrics = client.get_run(result.run.run_id).data.metrics
    for part in ("data_wait", "host_to_device", "forward", "backward", "optimizer", "communication"):
        assert f"step/{part}_ms" in metrics
