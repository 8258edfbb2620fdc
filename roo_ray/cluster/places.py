"""The places that a run takes: its trainers', how many and of what; what a build of its data reads."""

from __future__ import annotations

from typing import Any

from roo_ray.config import Config
from roo_ray.source_config import SyntheticSource


def workers_wanted(config: Config) -> int:
    """Trainers of a run; of an elastic one, the most that it takes."""
    workers: Any = config.training.workers
    return int(workers if isinstance(workers, int) else workers.max)


def workers_least(config: Config) -> int:
    """Trainers without which a run does not begin; of an elastic one, the fewest that it takes."""
    workers: Any = config.training.workers
    return int(workers if isinstance(workers, int) else workers.min)


def trainer_resources(config: Config) -> dict[str, float]:
    """What a trainer takes of its node."""
    gpu = {"GPU": 1.0} if config.training.gpu else {}
    return {"CPU": config.ray.cpus_per_worker} | gpu | config.ray.worker_resources


def build_reads(config: Config) -> list[str]:
    """Files and folders that a build of the data set reads; a generated source is made by it."""
    if config.source is None or isinstance(config.source, SyntheticSource):
        return []
    paths = config.source.path
    return [paths] if isinstance(paths, str) else list(paths)
