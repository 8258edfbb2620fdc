"""What a session opens and leaves behind: nothing that other machines reach, and nothing of Ray Data's that would call
Ray after its end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import ray

from tests.cluster.heads import ROOT, free_port

CODE = """
import gc
import threading
import time
from roo_ray import session
from roo_ray.config import RaySettings
import ray

def slow(batch):
    time.sleep(0.5)
    return batch

def running():
    names = [thread.name for thread in threading.enumerate()]
    return [sum(name.startswith(kind) for name in names) for kind in ("StreamingExecutor", "iter_threaded")]

class Knot:  # what the garbage collector alone takes apart

    def __init__(self):
        data = ray.data.range(10_000, override_num_blocks=100).map_batches(slow)
        self.batches = iter(data.iter_batches(batch_size=10))  # left in the middle, as after an error
        next(self.batches)
        self.itself = self

gc.disable()
with session.connect(RaySettings(local_cpus=3, object_store_bytes=100_000_000)):
    Knot()
    kept = Knot()
    within = running()
print("ran", *map(bool, within), *running())
time.sleep(2)  # what still ran would call Ray
del kept
gc.collect()
print("ray", ray.is_initialized())
"""


def listening(processes: Iterable[psutil.Process]) -> set[tuple[str, str, int]]:
    """(program, address, port) of what processes listen on."""
    return {
        (process.name(), found.laddr.ip, found.laddr.port)
        for process in processes
        for found in process.net_connections("inet")
        if found.status == psutil.CONN_LISTEN
    }


def elsewhere(found: set[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """What of it other machines reach."""

    def inside(address: str) -> bool:
        of = ip_address(address)
        return (getattr(of, "ipv4_mapped", None) or of).is_loopback

    return sorted(one for one in found if not inside(one[1]))


def test_a_local_ray_listens_on_loopback_alone(local_ray: None) -> None:
    worker = ray.get(ray.remote(lambda: os.getpid()).remote())  # one that has begun
    started = ray._private.worker._global_node.all_processes
    own = [psutil.Process(info.process.pid) for infos in started.values() for info in infos]
    processes = [psutil.Process(), *own, *(child for process in own for child in process.children(recursive=True))]
    assert worker in {process.pid for process in processes}
    found = listening(processes)
    assert {"raylet", "gcs_server"} <= {name for name, _, _ in found}
    assert elsewhere(found) == []


@pytest.mark.slow
def test_make_mlflow_listens_on_loopback_alone(tmp_path: Path) -> None:
    port = free_port()
    command = ["make", "mlflow", f"PORT={port}", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]
    env = os.environ | {"ROO_RAY_HOME": str(tmp_path)}
    make = psutil.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found: set[tuple[str, str, int]] = set()
        end = time.monotonic() + 120
        while not any(at == port for _, _, at in found):
            assert make.poll() is None
            assert time.monotonic() < end
            time.sleep(0.5)
            found = listening(make.children(recursive=True))
        assert elsewhere(found) == []
    finally:
        for process in [*make.children(recursive=True), make]:
            process.kill()
        make.wait()


def test_an_iteration_that_was_left_ends_with_the_session() -> None:
    """Its thread would else call Ray, which ends the process with 1 after all is done; and when it is collected, it
    would start another Ray."""
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["ran True True 0 0", "ray False"], ended.stderr
