"""SIGTERM to a job: exit code 143 wherever it comes, also while the driver waits for Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import ray

from roo_ray.errors import EXIT_STOPPED, Stopped
from roo_ray.terminal import stopped_by_terminate


def wait_and_be_terminated(run: ray.ObjectRef) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    ray.get(run, timeout=60)


def test_a_job_that_waits_for_ray_is_stopped(local_ray: None) -> None:
    task = ray.remote(num_cpus=0, resources={"nobody": 1}, max_retries=0)(lambda: None)
    run = task.remote()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped, match="by SIGTERM"), stopped_by_terminate():
            wait_and_be_terminated(run)
    finally:
        ray.cancel(run)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_exit_code_and_what_is_closed() -> None:
    code = (
        "import os, signal, time\n"
        "from roo_ray.terminal import run_job\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(30)\n"
        "    finally:\n"
        "        print('closed')\n"
        "run_job(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_STOPPED
    assert done.stdout == "closed\n"
    assert done.stderr.startswith("\nstopped: by SIGTERM")
