"""The images' install steps, run as their Dockerfiles have them, in clean virtual environments: no engine runs here,
and what a lock file misses only shows when it is installed. From the package index: minutes each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.requests.manifest import load_manifest
from roo_ray.training.tracking import COMMIT_VARIABLE
from tests.cluster.heads import ROOT
from tests.cluster.test_files import CLUSTER, DOCKERFILES, instructions, name_of
from tests.jobs.small import cli_overrides

IMPORTS = {
    "Dockerfile.cpu": "import boto3, gcsfs, torchrec, fbgemm_gpu, ray.train, ray.data, mlflow\n"
    "import roo_ray.training.launch\n"
    "from ray.autoscaler._private.providers import _import_aws, _import_gcp\n"  # as the head's autoscaler does
    "_import_aws({}), _import_gcp({})\n"
    "from ray.autoscaler._private.gcp import config; from ray.autoscaler._private.aws import config",
    "mlflow/Dockerfile": "import boto3, psycopg2, google.cloud.storage; from mlflow.server import app",
}

PROGRAMS = (
    *("sh", "bash", "env", "cat", "ls", "cp", "mv", "rm", "ln", "mkdir", "chmod", "id", "uname", "nproc", "date"),
    *("sleep", "stat", "df", "head", "tail", "cut", "tr", "wc", "sort", "dirname", "basename", "readlink", "true"),
)
UNREACHABLE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyError")


def build(path: Path, folder: Path) -> list[str]:
    """Runs a Dockerfile's steps but for apt-get and useradd, its working directory at ``folder/app``, pip that of a
    new virtual environment. Returns the command of its CMD, in that environment."""
    venv, app = folder / "venv", folder / "app"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    app.mkdir()
    env = {"PATH": f"{venv}/bin:{os.environ['PATH']}", "HOME": str(folder)}
    pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
    env |= pip | {"PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command: list[str] = []
    for verb, arguments in instructions(path):
        if verb == "COPY":
            *sources, target = [word for word in arguments.split() if not word.startswith("--")]
            for source in sources:
                at = app / target / Path(source).name if target.endswith("/") else app / target
                at.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(
                        ROOT / source, at, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
                    )
                else:
                    shutil.copy(ROOT / source, at)
        elif verb == "RUN" and "pip" in arguments:
            done = subprocess.run(
                ["bash", "-ec", arguments], cwd=app, env=env, capture_output=True, text=True, timeout=1500, check=False
            )
            said = (done.stdout + done.stderr)[-3000:]
            if any(words in said for words in UNREACHABLE):
                pytest.skip(f"the package index cannot be reached: {said.strip().splitlines()[-1]}")
            if re.search(r"No matching distribution found for torch==\S+\+cpu", said):
                pytest.skip(
                    "the package index here has no CPU builds of torch (PIP_EXTRA_INDEX_URL, see docs/cluster.md)"
                )
            assert done.returncode == 0, said
        elif verb == "CMD":
            command = json.loads(arguments)
    return [str(venv / "bin" / command[0]), *command[1:]]


def bare_path(folder: Path, python: str) -> str:
    """A PATH as the images have it, as far as jobs care: Python's own programs, a shell and coreutils; no git, no C
    compiler."""
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    path = f"{Path(python).parent}:{folder}"
    assert not any(shutil.which(name, path=path) for name in ("git", "gcc", "cc", "clang"))
    return path


def tracked_build(python: str, app: Path, home: Path) -> None:
    """Builds a small data set and says so to MLflow."""
    env = {"PATH": bare_path(home / "bin", python), "HOME": str(home), COMMIT_VARIABLE: "0123abcd"}
    job = [python, "jobs/build_requests.py", "--config", "configs/demo.yaml", *cli_overrides(home / "data")]
    done = subprocess.run(job, cwd=app, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert load_manifest(str(home / "data/requests")).requests == 900
    client = MlflowClient(f"sqlite:///{home}/data/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("roo_ray").experiment_id])
    assert (run.info.status, run.data.tags["mlflow.source.git.commit"]) == ("FINISHED", "0123abcd")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", [p for p in DOCKERFILES if name_of(p) in IMPORTS], ids=name_of)
def test_install_steps_in_a_clean_environment(path: Path, tmp_path: Path) -> None:
    command = build(path, tmp_path)
    try:
        python = str(tmp_path / "venv/bin/python")
        env = {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
        env |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
        if "server" in command:  # it would listen; its command line is enough
            command = [*command, "--help"]
        for line in (command, [python, "-c", IMPORTS[name_of(path)]]):
            done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        if path.parent == CLUSTER:  # jobs of the image, as user and working directory have it
            tracked_build(python, tmp_path / "app", tmp_path)
            job = [python, "jobs/train.py", "--config", "configs/demo.yaml", "training.epoch=1"]
            done = subprocess.run(
                job, cwd=tmp_path / "app", env=env, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 2, (done.stdout + done.stderr)[-3000:]
            assert "training.epoch: unknown key" in done.stderr
    finally:
        shutil.rmtree(tmp_path / "venv", ignore_errors=True)
