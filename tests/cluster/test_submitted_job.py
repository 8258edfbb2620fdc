"""One run on a cluster that the real autoscaler makes and unmakes: submitted, stopped, submitted again, evaluated, and
its model used. As in the files of cluster/, the head has no CPUs, and data and trainers have nodes of their own. Its
cloud has no spot nodes."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.tracking import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from roo_ray.errors import EXIT_BAD_INPUT, EXIT_FAILURE
from roo_ray.grace import GRACE_VARIABLE
from roo_ray.requests.manifest import load_manifest, manifest_versions
from roo_ray.training.checkpoint import read_state
from tests.cluster.heads import ROOT, Head, ray_cli, ray_head, submit
from tests.jobs.small import cli_overrides
from tests.mlflow_server import Server

NODE_TYPES: dict[str, Any] = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "data": {
        "resources": {"CPU": 2},
        "labels": {"role": "data", "market": "on_demand"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 1,
    },
    **{
        f"trainer_{market}": {
            "resources": {"CPU": 1},
            "labels": {"role": "trainer", "market": market},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
            "priority": priority,
        }
        for market, priority in (("spot", 2), ("on_demand", 1))
    },
}
PLACING = [
    "ray.worker_labels={role: trainer}",
    "ray.data_labels={role: data}",
    "ray.wait_for_nodes_s=200",
    "ray.data_cpus=2",
]
PLACING += ["ray.fall_back_labels={market: on_demand}", "ray.fall_back_after_s=10"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(0, {GRACE_VARIABLE: "180"}, NODE_TYPES) as head:
        yield head


def until(what: str, question: Callable[[], Any], seconds: float = 150, log: Callable[[], str] = str) -> Any:
    """The first true answer; fails after so many seconds, with the end of what ``log`` then says."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {what}\n{log()[-5000:]}")


def job_client(head: Head) -> JobSubmissionClient | None:
    """A client of the head's job server, once it answers."""
    try:
        return JobSubmissionClient(head.jobs)
    except ConnectionError:
        return None


def nodes_for(role: str, client: JobSubmissionClient) -> int:
    """Alive nodes of the autoscaled types, from the dashboard's API."""
    answer = client._do_request("GET", "/api/v0/nodes").json()
    nodes = answer["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" and node["labels"].get("role") == role for node in nodes)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_submitted_run_scales_up_stops_with_a_checkpoint_and_goes_on(
    head: Head, mlflow_server: Server, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    (tmp_path / "schema.yaml").write_text((ROOT / "configs" / config["schema"]).read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"schema": "schema.yaml"}))
    uri = (tmp_path / "config.yaml").as_uri()  # a config from a URI, its schema beside it
    arguments = ["jobs/train.py", "--config", uri, *cli_overrides(tmp_path, *PLACING, "run_name=submitted")]
    arguments += ["training.checkpoint_every_steps=1000000", f"tracking.uri={mlflow_server.uri}"]
    tracked = MlflowClient(mlflow_server.uri)

    def runs() -> list[tuple[str, str]]:
        """(id, status) of the MLflow runs of this training, whatever started them."""
        experiment = tracked.get_experiment_by_name("roo_ray").experiment_id
        found = tracked.search_runs([experiment], "tags.`roo_ray.job` = 'train'")
        return [(run.info.run_id, run.info.status) for run in found]

    client = until("the job server answers", lambda: job_client(head))
    done = [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED]

    def submit_too(name: str, *entrypoint: str) -> None:
        command = shlex.join([sys.executable, *entrypoint])  # as the command line does it, sooner
        client.submit_job(entrypoint=command, submission_id=name, runtime_env={"working_dir": str(ROOT)})

    # the provider's nodes share one folder for working directories: a worker of one would read what another unpacks
    submit_too("unpacks", "-c", "import roo_ray")
    until("the working directory is unpacked", lambda: client.get_job_status("unpacks") in done)
    assert client.get_job_status("unpacks") == JobStatus.SUCCEEDED

    submit(head, "first", *arguments, "training.epochs=500")
    assert nodes_for("trainer", client) == nodes_for("data", client) == 0

    def trains() -> bool:
        log = client.get_job_logs("first")
        assert client.get_job_status("first") in (JobStatus.PENDING, JobStatus.RUNNING), log[-3000:]
        return "step 15 " in log

    until("the run trains on nodes that were not there", trains, 400)
    assert nodes_for("trainer", client) == 2
    assert nodes_for("data", client) == 1
    log = client.get_job_logs("first")
    built, waited = log.index("all accounted for"), log.index("for nodes with 2 x 1 CPU for the trainers")
    assert built < waited  # no node idles while the data is built
    assert "asking for nodes with {'market': 'on_demand'} for the trainers" in log

    assert ray_cli("job", "stop", "--address", head.jobs, "first").returncode == 0
    log = client.get_job_logs("first")
    assert client.get_job_status("first") == JobStatus.STOPPED, log[-3000:]
    assert "stopped: " in log
    assert "Traceback" not in log
    folder = max((tmp_path / "runs/submitted").glob("epoch-*"))
    state = read_state(folder)
    step = state.step
    assert step >= 15  # there was no other checkpoint: this is the one of the stop
    assert not (tmp_path / "runs/submitted/roo_ray_result.json").exists()
    [(run_id, status)] = runs()
    assert status == "KILLED"

    submit_too("wrong", "jobs/train.py", "--config", uri, "training.epoch=1")
    submit_too("second", *arguments, f"training.epochs={state.epoch + 1}")
    ended = partial(lambda name: client.get_job_status(name) in done, "second")
    until(
        "the run goes on to its end", ended, 400, lambda: client.get_job_logs("second")
    )  # it may wait 200 s for nodes
    log = client.get_job_logs("second")
    assert client.get_job_status("second") == JobStatus.SUCCEEDED, log[-3000:]
    assert f"resumed after epoch {state.epoch}, step {step}" in log
    result = json.loads((tmp_path / "runs/submitted/roo_ray_result.json").read_text())
    manifest_requests = result["metrics"]["epoch/requests"] + result["metrics"]["eval/requests"]
    assert manifest_versions(str(tmp_path / "requests")) == [1]
    assert manifest_requests == 900
    assert runs() == [(run_id, "FINISHED")]  # one run over submit, stop and submit
    run = tracked.get_run(run_id)
    assert run.data.tags["roo_ray.run"] == "train/submitted"
    losses = sorted(point.step for point in tracked.get_metric_history(run_id, "train/loss"))
    assert losses == list(range(1, read_state(result["checkpoint"]).step + 1))  # each step once
    assert run.data.metrics["eval/click/ne"] == pytest.approx(result["metrics"]["eval/click/ne"])
    assert "review" in {item.path for item in tracked.list_artifacts(run_id)}

    until("the wrong config is refused", lambda: client.get_job_status("wrong") == JobStatus.FAILED)
    assert client.get_job_info("wrong").driver_exit_code == EXIT_BAD_INPUT
    assert "training.epoch: unknown key" in client.get_job_logs("wrong")

    # other jobs, each on the nodes that it wants
    checkpoint = result["checkpoint"]
    tracking = [argument for argument in arguments if argument.startswith("tracking.uri=")][-1]
    where = [*cli_overrides(tmp_path, *PLACING), tracking]
    submit_too("evaluates", "jobs/evaluate.py", "--config", uri, "--checkpoint", checkpoint, *where)
    until("the evaluation ends", lambda: client.get_job_status("evaluates") in done, 300)
    assert client.get_job_status("evaluates") == JobStatus.SUCCEEDED, client.get_job_logs("evaluates")[-3000:]
    assert "Evaluated" in client.get_job_logs("evaluates")
    output = tmp_path / "scores"
    predicts = ["jobs/predict.py", "--config", uri, "--model", checkpoint, "--output", str(output), *where]
    submit_too("predicts", *predicts)
    until("the prediction ends", lambda: client.get_job_status("predicts") in done, 300)
    assert client.get_job_status("predicts") == JobStatus.SUCCEEDED, client.get_job_logs("predicts")[-3000:]
    assert pq.read_table(output).num_rows == load_manifest(str(tmp_path / "requests")).impressions

    submit_too("builds", "jobs/build_requests.py", "--config", uri, *where, f"requests={tmp_path}/again")
    until("the build ends", lambda: client.get_job_status("builds") in done, 300)
    assert client.get_job_status("builds") == JobStatus.SUCCEEDED, client.get_job_logs("builds")[-3000:]
    assert load_manifest(str(tmp_path / "again")).requests == 900

    # Ray Data's last word to the autoscaler may be lost with its driver: what it has asked for expires after 60 s then,
    # which is looked at every 20 s; a node is idle after 12 s
    until("idle nodes go", lambda: nodes_for("trainer", client) + nodes_for("data", client) == 0, 150)

    # what is not there is not ready, unless it is brought
    submit_too("asks", "jobs/preflight.py", "--config", uri, *where)
    until("preflight ends", lambda: client.get_job_status("asks") in done, 100)
    log = client.get_job_logs("asks")
    assert client.get_job_info("asks").driver_exit_code == EXIT_FAILURE, log[-3000:]
    assert "not ready: network, places, plan, resources could not be checked" in log
    submit_too("brings", "jobs/preflight.py", "--bring", "--config", uri, *where)
    until("preflight with nodes ends", lambda: client.get_job_status("brings") in done, 300)
    log = client.get_job_logs("brings")
    assert client.get_job_status("brings") == JobStatus.SUCCEEDED, log[-3000:]
    assert "ready: " in log
    assert "gloo over 2 workers on 2 nodes" in log
