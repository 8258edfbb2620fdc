"""The places that a run's trainers take: how many, and of what."""

from __future__ import annotations

from typing import Any

from roo_ray.config import Config


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
