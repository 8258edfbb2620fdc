"""The judgements of preflight on facts, one by one."""

from __future__ import annotations

import contextlib
import math
import runpy
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.data import DataContext

from roo_ray import session
from roo_ray.cluster import preflight
from roo_ray.cluster.findings import Finding, worst
from roo_ray.cluster.links import Links
from roo_ray.cluster.probe import NodeFacts, probe_nodes, server_problem, storage_problem, versions
from roo_ray.cluster.sizing import UnitCosts, memory_of, shape_of
from roo_ray.config import Config, RaySettings, load_config
from roo_ray.errors import ClusterError
from roo_ray.requests.manifest import load_manifest
from roo_ray.session import Placing, bundles_of, place_data, placing, require_places
from tests.cluster.heads import ROOT, free_port
from tests.ingest import shard_maker
from tests.ingest.shard_maker import random_rows, write_data_set

GB = 10**9
NODE = NodeFacts(
    node="a",
    is_head=False,
    labels={"role": "trainer"},
    cpus=4,
    gpus=0,
    versions={
        "python": "3.11.7",
        "ray": "2.60.0",
        "torch": "2.13.0+cpu",
        "torchrec": "1.8.0",
        "fbgemm-gpu-cpu": "1.8.0",
    },
    memory=64 * GB,
    shared_memory=30 * GB,
    object_store=19 * GB,
    disk_free=400 * GB,
    grace_s=3,
    resources={"CPU": 4.0, "fast": 3.0},
)
HEAD = replace(NODE, node="head", is_head=True, labels={}, cpus=2, grace_s=300, resources={})


def demo(*overrides: str) -> Config:
    return load_config(ROOT / "configs/demo.yaml", overrides)


def level_and_text(findings: list[Finding]) -> tuple[str, str]:
    assert all(finding.do for finding in findings if finding.level != "ok")
    return worst(findings), " | ".join(finding.line() for finding in findings)


def test_nodes_that_do_not_answer() -> None:
    assert worst(preflight.check_nodes([HEAD, NODE], [])) == "ok"
    level, text = level_and_text(preflight.check_nodes([HEAD], ["b 12ab (no answer within 120 s)"]))
    assert level == "fail"
    assert "b 12ab (no answer within 120 s) does not answer" in text
    level, text = level_and_text(preflight.check_nodes([NODE], []))
    assert level == "fail"
    assert "the head is not among the 1 nodes" in text
    assert worst(preflight.check_nodes([], [])) == "fail"
    config = demo()
    for of_nobody in (
        preflight.check_versions([]),
        preflight.check_places(config, []),
        preflight.check_reach([], ["s3://b"]),
        preflight.check_memory([]),
        preflight.check_grace([]),
        preflight.check_grace([NODE]),
    ):
        assert worst(of_nobody) == "fail"
    assert worst(preflight.check_plan(1, [], config)) == "warn"


def test_the_job_ends_where_no_node_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which cluster is asked is the only thing that is not real."""
    monkeypatch.setattr(session, "connect", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("roo_ray.cluster.probe.probe_nodes", lambda *_: ([], ["b 12ab (no module named roo_ray)"]))
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--config", str(ROOT / "configs/demo.yaml")])
    job = runpy.run_path(str(ROOT / "jobs/preflight.py"))
    with pytest.raises(ClusterError, match="no node answers"):
        job["main"]()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("fail  nodes")
    assert "b 12ab (no module named roo_ray) does not answer" in first
    assert "no node answers" in second


def test_versions_equal_on_all_nodes() -> None:
    assert worst(preflight.check_versions([HEAD, NODE])) == "ok"
    gpu = {**NODE.versions, "torch": "2.13.0", "fbgemm-gpu": "1.8.0"}
    del gpu["fbgemm-gpu-cpu"]
    assert worst(preflight.check_versions([HEAD, replace(NODE, versions=gpu)])) == "ok"  # one release, two builds
    other = replace(NODE, node="b", versions={**NODE.versions, "ray": "2.59.0"})
    level, text = level_and_text(preflight.check_versions([HEAD, other]))
    assert level == "fail"
    assert "ray differs: 2.59.0 on b; 2.60.0 on head" in text
    old = replace(NODE, versions={**NODE.versions, "torchrec": "1.7.0"})
    level, text = level_and_text(preflight.check_versions([old]))
    assert level == "fail"
    assert "torch 2.13 with torchrec 1.7" in text


def test_versions_of_this_machine_fit() -> None:
    assert worst(preflight.check_versions([replace(NODE, versions=versions())])) == "ok"


@pytest.mark.parametrize(
    ("overrides", "level", "text"),
    [
        (["ray.worker_labels={role: trainer}", "training.workers=4"], "ok", "room for 4 workers"),
        (["ray.worker_labels={role: nobody}"], "fail", "no node has ray.worker_labels"),
        (["ray.worker_labels={role: nobody}", "ray.wait_for_nodes_s=60"], "warn", "no node has ray.worker_labels"),
        (["ray.data_labels={role: data}"], "fail", "no node has ray.data_labels"),
        (["training.gpu=true"], "fail", "room for 0 of 2 workers"),
        (["ray.cpus_per_worker=3"], "fail", "room for 1 of 2 workers"),
        (["training.workers={min: 1, max: 6}", "ingest.lanes=8"], "ok", "room for 6 workers"),
        (["training.workers={min: 1, max: 8}", "ingest.lanes=8"], "warn", "room for 6 of 1 to 8 elastic workers"),
        (["training.workers={min: 7, max: 8}", "ingest.lanes=8"], "fail", "room for 6 of 7 workers"),
        (["ray.worker_resources={fast: 1}"], "ok", "room for 3 workers"),
        (["ray.worker_resources={fast: 2}"], "fail", "room for 1 of 2 workers of {'CPU': 1, 'fast': 2.0}"),
        (["ray.worker_resources={slow: 1}"], "fail", "room for 0 of 2 workers"),
    ],
)
def test_places(overrides: list[str], level: str, text: str) -> None:
    found = level_and_text(preflight.check_places(demo(*overrides), [HEAD, NODE]))
    assert found[0] == level
    assert text in found[1]


def test_gpus_that_torch_does_not_see() -> None:
    node = replace(NODE, gpus=2, gpu_names=("H100",))
    level, text = level_and_text(preflight.check_places(demo("training.gpu=true"), [node]))
    assert level == "fail"
    assert "Ray counts 2 GPUs and torch sees 1" in text


@pytest.mark.parametrize(
    ("cuda", "driver", "level"),
    [("13.0", "570.172.08", "fail"), ("13.0", "580.95.05", "ok"), ("12.8", "570.172.08", "ok"), ("13.0", "", "ok")],
)
def test_the_driver_is_recent_enough_for_the_cuda_of_torch(cuda: str, driver: str, level: str) -> None:
    node = replace(NODE, gpus=2, gpu_names=("L4", "L4"), cuda=cuda, driver=driver)
    found, text = level_and_text(preflight.check_places(demo("training.gpu=true"), [node]))
    assert found == level
    assert ("a machine image with a driver from 580 on" in text) == (level == "fail")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shared_memory": 64_000_000}, "64.0 MB of /dev/shm"),
        ({"object_store": 100_000_000}, "object store of 100.0 MB"),
        ({"object_store": 50 * GB, "shared_memory": 60 * GB}, "object store 50.0 GB of 64.0 GB"),
        ({"disk_free": GB}, "1.0 GB free for spilling"),
    ],
)
def test_memory(change: dict[str, Any], text: str) -> None:
    assert worst(preflight.check_memory([HEAD, NODE])) == "ok"
    level, found = level_and_text(preflight.check_memory([HEAD, replace(NODE, **change)]))
    assert level == "warn"
    assert text in found


def test_job_stop_grace_counts_on_the_head_alone() -> None:
    assert worst(preflight.check_grace([HEAD, NODE])) == "ok"
    level, text = level_and_text(preflight.check_grace([replace(HEAD, grace_s=3)]))
    assert level == "fail"
    assert "RAY_JOB_STOP_WAIT_TIME_S=300" in text
    assert worst(preflight.check_grace([HEAD], checkpoint_s=200)) == "fail"
    level, text = level_and_text(preflight.check_grace([replace(HEAD, grace_s=math.nan)]))
    assert level == "fail"
    assert "no whole number" in text


def test_the_plan_fits_into_memory() -> None:
    config = demo("ray.worker_labels={role: trainer}")
    assert worst(preflight.check_plan(10 * GB, [HEAD, NODE], config)) == "ok"
    assert worst(preflight.check_plan(18 * GB, [HEAD, NODE], config)) == "warn"
    assert worst(preflight.check_plan(40 * GB, [HEAD, NODE], config)) == "fail"
    on_gpu = demo("training.gpu=true")
    assert worst(preflight.check_plan(10 * GB, [replace(NODE, gpus=1, gpu_memory=24 * GB)], on_gpu)) == "ok"
    assert worst(preflight.check_plan(10 * GB, [HEAD], on_gpu)) == "warn"
    for activations in (False, True):
        _, text = level_and_text(preflight.check_plan(10 * GB, [HEAD, NODE], config, activations))
        assert ("activations not counted" in text) != activations


def test_the_facts_of_this_machine(local_ray: None, tmp_path: Path) -> None:
    """As a task on it says them, with a run's own shape for the plan."""
    schema = shard_maker.schema()
    write_data_set(tmp_path / "requests", random_rows([1 + i % 9 for i in range(100)], 3, days=2), schema)
    config = demo(f"requests={tmp_path}/requests").model_copy(update={"request_schema": schema})
    nodes, silent = probe_nodes([str(tmp_path / "runs")], [config.requests], None)
    assert silent == []
    (node,) = nodes
    assert (node.is_head, node.cpus, node.resources["CPU"], node.problems) == (True, 4, 4, {})
    assert (node.driver == "") == (not Path("/proc/driver/nvidia/version").exists())
    assert preflight.room_for(config, nodes) == 4
    assert worst(preflight.check_nodes(nodes, silent)) == "ok"
    assert worst(preflight.check_versions(nodes)) == "ok"
    shape = shape_of(config, load_manifest(config.requests))
    memory = memory_of(shape, 2, UnitCosts(fixed_s=0, per_megaflop_s=1))
    assert worst(preflight.check_plan(memory, nodes, config)) == "ok"
    share = (psutil.virtual_memory().total - 500_000_000) / 2  # of two workers, beside this Ray's object store
    assert worst(preflight.check_plan(0.8 * share, nodes, config)) == "warn"
    assert worst(preflight.check_plan(0.95 * share, nodes, config)) == "fail"


def test_links() -> None:
    fast = Links("gloo", 2, 2, 1e9, 1e9, 1e-3)
    assert worst(preflight.check_links(lambda: fast)) == "ok"
    assert worst(preflight.check_links(lambda: replace(fast, all_to_all=1e6))) == "warn"

    def broken() -> Links:
        raise ClusterError("the 2 workers do not reach each other: timed out")

    level, text = level_and_text(preflight.check_links(broken))
    assert level == "fail"
    assert "timed out" in text

    def wrong() -> Links:
        raise RuntimeError("all-to-all mixes up ranks: [1.0, 0.0]")

    level, text = level_and_text(preflight.check_links(wrong))
    assert level == "fail"
    assert "mixes up ranks" in text
    assert "NCCL_DEBUG" in text


def test_what_cannot_be_reached_is_said_without_secrets(tmp_path: Any) -> None:
    assert storage_problem(str(tmp_path / "new"), writes=True) is None
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("x")
    problem = storage_problem(str(tmp_path / "file"), writes=True)
    assert problem
    assert server_problem(f"http://127.0.0.1:{free_port()}")
    assert server_problem("sqlite:///x.db") is None
    level, text = level_and_text(preflight.check_reach([replace(NODE, problems={"s3://b": problem})], ["s3://b"]))
    assert level == "fail"
    assert "a cannot use s3://b" in text
    assert worst(preflight.check_reach([NODE], ["s3://b"])) == "ok"
    assert worst(preflight.check_local_paths([HEAD, NODE], ["/data", "s3://b"])) == "warn"
    assert preflight.check_local_paths([HEAD], ["/data"]) == []


def node(labels: dict[str, str], **resources: float) -> dict[str, Any]:
    """As ``ray.nodes()`` says it."""
    return {"Labels": labels, "Resources": resources}


def test_nodes_without_the_labels_do_not_count() -> None:
    """Otherwise a job's tasks would wait for ever for a node that is not there."""
    settings = RaySettings(worker_labels={"role": "trainer"}, data_labels={"role": "data"}, data_cpus=2)
    trainers, data = node({"role": "trainer"}, CPU=4.0, GPU=4.0), node({"role": "data"}, CPU=2.0)
    require_places(settings, 4, True, [trainers, data])
    require_places(settings, 0, False, [data])
    with pytest.raises(ClusterError, match=r"ray.data_labels \{'role': 'data'\} \(0 of 1\) have room for 0 of 2"):
        require_places(settings, 4, True, [trainers])
    with pytest.raises(ClusterError, match=r"ray.worker_labels .* have room for 4 of 5 workers of 1 CPU, 1 GPU"):
        require_places(settings, 5, True, [trainers, data])
    disks = RaySettings(data_resources={"disk": 0.5})
    require_places(disks, 4, True, [node({}, CPU=8.0, disk=1.0)])
    with pytest.raises(ClusterError, match=r"ray.data_resources \{'disk': 0.5\}"):
        require_places(disks, 4, True, [node({}, CPU=8.0)])


def test_what_ray_data_starts_goes_where_the_config_says() -> None:
    """By Ray Data's own context, which every dataset made in the process takes a copy of."""
    try:
        place_data(Placing.of(RaySettings(data_labels={"role": "data"}, data_resources={"disk": 1})))
        assert DataContext.get_current().execution_options.label_selector == {"role": "data"}
        assert placing() == Placing({"role": "data"}, {"disk": 1})
    finally:
        place_data(Placing())
    assert DataContext.get_current().execution_options.label_selector is None


class Refusing(BaseHTTPRequestHandler):
    """A server that answers, and refuses."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Invalid Host header")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def test_a_server_that_listens_and_refuses_is_no_mlflow_server() -> None:
    """A port that is open is not enough: MLflow refuses host names that it was not told."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        problem = server_problem(f"http://kai:hunter2@127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert problem is not None
    assert "403" in problem
    assert "Invalid Host header" in problem
    assert "hunter2" not in problem


def test_what_a_job_asks_an_autoscaler_for() -> None:
    settings = RaySettings(
        worker_labels={"role": "trainer"},
        worker_resources={"fast": 1},
        data_labels={"role": "data"},
        data_resources={"disk": 0.5},
        data_cpus=1.5,
    )
    bundles, labels = bundles_of(settings, 2, True)
    assert bundles == [{"CPU": 1, "GPU": 1, "fast": 1}] * 2 + [{"CPU": 1, "disk": 0.5}] * 2
    assert labels == [{"role": "trainer"}] * 2 + [{"role": "data"}] * 2


def test_other_nodes_are_asked_for_where_the_first_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for, one after the other, of a cluster that has data nodes and no spot trainers; that Ray's
    autoscaler then brings them is in test_submitted_job."""
    asked: list[list[dict[str, str]]] = []

    def come(bundles: list[dict[str, float]], labels: list[dict[str, str]], seconds: float) -> bool:
        asked.append([dict(label) for label in labels])
        return all(label["role"] == "data" or "market" in label for label in labels)

    monkeypatch.setattr(session, "_come", come)
    settings = RaySettings(
        worker_labels={"role": "trainer"},
        data_labels={"role": "data"},
        wait_for_nodes_s=60,
        fall_back_after_s=5,
        fall_back_labels={"market": "on_demand"},
    )
    said: list[str] = []
    session.wait_for_nodes(settings, 2, True, said.append)
    trainer, data = {"role": "trainer"}, {"role": "data"}
    other = trainer | {"market": "on_demand"}
    both = [trainer, trainer, data]
    assert asked == [both, both, [trainer, trainer], [data], [other, other, data]]
    assert "for the trainers" in said[-1]
    assert "data" not in said[-1].partition("for the trainers")[2]
