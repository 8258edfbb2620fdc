"""What trainers' pods do when they are to go, as the manifests say it: run here, against processes named as Ray's."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from tests.cluster.manifests import groups

NAME = "RayTrainWorker"
PROCESS = """
import pathlib, signal, sys, time
note = pathlib.Path(sys.argv[1])
def last_checkpoint(number, frame):
    with note.open("a") as file: file.write("SIGTERM\\n")
    time.sleep(2)
    with note.open("a") as file: file.write("written\\n")
    sys.exit()
signal.signal(signal.SIGTERM, last_checkpoint)
note.touch()
time.sleep(60)
"""


def hooks() -> list[list[str]]:
    """The command of each manifest's trainers; no other pod has one."""
    found = []
    for path, group in groups():
        pod: dict[str, Any] = group["template"]["spec"]
        hook = pod["containers"][0].get("lifecycle")
        assert (hook is not None) == (group.get("groupName") == "trainer"), path
        if hook is not None:
            found.append(hook["preStop"]["exec"]["command"])
            assert pod["terminationGracePeriodSeconds"] >= 120  # the hook's time is a part of it
    return found


def run_hook(name: str) -> subprocess.Popen[bytes]:
    """The hook, for processes of another name: other trainers on this machine are not to be signalled."""
    [command] = {tuple(hook) for hook in hooks()}
    assert command[-1].count(NAME) == 1
    return subprocess.Popen([*command[:-1], command[-1].replace(NAME, name)])


def test_trainers_get_sigterm_once_and_time_for_a_checkpoint(tmp_path: Path) -> None:
    name = f"{NAME}{uuid.uuid4().hex}"
    titles = {"idle": f"ray::{name}", "polled": f"ray::{name}.poll_status", "other": f"ray::Data({name})"}
    titles["job"] = f"python jobs/train.py ray::{name}"
    notes = {kind: tmp_path / kind for kind in titles}
    processes = {
        kind: subprocess.Popen([title, "-c", PROCESS, str(notes[kind])], executable=sys.executable)
        for kind, title in titles.items()
    }
    try:
        while not all(note.exists() for note in notes.values()):
            assert {process.poll() for process in processes.values()} == {None}
        hook = run_hook(name)
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(1)  # the checkpoint is being written
        for kind in ("idle", "polled"):
            assert processes[kind].wait(30) == 0
        assert hook.wait(30) == 0
        told = {kind: note.read_text().split() for kind, note in notes.items()}
        both = ["SIGTERM", "written"]
        assert told == {"idle": both, "polled": both, "other": [], "job": []}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_a_pod_without_trainers_goes_at_once() -> None:
    assert run_hook(f"{NAME}{uuid.uuid4().hex}").wait(10) == 0


def test_ray_names_its_trainers_so(local_ray: None) -> None:
    """The processes' titles begin so, with the method that runs, if any, after it."""

    def title() -> str:
        return Path("/proc/self/cmdline").read_bytes().strip(b"\0").decode()

    actor = ray.remote(num_cpus=0)(RayTrainWorker).remote()
    assert ray.get(actor.execute.remote(title)) == f"ray::{NAME}.execute"
    ray.kill(actor)
