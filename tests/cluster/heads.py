"""A Ray head of its own on loopback, as `ray start` makes it, optionally with the real autoscaler over Ray's fake
nodes (processes on this machine). It ends with all that it started: `ray stop` would end every Ray on the machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
PROVIDERS = Path(__file__).parent / "providers"
HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """``jobs``: the address for `ray job`. ``gcs``: that of the cluster. ``log``: of the head's own output."""

    jobs: str
    gcs: str
    log: Path


def fake_autoscaler(node_types: dict[str, Any], port: int) -> dict[str, Any]:
    """A launcher config whose nodes are processes of this machine, none of them spot ones."""
    return {
        "cluster_name": "fake",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": 0.2,  # longer than a job takes from waiting for nodes to using them
        "provider": {
            "type": "external",
            "module": "no_spot.NoSpot",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": node_types,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 100.0,
        **{name: [] for name in LISTS},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }


@contextmanager
def ray_head(cpus: int, env: dict[str, str] | None = None, node_types: dict[str, Any] | None = None) -> Iterator[Head]:
    """Starts a head with its dashboard and job server; ``node_types``: with the autoscaler."""
    folder = Path(tempfile.mkdtemp(prefix="rr"))  # short: Ray's sockets lie in it, and their paths are limited
    port, dashboard = free_port(), free_port()
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *("--include-dashboard=true", f"--temp-dir={folder}", "--object-store-memory=300000000"),
        *(f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"),
    ]
    env = {**os.environ, **QUIET, **(env or {})}
    if node_types is not None:
        config = folder / "autoscaler.yaml"
        config.write_text(yaml.safe_dump(fake_autoscaler(node_types, port)))
        command.append(f"--autoscaling-config={config}")
        env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
        # by it the autoscaler knows the head as its own; until the head runs it launches nothing
        env["RAY_CLOUD_INSTANCE_ID"] = HEAD_NODE_ID
        env["PYTHONPATH"] = f"{PROVIDERS}:{env.get('PYTHONPATH', '')}".rstrip(":")
    log = folder / "head.log"
    with log.open("w") as stream:
        head = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", log)
    finally:
        started = [*psutil.Process(head.pid).children(recursive=True)] if head.poll() is None else []
        head.terminate()  # the blocking head ends all processes that it started
        if os.environ.get("ROO_RAY_KEEP_HEADS"):  # for debugging
            shutil.copytree(
                folder, os.environ["ROO_RAY_KEEP_HEADS"], ignore=shutil.ignore_patterns("sockets"), dirs_exist_ok=True
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=30)
        for process in [*started, *of_session(folder)]:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def of_session(folder: Path) -> list[psutil.Process]:
    """Processes of the fake nodes: they have this session's folder in their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{folder}/" in " ".join(process.cmdline()):
                found.append(process)
    return found


def ray_cli(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `ray ...` from the root of the repository."""
    command = [str(BIN / "ray"), *arguments]
    env = {**os.environ, **QUIET}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def submit(head: Head, name: str, *entrypoint: str, timeout: float = 100) -> None:
    """`ray job submit --no-wait` of the repository; waits for a head that has just started."""
    deadline = time.monotonic() + timeout
    while True:
        done = ray_cli(
            *("job", "submit", "--address", head.jobs, "--working-dir", ".", "--no-wait", "--submission-id", name),
            *("--", sys.executable, *entrypoint),
        )
        not_ready = "Failed to connect to Ray" in done.stderr or "No available agent" in done.stderr
        if not not_ready or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
