"""What a node says of itself: runs as a task on each node of the cluster."""

from __future__ import annotations

import os
import platform
import re
import shutil
import uuid
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roo_ray.grace import grace_seconds
from roo_ray.redact import redact_text
from roo_ray.storage import join_path, open_filesystem
from roo_ray.training.tracking import store_problem

DISTRIBUTIONS = ("ray", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy", "mlflow", "roo-ray")
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class NodeFacts:
    """One node. Bytes throughout; ``grace_s``: NaN where it cannot be read; ``problems``: place -> why it cannot be
    used from here; ``resources``: all that Ray counts, custom ones among them; ``driver``: NVIDIA's;
    ``cuda``: that torch was built for, both empty without GPUs."""

    node: str
    is_head: bool
    labels: dict[str, str]
    cpus: float
    gpus: float
    versions: dict[str, str]
    memory: int
    shared_memory: int
    object_store: int
    disk_free: int
    grace_s: float
    gpu_names: tuple[str, ...] = ()
    gpu_memory: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)
    driver: str = ""
    cuda: str = ""


def driver_version() -> str:
    """Of the NVIDIA driver of this machine, which a container shares; empty without one."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", file.read())
    except OSError:
        return ""
    return found[1] if found else ""


def versions() -> dict[str, str]:
    """Installed versions of what must be equal on all nodes."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cuda_of_torch() -> str:
    """The CUDA that torch was built for, ``13.0``; empty for a CPU build."""
    import torch

    return torch.version.cuda or ""


def storage_problem(path: str, writes: bool) -> str | None:
    """Why a folder or URI cannot be read (and written to), or None. What it writes it deletes."""
    try:
        filesystem, inner = open_filesystem(path)
        filesystem.get_file_info(inner)
        if writes:
            probe = open_filesystem(join_path(path, f".roo_ray_preflight_{uuid.uuid4().hex}"))[1]
            filesystem.create_dir(inner, recursive=True)
            with filesystem.open_output_stream(probe) as stream:
                stream.write(b"preflight")
            with filesystem.open_input_stream(probe) as stream:
                if stream.read() != b"preflight":
                    return "what was written does not come back"
            filesystem.delete_file(probe)
    except Exception as error:  # whatever the file system raises is the answer
        return redact_text(str(error).splitlines()[0])
    return None


def server_problem(uri: str) -> str | None:
    """Why the MLflow server at an http address does not answer a question of a run's kind (down, another server, a
    host name or token that it refuses), or None."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return None
    return store_problem(uri)


def facts_here(node: dict[str, Any], written: list[str], read: list[str], tracking: str | None) -> NodeFacts:
    """The facts of this machine; ``node``: its entry in ``ray.nodes()``."""
    problems = {path: problem for path in written if (problem := storage_problem(path, True))}
    problems |= {path: problem for path in read if (problem := storage_problem(path, False))}
    if tracking and (problem := server_problem(tracking)):
        problems[tracking] = problem
    names: tuple[str, ...] = ()
    gpu_memory = 0
    if node["Resources"].get("GPU"):
        import torch

        count = torch.cuda.device_count()
        names = tuple(torch.cuda.get_device_name(i) for i in range(count))
        gpu_memory = min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=0)
    shm = "/dev/shm"
    return NodeFacts(
        node=f"{node['NodeManagerHostname']} {node['NodeID'][:6]}",
        is_head="node:__internal_head__" in node["Resources"],
        labels={k: v for k, v in node.get("Labels", {}).items() if not k.startswith("ray.io/")},
        cpus=node["Resources"].get("CPU", 0.0),
        gpus=node["Resources"].get("GPU", 0.0),
        versions=versions(),
        memory=psutil.virtual_memory().total,
        shared_memory=shutil.disk_usage(shm).total if os.path.isdir(shm) else 0,
        object_store=int(node["Resources"].get("object_store_memory", 0)),
        disk_free=shutil.disk_usage(ray._private.worker._global_node.get_session_dir_path()).free,
        grace_s=grace_seconds(),
        gpu_names=names,
        gpu_memory=gpu_memory,
        problems=problems,
        resources=dict(node["Resources"]),
        driver=driver_version(),
        cuda=cuda_of_torch() if node["Resources"].get("GPU") else "",
    )


def probe_nodes(written: list[str], read: list[str], tracking: str | None) -> tuple[list[NodeFacts], list[str]]:
    """(facts of each node that answers, names of those that do not). ``written`` / ``read``: folders and URIs that
    the run writes to / reads from; ``tracking``: the MLflow store. Takes no CPU of the cluster."""
    task = ray.remote(num_cpus=0, max_retries=0)(facts_here)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = {}
    for node in nodes:
        on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=on_it).remote(node, written, read, tracking)] = node
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_TIMEOUT_S)
    facts, silent = [], []
    for reference, node in asked.items():
        try:
            if reference not in done:
                raise TimeoutError(f"no answer within {PROBE_TIMEOUT_S:g} s")
            facts.append(ray.get(reference))
        except Exception as error:  # a node without roo_ray's dependencies, a lost node
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            silent.append(f"{node['NodeManagerHostname']} {node['NodeID'][:6]} ({reason})")
    return facts, silent
