"""Whether a data set lies as a run will read it, from its manifest: asked by the driver before trainers come."""

from __future__ import annotations

from roo_ray.config import Config
from roo_ray.ingest.holdout import select_files
from roo_ray.ingest.plan import time_order
from roo_ray.ingest.units import units_of
from roo_ray.requests.manifest import Manifest, load_manifest, manifest_versions
from roo_ray.training.incremental import config_of_day, days_to_train, read_published


def refuse_unordered(config: Config, run_name: str) -> None:
    """Raises DataError where the data that a run, or a series, reads in the order of time does not lie in it. Nothing
    where there is no data set yet, or no such order is asked for."""
    if not in_time(config) or not manifest_versions(config.requests):
        return
    manifests: dict[int | None, Manifest] = {}  # a day that was begun goes on with its version
    for of in _runs(config, run_name):
        version = of.requests_version
        if version not in manifests:
            manifests[version] = load_manifest(of.requests, version)
        time_order(units_of(select_files(manifests[version], of.holdout, "train")))


def in_time(config: Config) -> bool:
    """Whether the config's training reads in the order of time."""
    return config.incremental is not None or config.ingest.mode == "time"


def _runs(config: Config, run_name: str) -> list[Config]:
    if config.incremental is None:
        return [config]
    available = load_manifest(config.requests, config.requests_version).days
    days = days_to_train(config.incremental, list(available), read_published(config, run_name))
    return [config_of_day(config, run_name, day) for day in days]
