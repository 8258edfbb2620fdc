"""A trainer's node is lost and none comes in its place: the job ends by itself, and the same run_name goes on; or nodes
with the fall-back labels are asked for, and the job goes on there."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from ray.job_submission import JobStatus

from roo_ray.errors import EXIT_FAILURE, EXIT_OK
from roo_ray.requests.manifest import load_manifest
from roo_ray.training.checkpoint import read_state
from roo_ray.training.folder import find_checkpoint
from tests.cluster.heads import Head, of_session, ray_head, submit
from tests.cluster.test_elastic import training_requests
from tests.cluster.test_submitted_job import NODE_TYPES, job_client, until
from tests.cluster.test_submitted_job import PLACING as AUTOSCALED
from tests.cluster.test_three_nodes import (
    PLACING,
    add_trainer_node,
    finish,
    node_with_a_trainer,
    start,
    two_trainer_nodes,
)
from tests.jobs.small import cli_overrides, has_checkpoint, small_config
from tests.mlflow_server import Server

LIMIT_S = 120
EPOCHS = 4
SETTINGS = [f"ray.wait_for_workers_s={LIMIT_S}", "training.max_failures=3", "training.checkpoint_every_steps=5"]
SETTINGS += [f"training.epochs={EPOCHS}", "run_name=lost"]


def the_run(server: Server, folder: Path) -> Run:
    """The MLflow run of this training; there is one."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(folder.name).experiment_id
    [run] = client.search_runs([experiment], "tags.`roo_ray.run` = 'train/lost'")
    return run


def check_that_it_is_whole(server: Server, folder: Path, *settings: str) -> None:
    """One MLflow run, each step once, and in each epoch every request once."""
    config = small_config(folder, *settings)
    final = read_state(find_checkpoint(config, "lost"))
    manifest = load_manifest(config.requests)
    expected = training_requests(folder, manifest, config.request_schema.keys.request)
    assert (final.trained["requests"], final.trained["keys"]) == expected
    run = the_run(server, folder)
    assert run.info.status == "FINISHED"
    client = MlflowClient(server.uri)
    losses = sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
    assert losses == list(range(1, final.step + 1))
    epochs = client.get_metric_history(run.info.run_id, "epoch/requests")
    assert [point.value for point in epochs] == [expected[0]] * EPOCHS


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_without_another_node_the_job_ends_by_itself(
    mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*PLACING, *SETTINGS, "tracking.enabled=true"]
    settings += [f"tracking.uri={mlflow_server.uri}", f"tracking.experiment={tmp_path.name}"]
    train = ["jobs/train.py", "--config", "configs/demo.yaml", *cli_overrides(tmp_path, *settings)]
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")  # how often Ray Train asks anew
    with two_trainer_nodes(1) as cluster:
        job = start(cluster, *train)
        lines, lost = [], 0.0
        try:
            assert job.stdout is not None
            for line in job.stdout:
                lines.append(line)
                if " loss " in line and has_checkpoint(tmp_path, "lost", 10):  # that of step 5 is reported, then
                    cluster.remove_node(node_with_a_trainer(cluster), allow_graceful=False)
                    lost = time.monotonic()
                    break
            code, output = finish(job, LIMIT_S + 120)
        finally:
            job.kill()
        took = time.monotonic() - lost
        output = "".join(lines) + output
        assert code == EXIT_FAILURE, output[-4000:]
        assert "Traceback" not in output
        [error] = [line for line in output.splitlines() if line.startswith("failed: ")]
        wanted = "waits for 2 workers of 1 CPU on nodes with ray.worker_labels {'role': 'trainer'}"
        assert f"{wanted}, and the cluster has 1 such node with room for 1, with" in error
        assert error.endswith("Submit the same run_name again, and it goes on from the last checkpoint")
        assert LIMIT_S <= took < LIMIT_S + 60
        assert the_run(mlflow_server, tmp_path).info.status == "FAILED"

        add_trainer_node(cluster, 1)
        code, again = finish(start(cluster, *train))
    assert code == EXIT_OK, again[-4000:]
    found = re.search(r"resumed after epoch \d+, step (\d+)", again)
    assert found is not None
    assert int(found[1]) >= 5
    check_that_it_is_whole(mlflow_server, tmp_path, *settings)


def kill_a_trainers_node(head: Head) -> None:
    """As a spot instance goes: with all its processes."""
    for process in of_session(head.log.parent):
        with contextlib.suppress(psutil.Error):  # some go while they are looked at
            if process.name() == "raylet" and "RayTrainWorker" in commands_of(process):
                break
    else:
        raise AssertionError("no trainer runs")
    for one in [process, *of_node(process)]:
        with contextlib.suppress(psutil.Error):
            one.kill()


def commands_of(raylet: psutil.Process) -> str:
    return " ".join(word for one in of_node(raylet) for word in one.cmdline())


def of_node(raylet: psutil.Process) -> list[psutil.Process]:
    found: list[psutil.Process] = raylet.children(recursive=True)
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_without_another_spot_node_it_goes_on_with_others(mlflow_server: Server, tmp_path: Path) -> None:
    """Ray's autoscaler would ask for spot nodes for ever, of which this cloud has none."""
    settings = [*AUTOSCALED, *SETTINGS, f"tracking.uri={mlflow_server.uri}", f"tracking.experiment={tmp_path.name}"]
    settings += ["ray.wait_for_workers_s=300"]
    train = ["jobs/train.py", "--config", "configs/demo.yaml", *cli_overrides(tmp_path, *settings)]
    with ray_head(0, {}, NODE_TYPES) as head:
        client = until("the job server answers", lambda: job_client(head))
        submit(head, "lost", *train)

        def log() -> str:
            text = client.get_job_logs("lost")
            assert client.get_job_status("lost") not in (JobStatus.FAILED, JobStatus.STOPPED), text[-3000:]
            return str(text)

        until("the run trains and has a checkpoint", lambda: log() and has_checkpoint(tmp_path, "lost", 10), 400)
        kill_a_trainers_node(head)
        words = "asking for nodes with {'market': 'on_demand'} for 1 of 2 workers"
        until("other nodes are asked for", lambda: words in log())
        until("the run goes on to its end", lambda: log() and client.get_job_status("lost") == JobStatus.SUCCEEDED, 400)
        assert log().count("no worker has run for") == 1
        assert log().count("resumed after") == 1
    check_that_it_is_whole(mlflow_server, tmp_path, *settings)
