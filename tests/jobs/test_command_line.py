"""Jobs as a user meets them: real processes, exit codes and messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from roo_ray.errors import EXIT_BAD_INPUT
from tests.jobs.small import ROOT, cli_overrides


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


def test_items_of_one_checkpoint_are_not_for_two() -> None:
    both = ["--checkpoint", "a", "--against", "b", "--items", "items.parquet"]
    done = run_job("jobs/evaluate.py", "--config", "configs/demo.yaml", *both)
    assert done.returncode == EXIT_BAD_INPUT
    assert "--items is of one checkpoint" in done.stderr


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
