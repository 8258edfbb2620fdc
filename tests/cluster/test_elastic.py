"""Elastic workers: a run of 1 to 2 workers grows when a node comes, shrinks when it is lost, and is one run."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from roo_ray.errors import EXIT_OK
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.sources.hashing import hash_rows
from roo_ray.training.checkpoint import read_state
from roo_ray.training.folder import find_checkpoint
from tests.cluster.test_three_nodes import finish, start
from tests.jobs.small import cli_overrides, small_config

STOPPED = 143
SETTINGS = [
    *("training.checkpoint_every_steps=5", "training.max_failures=3", "ray.worker_resources={trainer: 1}"),
    *("source.requests=3000", "source.requests_per_task=1000", "ingest.batch_impressions=128", "ray.data_cpus=1"),
    "training.keep_checkpoints=2",
]
ELASTIC = ["training.workers={min: 1, max: 2, check_seconds: 2}", "run_name=elastic"]


@pytest.fixture(scope="module")
def one_node() -> Iterator[Cluster]:
    """A node with room for one trainer, and for data."""
    small = {"object_store_memory": 150_000_000, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")  # how long it waits for a lost node
        # it would make this cluster the machine's default one, which any ray.init() without an address joins
        patch.setattr(ray._private.utils, "write_ray_address", lambda *where: None)
        head = {"num_cpus": 3, "resources": {"trainer": 1}, **small}
        cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def training_requests(folder: Path, manifest: Manifest, keys: list[str]) -> tuple[int, int]:
    """(requests that are trained on, sum of their keys modulo 2^64), from the shards."""
    files = [file for file in manifest.files if file.day != manifest.days[-1]]
    hashes = [hash_rows(pq.read_table(folder / "requests" / file.path, columns=keys), keys) for file in files]
    return sum(file.requests for file in files), int(np.concatenate(hashes).astype(np.uint64).sum(dtype=np.uint64))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_grows_and_shrinks_with_the_cluster(one_node: Cluster, tmp_path: Path) -> None:
    train = ["jobs/train.py", "--config", "configs/demo.yaml", *cli_overrides(tmp_path, *SETTINGS)]
    job = start(one_node, *train, *ELASTIC, "training.epochs=1000")
    added = None
    lines: list[str] = []
    groups: list[int] = []  # workers of each group that began
    began = 0  # lines until the last one did
    try:
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line)
            if found := re.search(r"(\d) workers ready", line):
                groups.append(int(found[1]))
                began = len(lines)
            steps = sum(" loss " in one for one in lines[began:])
            if steps < 2:
                continue
            if groups == [1] and added is None:
                added = one_node.add_node(num_cpus=2, resources={"trainer": 1}, object_store_memory=150_000_000)
            elif groups[-1] == 2 and added is not None:
                one_node.remove_node(added, allow_graceful=False)
                added = None
            elif len(groups) > 2 and groups[-1] == 1:
                job.send_signal(signal.SIGTERM)
                break
        code, output = finish(job)
    finally:
        job.kill()
    output = "".join(lines) + output
    assert code == STOPPED, output[-4000:]
    assert groups[0] == 1
    assert groups[-1] == 1
    assert 2 in groups
    resumed = [int(step) for step in re.findall(r"resumed after epoch \d+, step (\d+)", output)]
    assert len(resumed) == len(groups) - 1  # each from the last checkpoint of the group before
    assert resumed == sorted(resumed)
    assert resumed[0] > 0

    # it ends, and each epoch has trained on every request once, whatever the workers
    config = small_config(tmp_path, *SETTINGS, *ELASTIC)
    states = {path.name: read_state(path) for path in (tmp_path / "runs/elastic").glob("epoch-*")}
    epochs = states[max(states)].epoch + 1
    code, output = finish(start(one_node, *train, *ELASTIC, f"training.epochs={epochs}"))
    assert code == EXIT_OK, output[-4000:]
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    [run] = client.search_runs([experiment], "tags.`roo_ray.run` = 'train/elastic'")
    assert run.info.status == "FINISHED"

    def history(run_id: str, name: str) -> dict[int, float]:
        points = client.get_metric_history(run_id, name)
        assert len({point.step for point in points}) == len(points), "a step was logged twice"
        return {point.step: point.value for point in points}

    manifest = load_manifest(config.requests)
    requests, keys = training_requests(tmp_path, manifest, config.request_schema.keys.request)
    assert list(history(run.info.run_id, "epoch/requests").values()) == [requests] * epochs
    final = read_state(find_checkpoint(config, "elastic"))
    assert (final.trained["requests"], final.trained["keys"]) == (requests, keys)
    losses = history(run.info.run_id, "train/loss")
    assert sorted(losses) == list(range(1, final.step + 1))

    # the same training as with one worker all the way, up to the order of sums
    plain = ["training.workers=1", "run_name=plain", "ingest.reader=thread", f"training.epochs={epochs}"]
    code, output = finish(start(one_node, *train, *plain), 400)
    assert code == EXIT_OK, output[-4000:]
    [other] = client.search_runs([experiment], "tags.`roo_ray.run` = 'train/plain'")
    expected = history(other.info.run_id, "train/loss")
    print(f"{groups} workers, resumed at {resumed}, {final.step} steps, {epochs} epochs; losses differ by up to",
          max(abs(losses[s] / expected[s] - 1) for s in expected), os.linesep)  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-3)
    assert read_state(find_checkpoint(config, "plain")).trained == final.trained
