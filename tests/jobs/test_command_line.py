"""Jobs as a user meets them: real processes, exit codes, messages, and a real `ray job submit`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.errors import EXIT_BAD_INPUT, EXIT_OK
from tests.jobs.small import ROOT, cli_overrides

BIN = Path(sys.executable).parent


def run_job(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_bad_config_is_one_message_and_exit_code_2() -> None:
    done = run_job("jobs/train.py", "--config", "configs/demo.yaml", "training.epoch=3")
    assert done.returncode == EXIT_BAD_INPUT
    assert "training.epoch: unknown key" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_few_cpus_are_refused_before_anything_runs(tmp_path: Path) -> None:
    done = run_job("jobs/train.py", "--config", "configs/demo.yaml", *cli_overrides(tmp_path, "ray.local_cpus=2"))
    assert done.returncode == EXIT_BAD_INPUT
    assert "the cluster has 2 CPUs, and the job needs 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "log").exists()


def test_missing_data_is_named(tmp_path: Path) -> None:
    arguments = ["jobs/train.py", "--config", "configs/ebnerd.yaml", f"source.path={tmp_path}/nothing"]
    done = run_job(*arguments, f"requests={tmp_path}/requests", f"tracking.uri=sqlite:///{tmp_path}/m.db")
    assert done.returncode == EXIT_BAD_INPUT
    assert f"{tmp_path}/nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "requests" / "_manifests").exists()


@pytest.mark.parametrize("path", ["../important", "runs", "/tmp", "s3://bucket/x"])
def test_the_demo_clears_nothing_but_its_own_folder(path: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for kept in (tmp_path / "important", home / "runs"):
        kept.mkdir(parents=True)
        (kept / "file").write_text("x")
    env = {"ROO_RAY_HOME": str(home)}
    done = run_job("jobs/demo.py", "--config", "configs/demo.yaml", f"requests={path}", env=env)
    assert done.returncode == EXIT_BAD_INPUT
    assert "only touches" in done.stderr
    assert (tmp_path / "important/file").exists()
    assert (home / "runs/file").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def ray_head() -> Iterator[str]:
    """A Ray head of its own on loopback, ended with all that it started; yields the jobs address."""
    folder = Path(tempfile.mkdtemp(prefix="rr"))  # short: Ray's sockets lie in it, and their paths are limited
    port, dashboard = free_port(), free_port()
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *("--include-dashboard=true", f"--temp-dir={folder}", "--object-store-memory=300000000"),
        # the default port of the agent may be taken by another Ray on the machine
        *(f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"),
    ]
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()  # the blocking head ends all processes that it started
        head.wait(timeout=60)


def test_ray_job_submit(ray_head: str, tmp_path: Path) -> None:
    """The README's command, on a cluster that knows nothing of this folder but what the submission brings."""
    overrides = cli_overrides(tmp_path, "training.epochs=1", "run_name=submitted")
    entrypoint = [sys.executable, "jobs/train.py", "--config", "configs/demo.yaml", *overrides]
    submit = [str(BIN / "ray"), "job", "submit", "--address", ray_head, "--working-dir", ".", "--"]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    deadline = time.monotonic() + 150
    while True:
        done = subprocess.run(
            [*submit, *entrypoint], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
        )
        # a head that has just started has no dashboard, then no agent yet: nothing was submitted
        not_ready = "Failed to connect to Ray" in done.stderr or "No available agent" in done.stderr
        if not not_ready or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert done.returncode == EXIT_OK, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Trained 'submitted'" in done.stdout
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("roo_ray").experiment_id], "tags.`roo_ray.job` = 'train'")
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.metrics["eval/requests"] > 0
