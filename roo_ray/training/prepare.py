"""Impression logs to a published request data set, tracked: generate (synthetic), build, log the ledger."""

from __future__ import annotations

import time

from roo_ray import session
from roo_ray.config import Config
from roo_ray.errors import ConfigError
from roo_ray.requests.join import build_requests
from roo_ray.requests.ledger import ledger_metrics
from roo_ray.requests.manifest import Manifest
from roo_ray.requests.report import CheckFailed, report_json
from roo_ray.source_config import SyntheticSource
from roo_ray.sources.synthetic import generate
from roo_ray.training.progress import Say
from roo_ray.training.tracking import RunHandle, RunLogger, open_run

REPORT = "validation_report.json"


def prepare(config: Config, run_name: str, say: Say, job: str = "build") -> tuple[Manifest, RunHandle]:
    """Builds the config's request data set from its source, in an MLflow run of its own; with another ``job``, in
    the one that this job goes on with.

    Raises ConfigError where the config has no source, and BadInput where the data breaks a rule (CheckFailed, with
    the validation report, where a check failed); nothing is published then.
    """
    if config.source is None:
        raise ConfigError("the config has no 'source' section: there is nothing to build requests from")
    begin = time.perf_counter()
    run = open_run(config.tracking, job, run_name, session.alive_nodes(), reopen=job != "build")
    logger = RunLogger(run)
    succeeded = False
    try:
        built = {"name", "source", "requests", "build"}
        logger.params(config.model_copy(update={"run_name": run_name}).model_dump(mode="json", include=built))
        logger.text(config.request_schema.to_yaml(), "schema.yaml")
        if isinstance(config.source, SyntheticSource):
            summary = generate(config.source, say)
            logger.json(summary.model_dump(mode="json"), "synthetic.json")
        try:
            manifest = build_requests(config, say)
        except CheckFailed as refused:
            logger.json(report_json(refused.findings), REPORT)
            raise
        logger.json(manifest.report, REPORT)
        logger.json(manifest.ledger, "ledger.json")
        logger.json(manifest.counts, "counts.json")
        logger.metrics({f"data/{name}": value for name, value in data_metrics(manifest).items()})
        logger.metrics({"build/seconds": time.perf_counter() - begin})
        logger.tags({"data_set": config.requests, "data_version": manifest.version})
        succeeded = True
    finally:
        logger.end(succeeded)
    return manifest, run


def data_metrics(manifest: Manifest) -> dict[str, float]:
    """Counts and dedup ratios of a data set, as metrics."""
    counts = {
        "requests": manifest.requests,
        "impressions": manifest.impressions,
        "history_tokens": manifest.tokens,
    }
    return {name: float(value) for name, value in counts.items()} | ledger_metrics(manifest.ledger)
