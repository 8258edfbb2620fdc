"""Day by day: start from the published model, evaluate it on the new day, train on the day, publish.

``published.json`` in the series' folder names the model that is out; it is replaced in one piece, and only by a model
that is not worse on held-out requests of the new day. Each day is a run of its own, under one parent in MLflow, and
goes on where it was when the job was killed.
"""

from __future__ import annotations

import datetime
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from roo_ray import session
from roo_ray.config import Config, Holdout, Incremental
from roo_ray.errors import ConfigError, DataError, PublishRefused
from roo_ray.redact import redact_text
from roo_ray.requests.manifest import load_manifest
from roo_ray.review import charts
from roo_ray.review.record import never_fatal
from roo_ray.schema import Strict
from roo_ray.serving.publish import register_model
from roo_ray.storage import join_path, open_filesystem, write_whole
from roo_ray.training.checkpoint import finite
from roo_ray.training.folder import PLAN_FILE, read_json, with_credentials
from roo_ray.training.job import BEFORE_FILE
from roo_ray.training.launch import train
from roo_ray.training.lease import at_work
from roo_ray.training.progress import Say
from roo_ray.training.tracking import RunHandle, RunLogger, find_run, open_run

PUBLISHED_FILE = "published.json"


class DayResult(Strict):
    """A day's model. ``metrics``: ``<task>/ne_before`` (the model published then, on the whole day, before it was
    trained on), ``ne_published`` and ``ne_new`` (that one and the new one, on the day's held-out requests), and the
    same of ``auc``; None where there was no model before."""

    day: str
    checkpoint: str
    run_id: str
    data_version: int
    data_digest: str
    metrics: dict[str, float | None]


class Published(Strict):
    """The model that is out, ``history[-1]``, and those before it."""

    history: list[DayResult] = Field(min_length=1)

    @property
    def last(self) -> DayResult:
        """The model that is out."""
        return self.history[-1]


def read_published(config: Config, series: str) -> Published | None:
    """What is published of a series. Raises DataError where the file is damaged."""
    path = join_path(config.storage, series, PUBLISHED_FILE)
    content = _read(path)
    try:
        found = None if content is None else Published.model_validate_json(content)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if found is None:
        return None
    history = [
        day.model_copy(update={"checkpoint": with_credentials(day.checkpoint, config.storage)}) for day in found.history
    ]
    return found.model_copy(update={"history": history})


def _read(path: str) -> bytes | None:
    filesystem, inner = open_filesystem(path)
    if not filesystem.get_file_info(inner).is_file:
        return None
    with filesystem.open_input_stream(inner) as stream:
        return bytes(stream.read())


def write_published(config: Config, series: str, published: Published) -> None:
    """Replaces ``published.json`` in one piece."""
    content = redact_text(json.dumps(published.model_dump(mode="json"), indent=1)).encode()
    write_whole(join_path(config.storage, series, PUBLISHED_FILE), content)


def days_to_train(settings: Incremental, available: list[str], published: Published | None) -> list[str]:
    """The days still to be trained on, in order. Raises ConfigError for a day that the data set does not have."""
    absent = sorted(set(settings.days) - set(available))
    if absent:
        raise ConfigError(f"incremental.days names {absent[0]}, of which the data set has no requests")
    after = published.last.day if published else ""
    return [day for day in sorted(settings.days or available) if day > after]


def days_passed_over(available: list[str], published: Published | None) -> list[str]:
    """Days of the data set within those that the series has trained on, on which no model was trained: they came
    after the days behind them were published."""
    if published is None:
        return []
    done = {one.day for one in published.history}
    return [day for day in sorted(available) if min(done) < day < max(done) and day not in done]


def figures(tasks: list[str], before: dict[str, Any] | None, after: dict[str, float]) -> dict[str, float | None]:
    """``DayResult.metrics`` from what a day's run has measured."""
    metrics: dict[str, float | None] = {}
    for task in tasks:
        for metric in ("ne", "auc"):
            if before is not None:
                metrics[f"{task}/{metric}_before"] = before["day"].get(f"eval/{task}/{metric}")
                metrics[f"{task}/{metric}_published"] = before["held_out"].get(f"eval/{task}/{metric}")
            metrics[f"{task}/{metric}_new"] = after.get(f"eval/{task}/{metric}")
    return finite(metrics)


def check_regression(settings: Incremental, task: str, result: DayResult, published: Published | None) -> None:
    """Raises PublishRefused where the new model is worse than the config allows."""
    new, old = result.metrics.get(f"{task}/ne_new"), result.metrics.get(f"{task}/ne_published")
    out = "nothing is published yet" if published is None else f"the model of {published.last.day} stays published"
    if new is None or not math.isfinite(new):
        raise PublishRefused(f"{result.day}: the new model has no NE of '{task}' on held-out requests; {out}")
    if old is None:
        return
    if new > old * (1 + settings.max_ne_rise):
        raise PublishRefused(
            f"{result.day}: on the day's held-out requests the new model's NE of '{task}' is {new:.4f}, "
            f"{new / old - 1:+.2%} against {old:.4f} of the published model, and incremental.max_ne_rise allows "
            f"{settings.max_ne_rise:+.2%}; {out}. Look at the day's data; run again with a larger max_ne_rise to "
            f"publish it nevertheless, or remove the folder of that day's run from the storage to train it anew"
        )


def config_of_day(config: Config, series: str, day: str) -> Config:
    """The config of a day's run: this day alone, in the order of time, on the data version it began with."""
    assert config.incremental is not None
    plan = read_json(config, f"{series}-{day}", PLAN_FILE)
    version = plan["data_version"] if plan is not None else config.requests_version
    holdout = Holdout(by="request", fraction=config.incremental.holdout_fraction, only_days=[day])
    ingest = config.ingest.model_copy(update={"mode": "time"})
    return config.model_copy(update={"holdout": holdout, "ingest": ingest, "requests_version": version})


def run_days(config: Config, series: str, say: Say) -> tuple[list[DayResult], Published | None, RunHandle | None]:
    """Trains and publishes the days that are new: (these, what is published now, the parent run; None where nothing
    was to be done). A published model, and no other, is registered under ``serving.register_as``. Raises PublishRefused
    where a day's model is worse; what is published then stays. Raises ConfigError where another job is at work on the
    series."""
    with at_work(join_path(config.storage, series), f"the series '{series}'", say):
        return _run_days(config, series, say)


def _run_days(config: Config, series: str, say: Say) -> tuple[list[DayResult], Published | None, RunHandle | None]:
    settings = config.incremental
    assert settings is not None
    task, *_ = tasks = [label.name for label in config.request_schema.labels]
    manifest = load_manifest(config.requests, config.requests_version)
    published = read_published(config, series)
    if published is not None:
        _register(config, published.last, say)  # a job that was killed may not have come to it
    days = days_to_train(settings, list(manifest.days), published)
    if not settings.days and (passed := days_passed_over(manifest.days, published)):
        say(f"warning: no model was trained on {', '.join(passed)}, which came after later days were published")
    if not days:
        at = published.last.day if published else "no day"
        say(f"nothing to do: the model of {at} is published, and version {manifest.version} has no day after it")
        return [], published, None
    parent = open_run(config.tracking, "incremental", series, session.alive_nodes(), reopen=True)
    logger = RunLogger(parent, say, config.tracking.end_wait_seconds)
    done: list[DayResult] = []
    refused: DayResult | None = None
    succeeded = False
    try:
        for day in days:
            result = _train_day(config_of_day(config, series, day), series, day, published, parent, tasks, say)
            step = _number(day, published.history[0].day if published else day)
            by_day = {f"day/{name}": value for name, value in result.metrics.items()}
            logger.metrics(by_day, step, again=True)  # of a day that is trained anew, the later figures count
            refused = result
            check_regression(settings, task, result, published)
            refused = None
            published = Published(history=[*(published.history if published else []), result])
            write_published(config, series, published)
            done.append(result)
            logger.tags({"published_day": day, "published_checkpoint": result.checkpoint})
            say(f"published the model of {day}: {result.checkpoint}")
            _register(config, result, say)
        succeeded = True
    finally:
        with never_fatal("the chart of NE by day", say):
            log_chart(logger, published.history if published else [], refused, task)
        logger.end(succeeded)
    return done, published, parent


def _register(config: Config, day: DayResult, say: Say) -> None:
    """Registers a published model, once, where the config names it; what fails is made up for by the next job."""
    if config.serving.register_as is None or not day.run_id or not config.tracking.enabled:
        return
    with never_fatal(f"the registration of the model of {day.day}", say):
        version = register_model(config, day.checkpoint, find_run(config.tracking, day.run_id))
        if version is not None:
            say(f"the model of {day.day} is '{config.serving.register_as}' version {version}")


def _train_day(
    config: Config,
    series: str,
    day: str,
    published: Published | None,
    parent: RunHandle,
    tasks: list[str],
    say: Say,
) -> DayResult:
    run_name = f"{series}-{day}"
    manifest = load_manifest(config.requests, config.requests_version)
    start = published.last.checkpoint if published else None
    patience = config.tracking.series_wait_seconds  # the series has begun: the server was there
    trained = train(config, run_name, say, start_from=start, day=day, parent=parent, register=False, patience=patience)
    before = _read(join_path(config.storage, run_name, BEFORE_FILE)) if published else None
    return DayResult(
        day=day,
        checkpoint=trained.checkpoint,
        run_id=trained.run.run_id,
        data_version=manifest.version,
        data_digest=manifest.digest(),
        metrics=figures(tasks, json.loads(before) if before is not None else None, trained.metrics),
    )


def _number(day: str, first: str) -> int:
    """Days since the first one, from 1: the step of a day's metrics on the parent run."""
    return (datetime.date.fromisoformat(day) - datetime.date.fromisoformat(first)).days + 1


def log_chart(logger: RunLogger, published: list[DayResult], refused: DayResult | None, task: str) -> None:
    """NE by day as a picture, of the published models and of the one that was refused, if any."""
    days = [*published, *([refused] if refused else [])]
    if not days:
        return
    series = {
        title: [one.metrics.get(f"{task}/{name}") for one in days]
        for name, title in (
            ("ne_before", "published model, whole day, before training on it"),
            ("ne_published", "published model, held-out requests"),
            ("ne_new", "new model, held-out requests"),
        )
    }
    with tempfile.TemporaryDirectory() as folder:
        charts.by_day(
            Path(folder) / "ne_by_day.png", task, [one.day for one in days], series, refused.day if refused else None
        )
        logger.folder(folder, "charts")
