"""A small job config for tests: a synthetic log, built and trained in seconds."""

from __future__ import annotations

from pathlib import Path

from roo_ray.config import Config, load_config
from roo_ray.training.checkpoint import STATE_FILE

ROOT = Path(__file__).parents[2]

OVERRIDES = [
    "source.requests=900",
    "source.users=200",
    "source.days=3",
    "source.history_length=16",
    "source.requests_per_task=300",
    "build.row_group_requests=50",
    "ingest.batch_impressions=64",
    "ingest.window_units=2",
    "training.epochs=2",
    "training.log_every=5",
]


def small_config(folder: Path, *overrides: str) -> Config:
    """configs/demo.yaml at a small size, with all its paths in ``folder``; later overrides win."""
    paths = [f"source.path={folder}/log", f"requests={folder}/requests", f"storage={folder}/runs"]
    tracking = [f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    return load_config(ROOT / "configs/demo.yaml", [*paths, *tracking, *OVERRIDES, *overrides])


def cli_overrides(folder: Path, *overrides: str) -> list[str]:
    """The same as command line arguments of a job."""
    paths = [f"source.path={folder}/log", f"requests={folder}/requests", f"storage={folder}/runs"]
    return [*paths, f"tracking.uri=sqlite:///{folder}/mlflow.db", *OVERRIDES, *overrides]


def has_checkpoint(folder: Path, run_name: str, step: int) -> bool:
    """Whether a run has a complete checkpoint of this step or a later one."""
    found = (folder / "runs" / run_name).glob(f"epoch-*/{STATE_FILE}")
    return any(int(path.parent.name.rpartition("-")[2]) >= step for path in found)
