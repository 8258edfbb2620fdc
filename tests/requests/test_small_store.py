"""A log of four times the object store, on one CPU: the build finishes, and no task waits for another's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from roo_ray.requests.manifest import load_manifest

ROOT = Path(__file__).parents[2]
STORE_BYTES = 80_000_000  # Ray's least is 75 MiB
ROWS = 200_000


@pytest.mark.slow
@pytest.mark.long
def test_a_log_of_four_times_the_store_on_one_cpu(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    arguments = ["-m", "tests.requests.small_store", str(tmp_path), str(ROWS), str(STORE_BYTES)]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 4 * STORE_BYTES
    manifest = load_manifest(str(tmp_path / "requests"))
    assert (manifest.counts["requests"], manifest.counts["impressions"]) == (ROWS // 10, ROWS)
    logged = ds.dataset(str(tmp_path / f"log-{ROWS}"), exclude_invalid_files=True).to_table(["item_id", "clicked"])
    built = ds.dataset([f"{tmp_path}/requests/{file.path}" for file in manifest.files]).to_table(["item_id", "clicked"])
    for name in ("item_id", "clicked"):
        assert sum(built[name].combine_chunks().flatten().to_pylist()) == sum(logged[name].to_pylist())
