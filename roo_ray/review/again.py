"""Completes the review of a training run whose MLflow server was away when it ended."""

from __future__ import annotations

from mlflow.exceptions import MlflowException

from roo_ray.config import Config
from roo_ray.errors import ConfigError
from roo_ray.redact import redact_text
from roo_ray.requests.manifest import load_manifest
from roo_ray.review.record import Say, review_training
from roo_ray.training.checkpoint import read_state
from roo_ray.training.folder import RESULT_FILE, find_checkpoint, read_json
from roo_ray.training.incremental import read_published
from roo_ray.training.replay import replay
from roo_ray.training.spool import spool_folder
from roo_ray.training.tracking import RunHandle, find_run


def review_again(config: Config, run_name: str, say: Say) -> RunHandle:
    """Sends what waits for a finished run on this machine, then logs the model, data set and pictures that it lacks; a
    day of a series is registered only where it is published. Raises ConfigError where there is no such run, where the
    server does not answer, and where something cannot be logged."""
    result = read_json(config, run_name, RESULT_FILE)
    if result is None or not result.get("mlflow_run_id"):
        raise ConfigError(
            f"'{run_name}' is no finished run in {redact_text(config.storage)} that was tracked by MLflow"
        )
    run = find_run(config.tracking, result["mlflow_run_id"])
    for path in sorted(spool_folder().glob(f"{run.run_id}-*.jsonl")):
        try:
            done = replay(path)
        except MlflowException as error:
            raise ConfigError(f"{path} stays, with what is not stored yet: {str(error).splitlines()[0]}") from None
        say(f"stored {done.stored:,} entries that waited in {path}")
    checkpoint = find_checkpoint(config, run_name)
    state = read_state(checkpoint)
    known = {"model": state.model, "request_schema": state.request_schema(), "run_name": run_name}
    manifest = load_manifest(config.requests, state.data_version)
    register = config.incremental is None or _is_published(config, run_name)
    if not review_training(config.model_copy(update=known), manifest, checkpoint, run, say, register=register):
        raise ConfigError(
            f"the review of run '{run_name}' is not complete; mend what is said above, and run this again"
        )
    return run


def _is_published(config: Config, run_name: str) -> bool:
    series = run_name[: -len("-2024-01-01")]
    published = read_published(config, series)
    days = {f"{series}-{one.day}" for one in published.history} if published else set()
    return run_name in days
