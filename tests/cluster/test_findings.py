"""The judgements of preflight on facts, one by one."""

from __future__ import annotations

import contextlib
import math
import re
import runpy
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from roo_ray import session
from roo_ray.cluster import preflight, probe
from roo_ray.cluster.findings import Finding, worst
from roo_ray.cluster.links import Links
from roo_ray.cluster.memory import WorkerMemory
from roo_ray.cluster.probe import NodeFacts, probe_nodes, server_problem, source_problem, storage_problem, versions
from roo_ray.cluster.sizing import UnitCosts, memory_of, shape_of
from roo_ray.config import Config, load_config
from roo_ray.errors import ClusterError, NotChecked
from roo_ray.requests.manifest import load_manifest
from roo_ray.training.hosts import host_memory
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
    assert worst(preflight.check_plan(held(1), [], config)) == "skip"


def test_the_job_ends_where_no_node_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which cluster is asked is the only thing that is not real."""
    monkeypatch.setattr(session, "connect", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(
        "roo_ray.cluster.probe.probe_nodes", lambda *_, **__: ([], ["b 12ab (no module named roo_ray)"])
    )
    monkeypatch.setattr(session, "alive_nodes", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--config", str(ROOT / "configs/demo.yaml")])
    job = runpy.run_path(str(ROOT / "jobs/preflight.py"))
    with pytest.raises(ClusterError, match="no node answers"):
        job["main"]()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("fail  nodes")
    assert "b 12ab (no module named roo_ray) does not answer" in first
    assert "no node answers" in second


def test_an_sqlite_store_is_refused_as_training_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also where the config names it. Which nodes there are is the only thing that is not real."""
    monkeypatch.setattr(session, "connect", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(session, "alive_nodes", lambda: 3)
    monkeypatch.setattr("roo_ray.cluster.probe.probe_nodes", lambda *_, **__: ([], ["b 12ab (silent)"]))
    command = ["preflight.py", "--config", str(ROOT / "configs/demo.yaml"), f"tracking.uri=sqlite:///{tmp_path}/a.db"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ClusterError):
        runpy.run_path(str(ROOT / "jobs/preflight.py"))["main"]()
    assert re.search(r"^fail  mlflow .*3 nodes and the MLflow store is an SQLite file", capsys.readouterr().out)


AUTOSCALED = ["ray.worker_labels={role: trainer}", "ray.data_labels={role: data}", "ray.wait_for_nodes_s=60"]


@pytest.mark.parametrize("bring", [False, True])
def test_a_cluster_scaled_to_zero_is_not_ready(
    bring: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None
) -> None:
    """On this Ray, without nodes of these labels and GPUs; that ``--bring`` gets some is in test_submitted_job."""
    asked: list[list[dict[str, str]]] = []

    def come(bundles: list[dict[str, float]], labels: list[dict[str, str]], seconds: float) -> bool:
        asked.append(labels)
        return False

    monkeypatch.setattr(session, "_come", come)
    monkeypatch.setattr(session, "connect", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(preflight, "LEAST_GRACE_S", 1)  # this Ray's is 3
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    paths = [f"requests={tmp_path}/requests", f"storage={tmp_path}/runs", "tracking.enabled=false"]
    command = ["preflight.py", "--config", str(ROOT / "configs/demo.yaml"), *AUTOSCALED, *paths, "training.gpu=true"]
    monkeypatch.setattr(sys, "argv", [*command, *(["--bring"] if bring else [])])
    job = runpy.run_path(str(ROOT / "jobs/preflight.py"))
    with pytest.raises(ClusterError if bring else NotChecked, match=r"checks failed" if bring else "not ready: gpus"):
        job["main"]()
    output = capsys.readouterr().out
    assert "ready:" not in output
    for check in ("places", "gpus", "plan", "network"):
        assert re.search(rf"^skip  {check}", output, re.MULTILINE), check
    assert bool(asked) == bring
    if bring:
        assert asked[0] == [{"role": "trainer"}] * 2 + [{"role": "data"}]


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
        (["ray.worker_labels={role: nobody}", "ray.wait_for_nodes_s=60"], "skip", "no node has ray.worker_labels"),
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


def test_gpus_without_what_the_attention_kernel_needs() -> None:
    node = replace(NODE, gpus=2, gpu_names=("L4", "L4"), kernel="Triton finds no C compiler (CC, gcc or clang)")
    level, text = level_and_text(preflight.check_places(demo("training.gpu=true"), [node]))
    assert level == "warn"
    assert "no C compiler" in text
    assert worst(preflight.check_places(demo(), [node])) == "ok"  # a run on CPUs has another kernel


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


def held(gigabytes: float) -> WorkerMemory:
    return WorkerMemory((), 0.0, gigabytes * GB)


def test_the_plan_fits_into_memory() -> None:
    config = demo("ray.worker_labels={role: trainer}")
    assert worst(preflight.check_plan(held(10), [HEAD, NODE], config)) == "ok"
    assert worst(preflight.check_plan(held(18), [HEAD, NODE], config)) == "warn"
    assert worst(preflight.check_plan(held(40), [HEAD, NODE], config)) == "fail"
    on_gpu = demo("training.gpu=true")
    assert worst(preflight.check_plan(held(10), [replace(NODE, gpus=1, gpu_memory=24 * GB)], on_gpu)) == "ok"
    assert worst(preflight.check_plan(held(10), [HEAD], on_gpu)) == "skip"
    for activations in (False, True):
        _, text = level_and_text(preflight.check_plan(held(10), [HEAD, NODE], config, activations))
        assert ("activations not counted" in text) != activations


@pytest.mark.parametrize(
    ("gpu", "level"), [(24, "ok"), (20, "warn"), (10, "warn"), (6, "warn"), (4, "fail"), (1, "fail")]
)
def test_tables_that_a_gpu_has_no_room_for(gpu: int, level: str) -> None:
    """15 GB in tables of 6, 6 and 3 and 1 GB beside them; two GPUs share 36 GB for tables of a host of 64 GB."""
    memory = WorkerMemory((6.0 * GB, 6.0 * GB, 3.0 * GB), 0.0, 1.0 * GB)
    node = replace(NODE, gpus=2, gpu_memory=gpu * GB)
    found, text = level_and_text(preflight.check_plan(memory, [node], demo("training.gpu=true")))
    assert found == level
    assert ("of tables in host memory" in text) == (gpu in (10, 6))
    full = replace(node, memory=30 * GB)  # of which 19 are the object store's
    assert worst(preflight.check_plan(memory, [full], demo("training.gpu=true"))) == (
        "ok" if gpu == 24 else "warn" if gpu == 20 else "fail"
    )


def test_the_facts_of_this_machine(local_ray: None, tmp_path: Path) -> None:
    """As a task on it says them, with a run's own shape for the plan."""
    schema = shard_maker.schema()
    write_data_set(tmp_path / "requests", random_rows([1 + i % 9 for i in range(100)], 3, days=2), schema)
    config = demo(f"requests={tmp_path}/requests").model_copy(update={"request_schema": schema})
    nodes, silent = probe_nodes([str(tmp_path / "runs")], [config.requests], None)
    assert silent == []
    (node,) = nodes
    assert (node.is_head, node.cpus, node.resources["CPU"], node.problems) == (True, 4, 4, {})
    assert node.unseen == ()
    assert list((tmp_path / "runs").iterdir()) == []  # what was written there is gone
    assert (node.driver == "") == (not Path("/proc/driver/nvidia/version").exists())
    (tmp_path / "log").mkdir()
    (tmp_path / "log/day.parquet").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    logs = [f"{tmp_path}/{name}" for name in ("log", "log/day.parquet", "none", "empty")]
    below_a_file = f"{tmp_path}/log/day.parquet/requests"
    ((asked,), _), ((not_asked,), _) = (
        probe_nodes([below_a_file], [], None, logs, labels) for labels in ({}, {"role": "data"})
    )
    assert asked.problems.keys() == {*logs[2:], below_a_file}
    assert asked.problems[logs[2]] == "it is not there"
    assert not_asked.problems.keys() == {below_a_file}  # it is no data node
    assert preflight.room_for(config, nodes) == 4
    assert worst(preflight.check_nodes(nodes, silent)) == "ok"
    assert worst(preflight.check_versions(nodes)) == "ok"
    shape = shape_of(config, load_manifest(config.requests))
    memory = memory_of(shape, 2, UnitCosts(fixed_s=0, per_megaflop_s=1))
    assert worst(preflight.check_plan(memory, nodes, config)) == "ok"
    share = (host_memory() - 500_000_000) / 2  # of two workers, beside this Ray's object store
    assert worst(preflight.check_plan(held(0.8 * share / GB), nodes, config)) == "warn"
    assert worst(preflight.check_plan(held(0.95 * share / GB), nodes, config)) == "fail"


def test_a_pod_has_what_its_limit_says(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what its machine has."""
    (tmp_path / "memory.max").write_text("3000000000\n")
    monkeypatch.setattr(probe, "host_memory", partial(host_memory, tmp_path))
    (here,) = ray.nodes()
    assert probe.facts_here(here, [], [], None).memory == 3_000_000_000


def test_a_node_says_which_folders_are_not_those_of_the_job(local_ray: None, tmp_path: Path) -> None:
    (here,) = ray.nodes()
    runs, requests = f"{tmp_path}/runs", f"{tmp_path}/requests"
    with probe.signs_in([runs, requests, "s3://b"]) as signs:
        assert probe.facts_here(here, [], [], None, (), signs).unseen == ()
        Path(signs[runs]).unlink()  # as on a node with a disk of its own there
        assert probe.facts_here(here, [], [], None, (), signs).unseen == (runs,)
    assert list(Path(requests).iterdir()) == []


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


def test_a_local_folder_that_is_another_one_on_each_node_fails() -> None:
    blind = replace(NODE, unseen=("/runs",))
    level, text = level_and_text(preflight.check_local_paths([HEAD, blind], ["/runs", "/requests", "s3://b"], []))
    assert level == "fail"
    assert "/runs is not one folder on 2 nodes: a cannot see a file written there" in text
    assert "2 nodes see one folder at /requests" in text
    assert "s3://b" not in text
    assert worst(preflight.check_local_paths([HEAD, NODE], ["/runs", "s3://b"], ["/runs"])) == "ok"
    level, text = level_and_text(preflight.check_local_paths([HEAD, NODE], ["/runs"], ["/runs", "/log"]))
    assert level == "warn"  # each node may have its copy of what is only read
    assert "local paths on 2 nodes: /log " in text
    assert preflight.check_local_paths([HEAD], ["/runs"], ["/log"]) == []


def test_an_error_without_words_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: str) -> None:
        raise PermissionError

    monkeypatch.setattr(probe, "open_filesystem", refuse)
    assert storage_problem(str(tmp_path), writes=True) == "PermissionError"
    assert source_problem(str(tmp_path)) == "PermissionError"


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
