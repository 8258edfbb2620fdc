"""What a node says of itself: runs as a task on each node of the cluster."""

from __future__ import annotations

import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roo_ray.grace import grace_seconds
from roo_ray.models.attention import kernel_problem
from roo_ray.redact import redact_text
from roo_ray.storage import is_local, join_path, open_filesystem
from roo_ray.training.hosts import host_memory
from roo_ray.training.tracking import store_problem

DISTRIBUTIONS = ("ray", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy", "mlflow", "roo-ray")
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class NodeFacts:
    """One node. Bytes throughout; ``memory``: of the machine, or of the container where it may have less; ``grace_s``:
    NaN where it cannot be read; ``problems``: place -> why it cannot be used from here; ``unseen``: local folders in
    which it does not see what another node wrote; ``resources``: all that Ray
    counts, custom ones among them; ``driver``: NVIDIA's;
    ``cuda``: that torch was built for; ``kernel``: why the GPU's attention kernel cannot run; empty without GPUs."""

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
    unseen: tuple[str, ...] = ()
    resources: dict[str, float] = field(default_factory=dict)
    driver: str = ""
    cuda: str = ""
    kernel: str = ""


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


def first_line(error: Exception) -> str:
    """What an error says, without secrets; its kind where it says nothing."""
    return redact_text(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


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
        return first_line(error)
    return None


def source_problem(path: str) -> str | None:
    """Why a file or folder of a source cannot be read, or None."""
    try:
        filesystem, inner = open_filesystem(path)
        found = filesystem.get_file_info(inner)
        if found.type == pafs.FileType.NotFound:
            return "it is not there"
        if found.is_file:
            with filesystem.open_input_stream(inner) as stream:
                stream.read(1)
        elif not filesystem.get_file_info(pafs.FileSelector(inner)):
            return "nothing is in it"
    except Exception as error:  # as above
        return first_line(error)
    return None


def server_problem(uri: str) -> str | None:
    """Why the MLflow server at an http address does not answer a question of a run's kind (down, another server, a
    host name or token that it refuses), or None."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return None
    return store_problem(uri)


def facts_here(
    node: dict[str, Any],
    written: list[str],
    read: list[str],
    tracking: str | None,
    source: Sequence[str] = (),
    signs: Mapping[str, str] | None = None,
) -> NodeFacts:
    """The facts of this machine; ``node``: its entry in ``ray.nodes()``; ``signs``: local folder -> a file in it."""
    unseen = tuple(path for path, sign in (signs or {}).items() if not os.path.isfile(sign))
    problems = {path: problem for path in source if (problem := source_problem(path))}
    problems |= {path: problem for path in written if (problem := storage_problem(path, True))}
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
        memory=host_memory(),
        shared_memory=shutil.disk_usage(shm).total if os.path.isdir(shm) else 0,
        object_store=int(node["Resources"].get("object_store_memory", 0)),
        disk_free=shutil.disk_usage(ray._private.worker._global_node.get_session_dir_path()).free,
        grace_s=grace_seconds(),
        gpu_names=names,
        gpu_memory=gpu_memory,
        problems=problems,
        unseen=unseen,
        resources=dict(node["Resources"]),
        driver=driver_version(),
        cuda=cuda_of_torch() if node["Resources"].get("GPU") else "",
        kernel=kernel_problem() or "" if node["Resources"].get("GPU") else "",
    )


@contextmanager
def signs_in(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    """A file in each of those folders that are local (folder -> file) while the block lasts. One that cannot be written
    is not there, and nobody sees it."""
    signs = {path: f"{open_filesystem(path)[1]}/.roo_ray_seen_{uuid.uuid4().hex}" for path in paths if is_local(path)}
    try:
        for sign in signs.values():
            with suppress(OSError):
                os.makedirs(os.path.dirname(sign), exist_ok=True)
                with open(sign, "wb"):
                    pass
        yield signs
    finally:
        for sign in signs.values():
            with suppress(OSError):
                os.remove(sign)


def probe_nodes(
    written: list[str],
    read: list[str],
    tracking: str | None,
    source: Sequence[str] = (),
    data_labels: Mapping[str, str] | None = None,
) -> tuple[list[NodeFacts], list[str]]:
    """(facts of each node that answers, names of those that do not). ``written`` / ``read``: folders and URIs that
    the run writes to / reads from; ``tracking``: the MLflow store; ``source``: what a build reads, on nodes with
    ``data_labels``. Takes no CPU of the cluster."""
    task = ray.remote(num_cpus=0, max_retries=0)(facts_here)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = {}
    with signs_in(written) as signs:
        for node in nodes:
            on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            builds = (data_labels or {}).items() <= node.get("Labels", {}).items()
            reads = list(source) if builds else []
            asked[task.options(scheduling_strategy=on_it).remote(node, written, read, tracking, reads, signs)] = node
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
