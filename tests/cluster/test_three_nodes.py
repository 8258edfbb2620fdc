"""A cluster of three nodes on this machine (each a raylet of its own): preflight looks at it, a training run
outlives one of its nodes, and data tasks stay off the trainers' nodes. The jobs are processes of their own, as a user
starts them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_tasks

from roo_ray.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK
from roo_ray.grace import GRACE_VARIABLE
from tests.cluster.heads import ROOT, free_port
from tests.jobs.small import cli_overrides, has_checkpoint

PLACING = ["ray.worker_labels={role: trainer}", "ray.data_labels={role: data}", "tracking.enabled=false"]
# what Ray Data runs in the jobs: generating, building, reading, scoring
DATA_TASKS = {"_write_task", "_run_task", "_read_block", "ScoreFiles"}


@contextmanager
def two_trainer_nodes(cpus: int) -> Iterator[Cluster]:
    """A head with 2 CPUs, which is the node for data, and two nodes for trainers with so many CPUs each."""
    small: dict[str, Any] = {"object_store_memory": 150_000_000, "labels": {"role": "data"}}
    small |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(GRACE_VARIABLE, "60")
        # it would make this cluster the machine's default one, which any ray.init() without an address joins
        patch.setattr(ray._private.utils, "write_ray_address", lambda *where: None)
        cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 2, **small})
        try:
            for _ in range(2):
                add_trainer_node(cluster, cpus)
            yield cluster
        finally:
            cluster.shutdown()


def add_trainer_node(cluster: Cluster, cpus: int) -> None:
    cluster.add_node(num_cpus=cpus, object_store_memory=150_000_000, labels={"role": "trainer"})


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Cluster]:
    with two_trainer_nodes(2) as cluster:
        yield cluster


def start(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str]:
    try:
        output, _ = job.communicate(timeout=seconds)
    finally:
        job.kill()
    return job.returncode, output


def node_with_a_trainer(cluster: Cluster) -> Any:
    for node in cluster.worker_nodes:
        raylet = node.all_processes["raylet"][0].process.pid
        for process in psutil.Process(raylet).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    return node
    raise AssertionError("no trainer runs on a worker node")


def nodes_of_data_tasks(cluster: Cluster) -> dict[str, set[str]]:
    """The function of each of Ray Data's tasks and actors that has run -> the nodes."""
    found: dict[str, set[str]] = {}
    address = f"http://{cluster.head_node.webui_url}"
    for task in list_tasks(address=address, limit=10_000, detail=True, raise_on_missing_output=False):
        for name in DATA_TASKS:
            if f"({name})" in task.name and task.node_id:
                found.setdefault(name, set()).add(task.node_id)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_preflight_of_a_cluster(three_nodes: Cluster, tmp_path: Path) -> None:
    arguments = ["jobs/preflight.py", "--config", "configs/demo.yaml", *cli_overrides(tmp_path), *PLACING]
    code, output = finish(start(three_nodes, *arguments))
    assert code == EXIT_FAILURE, output[-3000:]  # for there is no data set yet
    assert "not ready: plan could not be checked" in output
    levels = ("ok", "warn", "skip", "fail")
    lines = {line[6:22].strip(): line for line in output.splitlines() if line[:5].strip() in levels}
    assert lines["versions"].startswith("ok    versions         equal on 3 nodes")
    assert "room for 4 workers; 2 wanted" in lines["places"]
    assert "3 nodes reach" in lines["reach"]
    assert lines["job stop"].endswith("a stopped job has 60 s")
    assert "gloo over 2 workers on" in lines["network"]
    assert "object store of 150.0 MB" in lines["object store"]
    assert lines["plan"].startswith("skip")
    assert "no data set" in lines["plan"]
    assert not list((tmp_path / "runs").iterdir())  # what it wrote it took away

    # a node that hangs is said first, whatever else there is to say, and whether it answers late or is found dead
    silent = three_nodes.add_node(num_cpus=0, object_store_memory=150_000_000)
    raylet = psutil.Process(silent.all_processes["raylet"][0].process.pid)
    raylet.suspend()
    try:
        code, output = finish(start(three_nodes, *arguments))
    finally:
        raylet.resume()
        three_nodes.remove_node(silent, allow_graceful=False)
    assert code == EXIT_BAD_INPUT, output[-3000:]
    found = [line for line in output.splitlines() if line[:5].strip() in levels]
    assert found[0].startswith("fail  nodes")
    assert "does not answer" in found[0]
    assert found[1].startswith("ok    versions         equal on 3 nodes")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_run_outlives_a_node_and_data_stays_off_the_trainers(three_nodes: Cluster, tmp_path: Path) -> None:
    options = [*PLACING, "training.checkpoint_every_steps=5", "training.max_failures=3", "run_name=node-lost"]
    arguments = ["jobs/train.py", "--config", "configs/demo.yaml", *cli_overrides(tmp_path, *options)]
    job = start(three_nodes, *arguments, "training.epochs=12")
    lines = []
    try:
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line)
            if " loss " in line and has_checkpoint(tmp_path, "node-lost", 10):  # that of step 5 is reported, then
                three_nodes.remove_node(node_with_a_trainer(three_nodes), allow_graceful=False)
                break
        code, output = finish(job)
    finally:
        job.kill()
    output = "".join(lines) + output
    assert code == EXIT_OK, output[-4000:]
    assert "resumed after epoch" in output
    assert "Trained 'node-lost'" in output
    assert (tmp_path / "runs/node-lost/roo_ray_result.json").is_file()

    predict = ["jobs/predict.py", "--config", "configs/demo.yaml", "--model", "node-lost"]
    predict += ["--output", str(tmp_path / "scores"), *cli_overrides(tmp_path, *PLACING)]
    code, output = finish(start(three_nodes, *predict))
    assert code == EXIT_OK, output[-4000:]
    nodes = nodes_of_data_tasks(three_nodes)
    assert set(nodes) == DATA_TASKS
    assert set().union(*nodes.values()) == {three_nodes.head_node.node_id}
